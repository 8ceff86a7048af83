"""Wheel, source distribution and `make install`: what is in them, and that it works installed.

Nothing is downloaded: the libraries are those that the tests run with.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from nbdserve.cli.application import application

PROJECT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
COMMANDS = application.list_commands(None)  # type: ignore[arg-type]


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a command that must succeed; nothing of this run's Python reaches it."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "NBDSERVE_DATA", "MAKEFLAGS", "MAKELEVEL")
    }
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what git tracks: as a clone, with nothing that an older build left.

    It has a unit, a list of users and a configuration of the test's own.
    """
    if not (PROJECT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (PROJECT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, copy / name)
    units = copy / "scripts" / "systemd"
    units.mkdir(exist_ok=True)
    (units / "of-the-test@.service").write_text("ExecStart=/opt/nbdserve/bin/nbdserve serve\n")
    (units / "of-the-test.sysusers").write_text("u nbdserve -\n")
    (units / "nbdserve.toml").write_text("workers = 2\n")
    return copy


@pytest.fixture(scope="module")
def built(tracked: Path) -> Path:
    """Return the directory with the source distribution, and the wheel that is made of it."""
    run(sys.executable, "-m", "build", "--no-isolation", tracked, SOURCE_DATE_EPOCH="1769817600")
    return tracked / "dist"


def test_the_source_distribution_has_what_the_repository_has(tracked: Path, built: Path) -> None:
    root = f"nbdserve-{VERSION}"
    with tarfile.open(built / f"{root}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{root}/") for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    packed = {name for name in names if not name.startswith("nbdserve.egg-info/")}
    expected = {
        str(file.relative_to(tracked))
        for file in tracked.rglob("*")
        if file.is_file()
        and file.relative_to(tracked).parts[0] not in ("dist", "build", "nbdserve.egg-info")
    }
    assert packed - made == expected


def test_the_wheel_has_packages_pages_completion_and_units(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"nbdserve-{VERSION}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("nbdserve", "snapshots", "backends"):
        assert f"{package}/py.typed" in names
        modules = {str(file.relative_to(PROJECT)) for file in (PROJECT / package).rglob("*.py")}
        assert modules <= names
    share = f"nbdserve-{VERSION}.data/data/share"
    pages = {f"nbdserve-{command}" for command in COMMANDS} | {"nbdserve"}
    assert {name for name in names if name.startswith(f"{share}/man/man1/")} == {
        f"{share}/man/man1/{page}.1" for page in pages
    }
    for file in (
        "man/man5/nbdserve.toml.5",
        "bash-completion/completions/nbdserve",
        "zsh/site-functions/_nbdserve",
        "fish/vendor_completions.d/nbdserve.fish",
        "doc/nbdserve/README.md",
        "doc/nbdserve/docs/operations.md",
        *(f"nbdserve/systemd/{file.name}" for file in PROJECT.glob("scripts/systemd/*")),
    ):
        assert f"{share}/{file}" in names
    top = {name.partition("/")[0] for name in names}
    assert top == {"nbdserve", "snapshots", "backends", f"nbdserve-{VERSION}.dist-info",
                   f"nbdserve-{VERSION}.data"}  # fmt: skip


def lend_libraries(site_packages: Path) -> None:
    """Let an installation without libraries use those of this run, behind its own files."""
    (site_packages / "lent.pth").write_text(sysconfig.get_path("platlib") + "\n")


def install(built: Path, destination: Path, prefix: str) -> Path:
    """`make install` below a directory; return where the program is."""
    (wheel,) = built.glob("*.whl")
    run(
        PROJECT / "scripts" / "install",
        DESTDIR=str(destination),
        PREFIX=prefix,
        WHEEL=str(wheel),
        PYTHON=sys.executable,
        PIP=f"{sys.executable} -m pip",
        PIP_OPTIONS="--no-index --no-deps",
    )
    home = destination / prefix[1:] / "lib" / "nbdserve"
    (site_packages,) = home.glob("lib/python3*/site-packages")
    lend_libraries(site_packages)
    return home


def test_an_installation_works_and_is_laid_out_as_a_package(built: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    home = install(built, root, "/usr")
    said = run(home / "bin" / "python3", "-I", home / "bin" / "nbdserve", "--version")
    assert said == f"nbdserve {VERSION}\n"
    data = tmp_path / "data"
    run(home / "bin" / "python3", "-I", home / "bin" / "nbdserve",
        "volume", "create", "web", "--size", "1M", "--data", data)  # fmt: skip
    assert (data / "volumes").is_dir()
    where = run(home / "bin" / "python3", "-I", "-c", "import nbdserve; print(nbdserve.__file__)")
    assert Path(where).is_relative_to(home)
    check_layout(root, home)
    (site_packages,) = home.glob("lib/python3*/site-packages")
    (site_packages / "lent.pth").unlink()
    for file in root.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file


def check_layout(tmp_path: Path, home: Path) -> None:
    assert (home / "bin" / "nbdserve").read_text().startswith("#!/usr/lib/nbdserve/bin/python3 ")
    command = tmp_path / "usr" / "bin" / "nbdserve"
    assert command.resolve() == home / "bin" / "nbdserve"
    share = tmp_path / "usr" / "share"
    assert len(list((share / "man" / "man1").iterdir())) == len(COMMANDS) + 1
    assert (share / "man" / "man5" / "nbdserve.toml.5").exists()
    assert (share / "bash-completion" / "completions" / "nbdserve").exists()
    assert (share / "zsh" / "vendor-completions" / "_nbdserve").exists()
    assert (share / "fish" / "vendor_completions.d" / "nbdserve.fish").exists()
    assert (share / "doc" / "nbdserve" / "docs" / "operations.md").exists()
    assert not (home / "share").exists()
    shipped = {file.name for file in (PROJECT / "scripts").glob("systemd/*")}
    units = {name for name in shipped if name.endswith((".service", ".socket", ".timer"))}
    installed = tmp_path / "lib" / "systemd" / "system"
    assert {file.name for file in installed.iterdir()} == units | {"of-the-test@.service"}
    for unit in installed.iterdir():
        assert "/opt/" not in unit.read_text()
    assert "=/usr/bin/nbdserve serve" in (installed / "of-the-test@.service").read_text()
    users = tmp_path / "usr" / "lib" / "sysusers.d" / "nbdserve.conf"
    assert users.read_text() == "u nbdserve -\n"
    configuration = tmp_path / "etc" / "nbdserve" / "nbdserve.toml"
    assert configuration.read_text() == "workers = 2\n"
    assert (share / "doc" / "nbdserve" / "examples" / "nbdserve.toml").exists()
    for directory in ("man/man1", "doc/nbdserve", "bash-completion/completions"):
        for file in (share / directory).glob("*"):
            assert file.is_dir() or file.stat().st_mode & 0o777 == 0o644, file


def test_installing_again_leaves_the_configuration_alone(built: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "etc" / "nbdserve" / "nbdserve.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text("workers = 3\n")
    home = install(built, tmp_path, "/usr/local")
    stale = home / "lib" / "stale"
    stale.touch()
    install(built, tmp_path, "/usr/local")
    assert configuration.read_text() == "workers = 3\n"
    assert not stale.exists()
    assert (tmp_path / "usr" / "local" / "share" / "man" / "man1" / "nbdserve.1").exists()


@pytest.mark.parametrize("prefix", ["usr", "/usr local", "/", "/usr/", "/a;b", "$HOME"])
def test_a_prefix_that_could_do_harm_is_refused(prefix: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [PROJECT / "scripts" / "install"],
        env={**os.environ, "PREFIX": prefix, "DESTDIR": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("make install: ")
    assert list(tmp_path.iterdir()) == []
