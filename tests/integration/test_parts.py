"""The parts themselves: what the other tests rest on does what it says."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from .parts import PROJECT, SCRIPTS, KernelMachine, S3Server, require, run


def test_a_missing_part_fails_the_run_in_continuous_integration(tmp_path: Path) -> None:
    """With no program to be found a test is skipped, but with CI=true it fails and says why."""
    selected = "tests/integration/test_libnbd.py::test_list[plain]"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", selected]
    environment = {**os.environ, "PATH": str(tmp_path), "CI": ""}
    # The search goes on in /usr/sbin and /sbin, where nbdinfo is not.
    quiet = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert quiet.returncode == 0, quiet.stdout
    assert "nbdinfo" in quiet.stdout
    assert "scripts/install-test-dependencies" in quiet.stdout
    assert "1 skipped" in quiet.stdout
    loud = subprocess.run(
        command, cwd=PROJECT, env={**environment, "CI": "true"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert loud.returncode == 1, loud.stdout
    assert "nbdinfo" in loud.stdout
    assert "skipped" not in loud.stdout.splitlines()[-1], loud.stdout


def test_dependency_installer_finds_all_and_refuses_what_it_does_not_know() -> None:
    require("dpkg-query")
    assert run(SCRIPTS / "install-test-dependencies", "--check").stdout == ""
    refused = run(SCRIPTS / "install-test-dependencies", "--frobnicate", check=False)
    assert refused.returncode == 2
    assert "--frobnicate" in refused.stderr


def test_s3_server_lets_one_conditional_put_win(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    outcomes: list[bool] = []

    def put(number: int) -> None:
        try:
            s3_server.client.put_object(
                Bucket=bucket, Key="key", Body=b"%d" % number, IfNoneMatch="*"
            )
            outcomes.append(True)
        except ClientError as error:
            assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 412
            outcomes.append(False)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    assert s3_server.list_sizes(bucket) == {"key": 1}
    s3_server.empty_bucket(bucket)
    assert s3_server.list_sizes(bucket) == {}


def test_s3_server_starts_and_stops_in_the_background(tmp_path: Path) -> None:
    require("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
    directory = tmp_path / "ceph"
    description = json.loads(run(SCRIPTS / "s3-test-server", "start", directory).stdout)
    try:
        assert description["endpoint"] == f"http://127.0.0.1:{description['port']}"
        twice = run(SCRIPTS / "s3-test-server", "start", directory, check=False)
        assert twice.returncode == 1
        assert "not empty" in twice.stderr
    finally:
        run(SCRIPTS / "s3-test-server", "stop", directory)
    assert not directory.exists()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert str(directory) not in (process / "cmdline").read_text(errors="replace")
    again = run(SCRIPTS / "s3-test-server", "stop", directory, check=False)
    assert again.returncode == 1
    assert str(directory) in again.stderr


def test_kernel_machine_passes_output_and_status_on(kernel_machine: KernelMachine) -> None:
    answered = []
    output = kernel_machine.run(
        "echo waiting; read line; grep -c nbd /proc/devices; echo done >&2",
        {"waiting": lambda: answered.append(True)},
    )
    assert output == "waiting\n1\ndone\n"
    assert answered == [True]
    with pytest.raises(pytest.fail.Exception, match="ended with 3"):
        kernel_machine.run("exit 3")
