"""What the kernel knows of the disk that a file lies on."""

from __future__ import annotations

import os
from pathlib import Path


def is_rotational(path: Path, devices: Path = Path("/sys/dev/block")) -> bool:
    """Whether seeking costs time on the disk under ``path``, as far as the kernel knows.

    False for what lies on no single disk: memory, a network, several disks. ``devices`` is where
    the kernel shows its block devices.
    """
    try:
        number = path.stat().st_dev
        device = (devices / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
        queue = device / "queue"
        if not queue.exists():  # a partition: its disk has the queue
            queue = device.parent / "queue"
        return (queue / "rotational").read_text().strip() == "1"
    except OSError:
        return False
