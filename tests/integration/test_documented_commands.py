"""Every command that the documents show is run, in the order of the document.

The blocks fenced as `sh` and `crontab` run in a directory of their own, one shell a block, with
exported variables carried from block to block. So that they do no harm and find what they need,
these things are put in place of others, and nothing else is:

- `make` commands run with --dry-run: make must know the targets, but tests do not run tests.
- /var/lib/nbdserve, /etc/nbdserve and /srv/backups are directories of the test; s3://backups is a
  new bucket, and https://s3.example.com the test's S3 server, whose credentials are in the
  environment.
- Port 10809 is a free one; `nbdserve serve` runs in the background, a later one in its place.
- scripts/ is that of the project, and .venv/ what runs the tests, from its directory.
- debian.qcow2 is a small image; qemu-system-x86_64 starts with its processors stopped, and quits.
- A block that names /dev/nbd0 runs under a real kernel in a virtual machine, from which this
  machine's loopback is 10.0.2.2; there, sudo is not needed, the module is loaded already, and of
  all files there are those of tls/.
- The line of a crontab runs at once, with the crontab's variables.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .parts import (
    DIE_WITH_PARENT,
    NBDSERVE,
    PROJECT,
    SCRIPTS,
    Daemon,
    KernelMachine,
    S3Server,
    find_free_port,
    require,
    run,
)

DOCUMENTS = [
    PROJECT / "README.md",
    PROJECT / "docs" / "operations.md",
    PROJECT / "docs" / "configuration.md",
    PROJECT / "docs" / "backups.md",
    PROJECT / "docs" / "scripting.md",
    PROJECT / "docs" / "monitoring.md",
    PROJECT / "docs" / "web.md",
    PROJECT / "docs" / "limits.md",
    PROJECT / "docs" / "schedules.md",
    PROJECT / "docs" / "space.md",
    PROJECT / "docs" / "packaging.md",
    PROJECT / "docs" / "quickstart.md",
    PROJECT / "docs" / "attach.md",
]
MANUAL = PROJECT / "docs" / "man"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CRON_LINE = re.compile(r"^(?:[\d*/,-]+\s+){5}(.*)$")


@dataclass
class Sandbox:
    """Where the commands of one document run."""

    directory: Path
    daemon: Daemon
    substitutions: dict[str, str]
    environment: dict[str, str]
    kernel_machine: KernelMachine

    def run(self, language: str, block: str) -> None:
        """Run one fenced block."""
        for old, new in self.substitutions.items():
            block = block.replace(old, new)
        if language == "crontab":
            self._run_crontab(block)
        elif "/dev/nbd0" in block:
            self._run_in_machine(block)
        else:
            self._run_shell(block)

    def _run_shell(self, block: str) -> None:
        lines = []
        serve = None
        for line in block.splitlines():
            if line.split()[:2] == ["nbdserve", "serve"]:
                serve = line.split()[2:]
            elif line.startswith("scripts/"):
                lines.append(f"{PROJECT}/{line}")
            elif line.startswith(".venv/"):
                lines.append(f"(cd {PROJECT}; {NBDSERVE.parent}/{line.partition('/bin/')[2]})")
            elif line.startswith("make "):
                lines.append(line.replace("make ", f"make --dry-run --directory {PROJECT} ", 1))
            elif line.startswith("qemu-system-"):
                lines.append(f"{line} -S -display none -monitor stdio <<<quit")
            else:
                lines.append(line)
        variables = self.directory / "variables"
        text = "\n".join(["set -e", *lines, f"export -p >{variables}"])
        run("bash", "-c", f"cd {self.directory}; . {variables}; {text}", env=self.environment)
        if serve is not None:
            if self.daemon.process is not None:
                assert self.daemon.stop() == 0
            # The daemon runs elsewhere than the shell.
            files = [self.directory / word for word in serve]
            self.daemon.arguments = tuple(
                file if file.exists() else word for file, word in zip(files, serve, strict=True)
            )
            self.daemon.start()

    def _run_in_machine(self, block: str) -> None:
        lines = [
            line.replace("sudo ", "").replace("127.0.0.1", "10.0.2.2")
            for line in block.splitlines()
            if "modprobe nbd" not in line
        ]
        files = [
            f"mkdir -p tls\ncat >{file.relative_to(self.directory)} <<'END'\n{file.read_text()}END"
            for file in sorted(self.directory.glob("tls/*.pem"))
        ]
        options = ["--nbdserve"] if "nbdserve attach" in block else []
        self.kernel_machine.run("\n".join(["set -e", *files, *lines, ""]), None, *options)

    def _run_crontab(self, block: str) -> None:
        variables = {}
        commands = 0
        for line in block.splitlines():
            scheduled = CRON_LINE.match(line)
            if scheduled is not None:
                assert "%" not in scheduled[1], "cron makes a line break of it"
                run("sh", "-c", scheduled[1], env={**self.environment, **variables})
                commands += 1
            elif line and not line.startswith("#"):
                name, value = line.split("=", 1)
                variables[name] = value
        assert commands, "a crontab without a command"


@pytest.fixture
def sandbox(
    data_directory: Path,
    s3_server: S3Server,
    kernel_machine: KernelMachine,
    disk_image: Path,
    tmp_path: Path,
) -> Iterator[Sandbox]:
    """Yield a directory with what the documents speak of; see the top of this file."""
    require("bash", "curl", "make", "nbdinfo", "openssl", "qemu-img", "qemu-system-x86_64")
    data_directory.mkdir()
    daemon = Daemon(data_directory)
    bucket = s3_server.new_bucket()
    (tmp_path / "variables").touch()
    shutil.copy(disk_image, tmp_path / "debian.qcow2")
    environment = {
        **os.environ,
        **s3_server.env,
        "PATH": f"{NBDSERVE.parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    for name in ("AWS_ENDPOINT_URL", "MAKEFLAGS", "MAKELEVEL"):
        environment.pop(name, None)
    substitutions = {
        "/var/lib/nbdserve": str(data_directory),
        "/etc/nbdserve/": f"{tmp_path}/",
        "/srv/backups": str(tmp_path / "backups"),
        "s3://backups": f"s3://{bucket}",
        "https://s3.example.com": s3_server.endpoint,
        "10809": str(daemon.port),
        "10810": str(find_free_port()),
    }
    try:
        yield Sandbox(tmp_path, daemon, substitutions, environment, kernel_machine)
    finally:
        if daemon.process is not None:
            daemon.kill()
        s3_server.empty_bucket(bucket)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_document(sandbox: Sandbox, document: Path) -> None:
    _run_all(sandbox, document.read_text())


def test_manual_pages(sandbox: Sandbox) -> None:
    """The examples of all pages, that of the daemon first, as one document."""
    first = [
        MANUAL / f"nbdserve{name}.md" for name in ("", "-serve", "-volume", "-snapshot", "-repo")
    ]
    others = sorted(set(MANUAL.glob("*.md")) - set(first))
    _run_all(sandbox, "\n".join(page.read_text() for page in [*first, *others]))


def _run_all(sandbox: Sandbox, text: str) -> None:
    shown = [block for block in FENCE.findall(text) if block[0] in {"sh", "crontab"}]
    assert len(shown) > 2
    for language, block in shown:
        sandbox.run(language, block)
    if sandbox.daemon.process is not None:
        assert sandbox.daemon.stop() == 0
    assert "Traceback" not in sandbox.daemon.read_log()


def test_demo_prints_commands_that_work(
    data_directory: Path, kernel_machine: KernelMachine
) -> None:
    """What `make run` runs, on another port and directory; each command that it prints is run."""
    require("qemu-img", "qemu-system-x86_64")
    if not (PROJECT / ".venv" / "bin" / "nbdserve").exists():
        pytest.skip("no .venv: run make test")
    port = find_free_port()
    demo = subprocess.Popen(
        [*DIE_WITH_PARENT, SCRIPTS / "demo", str(port), data_directory],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert demo.stdout is not None
        printed = []
        for line in demo.stdout:
            printed.append(line)
            if "listening on" in line and "nbd.sock" in line:
                break
        commands = [line.strip() for line in printed if line.startswith("    ")]
        attach = [command for command in commands if re.match("modprobe|nbd-client", command)]
        others = [command for command in commands if command not in attach]
        assert len(attach) == 3, printed
        assert len(others) == 3, printed
        script = "\n".join(["set -e", *attach[1:2], "blockdev --getsize64 /dev/nbd0", attach[2]])
        output = kernel_machine.run(script.replace("127.0.0.1", "10.0.2.2"))
        assert str(1 << 30) in output.split()
        for command in others:
            if command.startswith("qemu-system"):
                run("bash", "-c", f"{command} -S -display none -monitor stdio <<<quit")
            else:
                run("bash", "-c", command)
        assert demo.poll() is None
    finally:
        demo.send_signal(signal.SIGINT)
        status = demo.wait(timeout=60)
        assert demo.stdout is not None
        demo.stdout.close()
    assert status == 0
