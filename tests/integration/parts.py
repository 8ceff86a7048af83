"""The real parts that the tests put together: a daemon, an S3 server, a kernel, disk images."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest

from nbdserve.control import address
from nbdserve.control.client import Client as Control
from nbdserve.control.client import path

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = PROJECT / "scripts"
NBDSERVE = Path(sys.executable).parent / "nbdserve"
# Debian's python3-libnbd is for Debian's Python, which another one must not hide.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a child is started with so that it cannot outlive the test run.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")

over_all_transports = pytest.mark.parametrize("transport", ["plain", "tls"], indirect=True)
"""For tests and modules (as ``pytestmark``): once with TLS off, once with TLS required."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def require(*programs: str) -> None:
    """Skip the test when one of these programs is not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: run scripts/install-test-dependencies")


def unpacked(name: str, program: str) -> Path:
    """Return a program that was unpacked beside the installed ones; skip the test without it."""
    found = SCRIPTS.parent / ".cache" / name / "root" / "usr" / "bin" / program
    if not (SCRIPTS.parent / ".cache" / name / "complete").exists():
        pytest.skip(f"no {program} in .cache/{name}: run scripts/install-test-dependencies")
    return found


def require_root() -> None:
    """Skip the test when it may not mount a file system."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a loop-mounted file system")


def run(
    *command: str | Path,
    check: bool = True,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program; with `check`, fail the test with all that it said when its status is not 0."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        capture_output=True,
        timeout=timeout,
        env=None if env is None else dict(env),
        input=b"" if stdin is None else stdin,
        check=False,
    )
    result = subprocess.CompletedProcess(
        words,
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )
    if check and result.returncode:
        pytest.fail(
            f"{' '.join(words)}: status {result.returncode}\n{result.stdout}{result.stderr}"
        )
    return result


def run_nbdsh(script: str, uri: str | None = None, timeout: float = 120) -> str:
    """Run a script in nbdsh, connected as `h` when a URI is given; return what it printed."""
    require("nbdsh")
    arguments = [] if uri is None else ["--uri", uri]
    # nbdsh is quiet about the line that failed unless it comes through the interpreter itself.
    environment = {**os.environ, "PATH": SYSTEM_PATH}
    return run("nbdsh", *arguments, "-c", script, env=environment, timeout=timeout).stdout


def find_free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


class Daemon:
    """`nbdserve serve` as a process of its own, over a data directory.

    The directory outlives the process, so that a test can stop or kill it and start it again;
    `arguments` go to `nbdserve serve`. With certificates it requires TLS, which the URIs then say.
    """

    def __init__(
        self, data: Path, *arguments: str | Path, certificates: Path | None = None
    ) -> None:
        self.data = data
        self.certificates = certificates
        self.arguments = (*arguments, *serve_options(certificates)) if certificates else arguments
        self.socket = data / "nbd.sock"
        self.port = find_free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = data.with_name(data.name + ".log")
        self.env = {**os.environ, "NBDSERVE_DATA": str(data)}

    def start(self) -> None:
        """Start it and return when all its sockets take connections."""
        assert self.process is None, "it runs already"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*DIE_WITH_PARENT, NBDSERVE, "serve", "--data", self.data,
                 "--listen", f"127.0.0.1:{self.port}", "--listen", f"unix:{self.socket}",
                 *self.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not self._accepts():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the daemon does not start:\n{self.read_log()}")
            time.sleep(0.05)

    def measurements(self) -> dict[str, Any]:
        """What the daemon has counted of its clients' requests."""
        found: dict[str, Any] = Control(lambda: address.connect(self.data)).get(
            path("measurements")
        )
        return found

    def stop(self) -> int:
        """Send SIGTERM; return the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """Send SIGKILL: no part of the daemon runs after this."""
        assert self.process is not None
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait until it has ended; return the exit status."""
        assert self.process is not None
        status = self.process.wait(timeout=60)
        self.process = None
        return status

    def is_running(self) -> bool:
        """Say whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def read_log(self) -> str:
        """Return all that it has printed, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def command(
        self,
        *arguments: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run an nbdserve command on this data directory, with more environment if given."""
        environment = {**self.env, **(env or {})}
        return run(NBDSERVE, *arguments, check=check, env=environment, timeout=timeout)

    def json(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> Any:
        """Run a command with --json; return what it printed."""
        return json.loads(self.command(*arguments, "--json", env=env, timeout=timeout).stdout)

    @property
    def tls(self) -> bool:
        """Whether it requires TLS."""
        return self.certificates is not None

    def create(self, volume: str, size: int) -> None:
        """Create a volume of `size` bytes, without the half second that the command takes."""
        self.control().post(path("volumes"), {"name": volume, "size": size})

    def take_snapshot(self, *snapshots: str) -> None:
        """Take snapshots (VOLUME@SNAPSHOT) of one instant, in the same way."""
        self.control().post(path("snapshots"), {"snapshots": list(snapshots)})

    def control(self) -> Control:
        """Return a client of the control socket."""
        return Control(lambda: address.connect(self.data))

    def uri(self, export: str) -> str:
        """Return the URI of an export on the Unix socket, for libnbd.

        It names no certificates, for libnbd reads files only if its user lets it (fio does not);
        so with TLS nobody asks who serves, which for a Unix socket libnbd accepts.
        """
        return f"nbd{'s' if self.tls else ''}+unix:///{export}?socket={self.socket}"

    def tcp_uri(self, export: str) -> str:
        """Return the URI of an export on the TCP port, for libnbd's own tools."""
        if self.tls:
            files = f"tls-certificates={self.certificates}"
            return f"nbds://127.0.0.1:{self.port}/{export}?{files}"
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def image(self, export: str) -> str:
        """Return what qemu's tools open, as a raw image, for an export on the Unix socket."""
        if not self.tls:
            return self.uri(export)
        return _encrypted_image(export, {"type": "unix", "path": str(self.socket)})

    def tcp_image(self, export: str) -> str:
        """Return the same for the TCP port."""
        if not self.tls:
            return self.tcp_uri(export)
        return _encrypted_image(
            export, {"type": "inet", "host": "127.0.0.1", "port": str(self.port)}
        )

    @property
    def qemu_objects(self) -> list[str]:
        """What qemu's tools are told besides, for the images to be found."""
        if not self.tls:
            return []
        return ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={self.certificates}"]

    def _accepts(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.socket))
            with socket.socket() as client:
                client.connect(("127.0.0.1", self.port))
            address.connect(self.data).close()
        except OSError:
            return False
        return True


def _encrypted_image(export: str, server: dict[str, str]) -> str:
    node = {"driver": "nbd", "server": server, "export": export}
    # The certificate has the name localhost; a Unix socket has none.
    return "json:" + json.dumps({"file": node | {"tls-creds": "tls", "tls-hostname": "localhost"}})


def serve_options(certificates: Path) -> list[str | Path]:
    """Return the options of `nbdserve serve` for a directory of scripts/make-test-certificates."""
    return [
        "--tls-certificate", certificates / "server-cert.pem",
        "--tls-key", certificates / "server-key.pem",
    ]  # fmt: skip


def qemu_img(
    daemon: Daemon, command: str, *arguments: str | Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command of qemu-img with images of the daemon among its arguments."""
    return run("qemu-img", command, *daemon.qemu_objects, *arguments, check=check)


def qemu_io(daemon: Daemon, export: str, *commands: str) -> str:
    """Run qemu-io commands in order on one connection; all must succeed and verify."""
    output = run_qemu_io(daemon, export, *commands).stdout
    assert "failed" not in output, output
    return output


def run_qemu_io(
    daemon: Daemon, export: str, *commands: str, options: Sequence[str] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run qemu-io commands, which may fail."""
    words = [word for command in commands for word in ("-c", command)]
    arguments = [*daemon.qemu_objects, *options, "-f", "raw", *words, daemon.image(export)]
    return run("qemu-io", *arguments, check=check)


class S3Server:
    """A radosgw that scripts/s3-test-server runs; `env` holds what an S3 client needs to use it."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str) -> None:
        self.endpoint = endpoint
        self.access_key = access_key
        self.secret_key = secret_key
        self.env = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """Create an empty bucket; return its name."""
        name = f"test-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return name

    def list_sizes(self, bucket: str) -> dict[str, int]:
        """Return the size in bytes of each object of a bucket, by its key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}

    def empty_bucket(self, bucket: str) -> None:
        """Delete all objects of a bucket: they are held in memory."""
        for key in self.list_sizes(bucket):
            self.client.delete_object(Bucket=bucket, Key=key)


class KernelMachine:
    """Runs shell scripts under a real kernel in a virtual machine; see scripts/kernel-vm."""

    def __init__(self, directory: Path) -> None:
        self._script = directory / "script"

    def run(
        self,
        script: str,
        answers: Mapping[str, Callable[[], None]] | None = None,
        *options: str | Path,
        timeout: float = 240,
    ) -> str:
        """Run a script to its end with status 0; return what it printed.

        `options` go to scripts/kernel-vm.

        When it prints a line that is a key of `answers`, that function is called here, and then
        the script, which should be waiting in `read`, gets a line.
        """
        self._script.write_text(script)
        machine = subprocess.Popen(
            [*DIE_WITH_PARENT, sys.executable, SCRIPTS / "kernel-vm", "--timeout", str(timeout),
             *options, self._script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )  # fmt: skip
        assert machine.stdin is not None
        assert machine.stdout is not None
        lines = []
        with machine:
            for line in machine.stdout:
                lines.append(line)
                answer = (answers or {}).get(line.strip())
                if answer is not None:
                    answer()
                    machine.stdin.write("\n")
                    machine.stdin.flush()
        output = "".join(lines)
        if machine.returncode:
            pytest.fail(f"the script in the machine ended with {machine.returncode}:\n{output}")
        return output


@contextlib.contextmanager
def background(*command: str) -> Iterator[Callable[[], None]]:
    """Run a program beside the test; yield a function that waits until it has succeeded."""
    program = subprocess.Popen(
        [*DIE_WITH_PARENT, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def finish() -> None:
        output, _ = program.communicate(timeout=240)
        if program.returncode:
            pytest.fail(f"{' '.join(command)}: status {program.returncode}\n{output}")

    try:
        yield finish
    finally:
        program.kill()
        program.wait()
