"""Formats of disk images."""

from __future__ import annotations

import enum


class Format(enum.StrEnum):
    """What the bytes of an image file mean."""

    RAW = "raw"
    QCOW2 = "qcow2"
