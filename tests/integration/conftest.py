"""Fixtures for the real parts, and the rule that continuous integration skips nothing."""

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .parts import (
    KIB,
    MIB,
    SCRIPTS,
    Daemon,
    KernelMachine,
    S3Server,
    require,
    run,
)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory as an integration test, and those that use S3."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.integration)
            assert isinstance(item, pytest.Function)
            if "s3_server" in item.fixturenames:
                item.add_marker(pytest.mark.s3)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Turn a skipped test into a failed one when CI=true: there, every part must be present."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which continuous integration does not allow: {report.longrepr}"


@pytest.fixture
def data_directory() -> Iterator[Path]:
    """Yield the path of a data directory short enough for a Unix socket below it."""
    with tempfile.TemporaryDirectory(prefix="nbdserve-test-") as directory:
        yield Path(directory) / "data"


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> str:
    """Return how clients reach the daemon, "plain" or "tls"; see parts.over_all_transports."""
    return str(getattr(request, "param", "plain"))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the certificates of a CA, a server and a client."""
    require("openssl")
    directory = tmp_path_factory.mktemp("certificates")
    run(SCRIPTS / "make-test-certificates", directory)
    return directory


@pytest.fixture
def start_daemon(
    transport: str, data_directory: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Daemon]]:
    """Yield a function that starts a daemon over a data directory, with more arguments if given.

    It requires TLS when that is the test's transport. At the end every one that still runs must
    stop cleanly, and none may have printed a traceback. It is asked for with the data directory,
    which must outlive the daemons: what is asked for first is taken down last.
    """
    daemons = []
    encrypted = transport == "tls"
    certificates = request.getfixturevalue("certificates") if encrypted else None

    def start(data: Path, *arguments: str | Path) -> Daemon:
        data.mkdir(parents=True, exist_ok=True)
        daemon = Daemon(data, *arguments, certificates=certificates)
        daemons.append(daemon)
        daemon.start()
        return daemon

    yield start
    problems = []
    for daemon in daemons:
        if daemon.process is not None:
            ended = daemon.process.poll()
            if ended is not None:
                problems.append(f"the daemon ended by itself with {ended}")
            else:
                try:
                    status = daemon.stop()
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    problems.append("the daemon does not stop")
                else:
                    if status:
                        problems.append(f"the daemon stopped with status {status}")
        if "Traceback" in daemon.read_log():
            problems.append("the daemon printed a traceback")
        if problems:
            pytest.fail(f"{'; '.join(problems)}:\n{daemon.read_log()}")


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], data_directory: Path) -> Daemon:
    """Return a running daemon over an empty data directory."""
    return start_daemon(data_directory)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Yield a real S3 server, one for the whole run."""
    require("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
    with tempfile.TemporaryDirectory(prefix="nbdserve-s3-") as directory:
        # It stops when the pipe to its input closes, so it cannot outlive this process.
        server = subprocess.Popen(
            [SCRIPTS / "s3-test-server", "run", "--until-eof", Path(directory) / "ceph"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            if not line:
                pytest.fail(f"the S3 server does not start: {server.communicate()[1].decode()}")
            description = json.loads(line)
            yield S3Server(
                description["endpoint"], description["access_key"], description["secret_key"]
            )
        finally:
            server.terminate()
            server.communicate(timeout=60)


@pytest.fixture
def kernel_machine(tmp_path: Path) -> KernelMachine:
    """Return what runs scripts under a real kernel."""
    require("qemu-system-x86_64", "busybox", "nbd-client", "mkfs.ext4", "modprobe")
    if not (SCRIPTS.parent / ".cache" / "kernel" / "complete").exists():
        pytest.skip("no kernel in .cache/kernel: run scripts/install-test-dependencies")
    return KernelMachine(tmp_path)


@pytest.fixture(scope="session")
def disk_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a qcow2 image of 256 MiB with an ext4 file system, files in it and holes between."""
    require("mke2fs", "qemu-img")
    directory = tmp_path_factory.mktemp("image")
    files = directory / "files"
    files.mkdir()
    source = random.Random(20)
    for number in range(40):
        (files / f"small-{number}").write_bytes(source.randbytes(source.randrange(1, 200 * KIB)))
    (files / "large").write_bytes(source.randbytes(24 * MIB))
    (files / "text").write_text("a line of text\n" * 100_000)
    with (files / "sparse").open("wb") as sparse:
        sparse.seek(40 * MIB)
        sparse.write(source.randbytes(MIB))
    raw = directory / "image.raw"
    run("/sbin/mke2fs", "-q", "-t", "ext4", "-d", files, raw, "256M")
    image = directory / "image.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    raw.unlink()
    shutil.rmtree(files)
    return image
