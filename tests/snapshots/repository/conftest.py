from __future__ import annotations

import pytest

from snapshots.repository import packing


@pytest.fixture(autouse=True)
def small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small targets, so that small volumes have several segments and page objects."""
    monkeypatch.setattr(packing, "SEGMENT_TARGET", 40_000)
    monkeypatch.setattr(packing, "PAGES_TARGET", 3_000)
