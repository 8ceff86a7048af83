"""Where repositories are: a directory, and an S3 server.

The S3 server is the one that AWS_ENDPOINT_URL names, with the credentials of the environment; where
it names none, scripts/s3-test-server is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3

from backends.object_urls import open_object_store
from scripts.bench.process import BenchError, tell

S3_TEST_SERVER = Path(__file__).resolve().parents[1] / "s3-test-server"
_STOP_SECONDS = 60


@dataclass(frozen=True)
class Place:
    """Room for one repository: ``url`` as nbdserve names it, ``restic`` as restic does."""

    url: str
    restic: str
    directory: Path | None

    def sizes(self) -> dict[str, int]:
        """Bytes of each object or file, by its key."""
        if self.directory is None:
            return dict(open_object_store(self.url).list(""))
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.directory)): path.stat().st_size for path in files}

    def stored(self) -> int:
        """Bytes of all of it."""
        return sum(self.sizes().values())

    def remove(self) -> None:
        """Delete everything in it."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        store = open_object_store(self.url)
        for key in list(dict(store.list(""))):
            store.delete(key)


@dataclass(frozen=True)
class Directory:
    """Repositories below a directory."""

    root: Path

    def place(self, name: str) -> Place:
        where = self.root / name
        return Place(f"file://{where}", str(where), where)


@dataclass(frozen=True)
class Bucket:
    """Repositories in a bucket, each below a prefix."""

    endpoint: str
    bucket: str

    server: int | None = None
    """The process of the server, and the leader of its session, when it is ours."""

    def let_others_go_first(self) -> None:
        """Give the server the lowest priority."""
        if self.server is None:
            return
        with contextlib.suppress(OSError):  # a kernel without groups by session
            Path(f"/proc/{self.server}/autogroup").write_text("19")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(process.name)) == self.server:
                    for thread in (process / "task").iterdir():
                        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)

    def place(self, name: str) -> Place:
        return Place(f"s3://{self.bucket}/{name}", f"s3:{self.endpoint}/{self.bucket}/{name}", None)


@contextlib.contextmanager
def s3_server(directory: Path, memory_gib: int) -> Iterator[Bucket]:
    """A new bucket, and the environment of this process as S3 clients need it."""
    with contextlib.ExitStack() as stack:
        server = None
        if not os.environ.get("AWS_ENDPOINT_URL"):
            server = stack.enter_context(_test_server(directory, memory_gib))
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        client = boto3.client("s3")
        bucket = f"bench-{secrets.token_hex(8)}"
        client.create_bucket(Bucket=bucket)
        try:
            yield Bucket(endpoint.rstrip("/"), bucket, server)
        finally:
            Place(f"s3://{bucket}", "", None).remove()
            client.delete_bucket(Bucket=bucket)


@contextlib.contextmanager
def _test_server(directory: Path, memory_gib: int) -> Iterator[int]:
    tell("starting an S3 server")
    # It stops when its standard input ends, so it cannot outlive this process.
    command = [str(S3_TEST_SERVER), "run", "--until-eof", f"--memory-gib={memory_gib}"]
    process = subprocess.Popen(
        [*command, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            said = process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise BenchError(said[-1] if said else "the S3 server does not start")
        described = json.loads(line)
        os.environ.update(
            AWS_ENDPOINT_URL=described["endpoint"],
            AWS_ACCESS_KEY_ID=described["access_key"],
            AWS_SECRET_ACCESS_KEY=described["secret_key"],
            AWS_DEFAULT_REGION="us-east-1",
            AWS_CONFIG_FILE=os.devnull,
            AWS_SHARED_CREDENTIALS_FILE=os.devnull,
            AWS_EC2_METADATA_DISABLED="true",
            NO_PROXY="127.0.0.1",
        )
        yield process.pid
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_SECONDS)
        finally:
            process.kill()
            process.wait()
