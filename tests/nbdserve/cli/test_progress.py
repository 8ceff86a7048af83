"""Progress where there is no terminal."""

import pytest

from nbdserve.cli import progress as progress_module
from nbdserve.cli.progress import Progress


def test_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with Progress("pushing a@b") as progress:
        for step in range(13):
            now[0] = 100.0 + step
            progress.update(step << 20, 12 << 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "pushing a@b: 5M of 12M (41 %)",
        "pushing a@b: 10M of 12M (83 %)",
    ]


def test_nothing_at_all_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pushing a@b") as progress:
        progress.update(0, 0)
    assert capsys.readouterr().err == ""
