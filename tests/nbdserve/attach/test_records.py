"""Who keeps what."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.attach import records
from nbdserve.attach.records import Claim, Record

URI = "nbd://h:1/web"


def record(keeper: int) -> Record:
    return Record(3, "web", URI, 317, 2, keeper)


def test_one_keeper_at_a_time(tmp_path: Path) -> None:
    claim = Claim.take(URI, tmp_path / "attach")
    assert claim is not None
    assert Claim.take(URI, tmp_path / "attach") is None
    assert Claim.take("nbd://h:1/other", tmp_path / "attach") is not None
    claim.write(record(1))
    claim.write(record(os.getpid()))
    assert list(records.list_records(tmp_path / "attach")) == [record(os.getpid())]
    assert records.has_keeper(record(1), tmp_path / "attach")
    claim.close()
    assert not records.has_keeper(record(1), tmp_path / "attach")
    again = Claim.take(URI, tmp_path / "attach")
    assert again is not None
    assert again.read() == record(os.getpid())
    again.remove()
    assert list(records.list_records(tmp_path / "attach")) == []


def test_a_killed_keeper_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "DIRECTORY", tmp_path)
    code = (
        "import sys, time, pathlib; from nbdserve.attach.records import Claim;"
        "claim = Claim.take(sys.argv[1], pathlib.Path(sys.argv[2])); print(1, flush=True);"
        "time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, URI, tmp_path], stdout=subprocess.PIPE
    ) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"1\n"
        assert records.has_keeper(record(keeper.pid), tmp_path)
        keeper.kill()
        keeper.wait()
    assert not records.has_keeper(record(keeper.pid), tmp_path)
    assert not records.tell_keeper(record(keeper.pid), signal.SIGHUP)


def test_what_is_no_record_is_not_listed(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"{", b"[]", b'{"index": 1}', b"\xff")):
        (tmp_path / f"{number}.json").write_bytes(content)
    assert list(records.list_records(tmp_path)) == []
