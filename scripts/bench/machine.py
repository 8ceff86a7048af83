"""The machine and the versions of everything measured."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import timeit
from collections.abc import Mapping
from pathlib import Path

from scripts.bench.process import run


def describe_machine(
    directory: Path, project: Path, programs: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """What a reader must know to compare with another machine; ``directory`` holds the volumes.

    ``programs`` are those beside nbdserve, by name, with the command that prints their version.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": parse_model(Path("/proc/cpuinfo").read_text(errors="replace")),
        "processors": str(os.cpu_count()),
        "memory": f"{memory / (1 << 30):.1f} GiB",
        "file system": run(
            "findmnt", "--noheadings", "--output=FSTYPE", "--target", directory
        ).strip(),
        "kernel": platform.release(),
        "Python": f"{platform.python_version()}, {platform.python_compiler()}, {_speed()}",
        "nbdserve": _revision(project),
        **{name: run(*command).splitlines()[0].strip() for name, command in programs.items()},
    }


def parse_model(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo; the architecture where it has none (ARM)."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _revision(project: Path) -> str:
    described = subprocess.run(
        ["git", "-C", str(project), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown revision"


def _speed() -> str:
    """How fast this build of Python is: builds differ by a factor of two."""
    unpack, buffer = struct.Struct(">QQQI").unpack_from, bytes(28)

    def parse() -> None:
        for _ in range(1000):
            kind, _cookie, offset, length = unpack(buffer, 0)
            if kind == 1 and offset + length <= 2:
                raise AssertionError

    return (
        f"{min(timeit.repeat(parse, number=20, repeat=9)) / 20e3 * 1e9:.0f} ns to parse a request"
    )
