"""What this machine knows about its nbd devices: sysfs, procfs, and the device files.

An attached device has ``pid`` in its directory of /sys/block, and ``backend`` with the identifier
that it was attached with (Linux 5.14).
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from backends.errors import InvalidError, NotFoundError, UnavailableError, one_line

_BLOCK: Final = Path("/sys/block")
_PROC: Final = Path("/proc")
_SECTOR: Final = 512  # of sysfs, whatever the device's is

KERNEL_REQUEST_TIMEOUT: Final = 30_000
"""Milliseconds that the kernel gives requests of a device on which nothing else was said."""


def name_of(index: int) -> str:
    """The device as people write it."""
    return f"/dev/nbd{index}"


def parse_device(text: str) -> int:
    """The index of ``/dev/nbdX`` or ``nbdX``; raises InvalidError."""
    match = re.fullmatch(r"(?:/dev/)?nbd(0|[1-9][0-9]{0,4})", text, re.ASCII)
    if match is None:
        raise InvalidError(f"{text!r} is no nbd device: write /dev/nbd0, /dev/nbd1, …")
    return int(match[1])


def is_attached(index: int) -> bool:
    """Whether the kernel has the device attached to something."""
    return (_directory(index) / "pid").exists()


def read_identifier(index: int) -> str | None:
    """What the device was attached with; None when that is not known."""
    return _read(_directory(index) / "backend")


def read_pid(index: int) -> int | None:
    """The process that attached the device."""
    text = _read(_directory(index) / "pid")
    return int(text) if text else None


def read_size(index: int) -> int:
    """The size of the device in bytes."""
    return int(_read(_directory(index) / "size") or 0) * _SECTOR


def is_read_only(index: int) -> bool:
    return _read(_directory(index) / "ro") == "1"


def list_attached() -> list[int]:
    """The indexes of the devices that are attached, by whomever."""
    numbers = (re.fullmatch(r"nbd([0-9]+)", path.name) for path in _BLOCK.glob("nbd*"))
    return sorted(int(n[1]) for n in numbers if n is not None and is_attached(int(n[1])))


def set_request_timeout(index: int, milliseconds: int) -> None:
    """How often the kernel looks after requests that are in flight. UnavailableError."""
    path = _directory(index) / "queue" / "io_timeout"
    try:
        path.write_text(str(milliseconds))
    except OSError as error:
        raise UnavailableError(one_line(error)) from None


def claim(index: int) -> int:
    """Open the device for ourselves alone; return the descriptor.

    Raises BlockingIOError when something else has claimed it: a mount, swap, a device above it.
    """
    try:
        return os.open(name_of(index), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"there is no device {name_of(index)}") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BlockingIOError(error.errno, "busy") from None
        raise UnavailableError(one_line(error)) from None


def describe_users(index: int) -> list[str]:
    """Who uses the device or a partition of it, as far as can be told."""
    numbers = dict(_device_numbers(index))
    return [
        *_mounts(numbers),
        *_swaps(numbers),
        *_holders(index),
        *_processes(numbers),
    ]


def _device_numbers(index: int) -> Iterator[tuple[str, str]]:
    """``MAJOR:MINOR`` and name of the device and of its partitions."""
    top = _directory(index)
    for directory in (top, *sorted(top.glob(f"nbd{index}p*"))):
        number = _read(directory / "dev")
        if number:
            yield number, f"/dev/{directory.name}"


def _mounts(numbers: dict[str, str]) -> Iterator[str]:
    for line in (_read(_PROC / "self" / "mountinfo") or "").splitlines():
        fields = line.split()
        if fields[2] in numbers:
            # A space in a name is an octal number there.
            where = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            yield f"{numbers[fields[2]]} is mounted on {where}"


def _swaps(numbers: dict[str, str]) -> Iterator[str]:
    for line in (_read(_PROC / "swaps") or "").splitlines()[1:]:
        name = line.split()[0]
        if name in numbers.values():
            yield f"{name} is used as swap"


def _holders(index: int) -> Iterator[str]:
    top = _directory(index)
    for directory in (top, *sorted(top.glob(f"nbd{index}p*"))):
        for holder in sorted((directory / "holders").glob("*")):
            yield f"/dev/{directory.name} is part of /dev/{holder.name}"


def _processes(numbers: dict[str, str]) -> Iterator[str]:
    for process in sorted(_PROC.glob("[0-9]*"), key=lambda path: int(path.name)):
        if int(process.name) == os.getpid():
            continue
        name = _opened(process, numbers)
        if name is not None:
            command = _read(process / "comm") or "?"
            yield f"{name} is open in process {process.name} ({command})"


def _opened(process: Path, numbers: dict[str, str]) -> str | None:
    """Which of the devices a process has open."""
    try:
        for entry in (process / "fd").iterdir():
            try:
                status = entry.stat()
            except OSError:
                continue  # closed meanwhile
            if stat.S_ISBLK(status.st_mode):
                number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
                if number in numbers:
                    return numbers[number]
    except OSError:
        return None  # ended meanwhile, or a kernel thread
    return None


def _directory(index: int) -> Path:
    return _BLOCK / f"nbd{index}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
