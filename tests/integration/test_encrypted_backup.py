"""An encrypted repository in a real S3 server: what is restored, and what is in the bucket."""

import random
from pathlib import Path

import pytest

from tests.snapshots.repository.twin_reader import TwinReader

from .parts import MIB, Daemon, S3Server, require, run

TEXT = "a passphrase that nobody knows"


@pytest.mark.timeout(300)
def test_round_trip(daemon: Daemon, s3_server: S3Server, tmp_path: Path) -> None:
    require("qemu-img", "qemu-io", "openssl")
    bucket = s3_server.new_bucket()
    url = f"s3://{bucket}/tenant"
    passphrase, other = tmp_path / "passphrase", tmp_path / "other"
    passphrase.write_text(TEXT + "\n")
    other.write_text("the next one")
    key_file = tmp_path / "key"
    env = {**s3_server.env, "NBDSERVE_PASSPHRASE_FILE": str(passphrase)}
    source = random.Random(8)
    pattern = source.randbytes(3 * MIB) + b"TOP-SECRET-" * (MIB // 11)
    (tmp_path / "pattern").write_bytes(pattern)
    daemon.command("volume", "create", "payroll", "--size", "64M")
    write = f"write -s {tmp_path}/pattern 20M {len(pattern)}"
    run("qemu-io", "-f", "raw", "-c", write, daemon.uri("payroll"))
    daemon.command("repo", "init", url, env=env)
    # A key file costs no scrypt, so most of what follows uses it.
    daemon.command("repo", "key", "add", url, "--new-repo-key-file", key_file, env=env)
    keyed = {**s3_server.env, "NBDSERVE_REPO_KEY_FILE": str(key_file)}

    names = []
    for number in range(2):
        report = daemon.json("backup", "payroll", "--repo", url, env=keyed)["backups"][0]
        names.append(report["snapshot"])
        daemon.command("volume", "create", f"copy-{number}", "--from", f"payroll@{names[-1]}")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 21M 8k", daemon.uri("payroll"))
    assert report["uploaded"] < MIB // 2

    def fetch() -> dict[str, bytes]:
        return {
            key.removeprefix("tenant/"): s3_server.client.get_object(Bucket=bucket, Key=key)[
                "Body"
            ].read()
            for key in s3_server.list_sizes(bucket)
        }

    before = fetch()
    daemon.command("repo", "key", "passwd", url, "--new-passphrase-file", other, env=env)
    after = fetch()
    changes = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert len(changes) == 2
    assert all(key.startswith("keys/") for key in changes)
    for key, data in after.items():
        for word in (b"payroll", b"TOP-SECRET", *(name.encode() for name in names), pattern[:16]):
            assert word not in data
            assert word not in key.encode()
    # A reader that shares no code with this one, on what S3 really returned; records only, for it
    # is slow: all snapshots' names and sizes.
    twin = TwinReader(
        {key: data for key, data in after.items() if len(data) <= 16384},
        key_file=key_file.read_text().strip(),
    )
    assert [name[:2] for name in twin.names()] == [("payroll", name) for name in sorted(names)]

    refused = daemon.command("repo", "list", url, env=env, check=False)
    assert refused.returncode == 1
    assert "does not open" in refused.stderr
    env["NBDSERVE_PASSPHRASE_FILE"] = str(other)
    daemon.command("repo", "verify", url, "--deep", env=env)
    for number, name in enumerate(names):
        restored = f"restored-{number}"
        daemon.command("repo", "restore", url, f"payroll@{name}", restored, env=keyed)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw",
            daemon.uri(restored), daemon.uri(f"copy-{number}"))  # fmt: skip
    # A bit that changes in the largest object.
    victim = max(after, key=lambda key: len(after[key]))
    bad = bytearray(after[victim])
    bad[len(bad) // 2] ^= 1
    s3_server.client.put_object(Bucket=bucket, Key=f"tenant/{victim}", Body=bytes(bad))
    for arguments in (
        ["repo", "verify", url, "--deep"],
        ["repo", "restore", url, f"payroll@{names[0]}", "never"],
    ):
        refused = daemon.command(*arguments, env=keyed, check=False)
        assert refused.returncode == 1
        assert victim in refused.stderr
        assert "Traceback" not in refused.stderr
    for text in (TEXT, "the next one", key_file.read_text().strip()):
        assert text not in daemon.read_log()
    s3_server.empty_bucket(bucket)
