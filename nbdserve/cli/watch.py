"""``nbdserve status --watch``: what the daemon does, looked at again and again.

On a terminal the picture is drawn in place, on its alternate screen, as large as the terminal is;
elsewhere it is one table after the other, or with ``--json`` a line each time. A daemon that ends
is waited for: the next one is watched.

Every time the numbers are fetched; what takes the daemon longer, its volumes, for a tenth of the
time at most.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from backends.errors import StorageError, one_line
from nbdserve.cli.output import format_size, percentage, print_table
from nbdserve.cli.rates import Rates, rates_between
from nbdserve.cli.session import check_directory
from nbdserve.control import address
from nbdserve.control.client import Client, path

Document = Mapping[str, Any]

DEFAULT_SECONDS: Final = 2.0

_SHARE: Final = 10  # of the time, one part may be spent on listing volumes
_ENTER: Final = "\x1b[?1049h\x1b[?25l"  # the alternate screen, without a cursor
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_COLUMNS: Final = (
    "volume", "read/s", "write/s", "other/s", "read", "written", "p50", "p99", "in flight",
    "limited", "errors/s", "clients", "layers", "own",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What was seen at one time; ``problem`` says why it is nothing."""

    at: float
    rates: Mapping[str, Rates]
    volumes: Sequence[Document] = ()
    status: Document | None = None
    problem: str | None = None


class Watched:
    """Looks at the daemon of a data directory."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._client = Client(lambda: address.connect(data))
        self._before: Document | None = None
        self._volumes: Sequence[Document] = ()
        self._status: Document | None = None
        self._list_after = 0.0

    def look(self) -> Look:
        """Never raises for a daemon that is not there."""
        now = time.time()
        try:
            measured = self._client.get(path("measurements"))
            if self._before is None or measured["uptime"] < self._before["uptime"]:
                self._list_after = 0.0  # another daemon
            self._list()
        except (OSError, StorageError) as error:
            self._before = None
            gone = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            why = f"no daemon serves {self._data}" if gone else one_line(error)
            return Look(now, {}, problem=f"{why}; waiting for it")
        rates = rates_between(self._before, measured)
        self._before = measured
        return Look(now, rates, self._volumes, self._status)

    def _list(self) -> None:
        begun = time.monotonic()
        if begun >= self._list_after:
            self._status = self._client.get(path("status"))
            self._volumes = self._client.get(path("volumes"))["volumes"]
            ended = time.monotonic()
            self._list_after = ended + _SHARE * (ended - begun)


def watch(data: Path, seconds: float, as_json: bool) -> None:
    """Show what is seen every so many seconds, until somebody interrupts it."""
    check_directory(data)
    watched = Watched(data.absolute())
    screen = not as_json and sys.stdout.isatty()
    with contextlib.suppress(BrokenPipeError), _resized() as wake, _screen(screen):
        look = watched.look()
        while True:
            if screen:
                _draw(look, seconds)
                deadline = time.monotonic() + seconds
                while (left := deadline - time.monotonic()) > 0:
                    if select.select([wake], [], [], left)[0]:
                        os.read(wake, 4096)
                        _draw(look, seconds)
            else:
                time.sleep(seconds)
            look = watched.look()
            if not screen:
                click.echo(to_json(look) if as_json else f"{render(look)}\n")


def to_json(look: Look) -> str:
    """One line; sizes in bytes, times in seconds, no number for what is beyond all bounds."""
    exports = [
        {key: None if value == float("inf") else value for key, value in asdict(rates).items()}
        for rates in look.rates.values()
    ]
    return json.dumps(
        {
            "time": _time(look.at),
            "problem": look.problem,
            "exports": exports,
            "volumes": look.volumes,
            "status": look.status,
        }
    )


def render(look: Look, width: int | None = None, height: int | None = None) -> str:
    """As text: a table, the busiest first; no more lines and columns than given."""
    lines = [_time(look.at)]
    if look.problem is not None:
        lines.append(look.problem)
    if look.status is not None:
        lines += _describe_daemon(look.status)
    if look.problem is None:
        table = io.StringIO()
        with contextlib.redirect_stdout(table):
            print_table(_COLUMNS, _rows(look))
        rows = table.getvalue().splitlines()
        room = None if height is None else max(2, height - len(lines) - 1)
        if room is not None and len(rows) > room:
            rows = [*rows[: room - 1], f"and {len(rows) - room + 1} more"]
        lines += ["", *rows]
    printable = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "\n".join(line[:width] for line in printable)


def _rows(look: Look) -> list[list[str]]:
    volumes = {volume["name"]: volume for volume in look.volumes}
    names = sorted(
        {*volumes, *look.rates}, key=lambda name: (-look.rates.get(name, Rates(name)).iops, name)
    )
    return [_row(look.rates.get(name, Rates(name)), volumes.get(name)) for name in names]


def _row(rates: Rates, volume: Document | None) -> list[str]:
    own = None if volume is None else volume["own"]
    return [
        rates.export,
        f"{rates.read_iops:.0f}",
        f"{rates.write_iops:.0f}",
        f"{max(0.0, rates.iops - rates.read_iops - rates.write_iops):.0f}",
        f"{rates.read_bytes / 1e6:.1f} MB/s",
        f"{rates.written_bytes / 1e6:.1f} MB/s",
        format_seconds(rates.p50),
        format_seconds(rates.p99),
        str(rates.in_flight),
        f"{100 * rates.throttled:.0f} %" if rates.throttled else "-",
        f"{rates.errors:.0f}" if rates.errors else "-",
        str(rates.connections),
        "-" if volume is None else str(volume["layers"]),
        "-" if own is None else format_size(own),
    ]


def format_seconds(seconds: float | None) -> str:
    """As ``85 us``, ``1.2 ms``, ``3.5 s``; ``-`` for none."""
    if seconds is None:
        return "-"
    if seconds == float("inf"):
        return "long"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            value = seconds * factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.1f} s"


def _describe_daemon(status: Document) -> list[str]:
    workers = status["workers"]
    running = sum(worker["pid"] is not None for worker in workers)
    lines = [
        f"nbdserve {status['version']}, process {status['pid']}, {status['data']}:"
        f" {format_size(status['free'])} free of {format_size(status['total'])};"
        f" {running} of {len(workers)} worker{'' if len(workers) == 1 else 's'};"
        f" {status['volumes']} volumes, {status['snapshots']} snapshots"
    ]
    for job in status["jobs"]:
        part = f"{100 * job['done'] // job['total']} %" if job["total"] else "beginning"
        lines.append(f"{job['kind']} of {job['volume']}: {part}, {job['repository']}")
    for found in status["hydrations"]:
        lines.append(f"fetching {found['volume']}: {percentage(found)} of {found['source']}")
    return lines


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _draw(look: Look, seconds: float) -> None:
    size = os.get_terminal_size(sys.stdout.fileno())  # COLUMNS does not follow the window
    text = render(look, size.columns, size.lines - 1)
    lines = "".join(f"{line}\x1b[K\r\n" for line in text.splitlines())
    sys.stdout.write(f"\x1b[H{lines}every {seconds:g} s, Ctrl-C ends\x1b[K\x1b[J")
    sys.stdout.flush()


@contextlib.contextmanager
def _screen(wanted: bool) -> Iterator[None]:
    """The terminal's alternate screen; the terminal is as it was afterwards."""
    if not wanted:
        yield
        return
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


@contextlib.contextmanager
def _resized() -> Iterator[int]:
    """A descriptor that can be read when the terminal has another size."""
    wake, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(number: int, frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(tell, b"x")

    before = signal.signal(signal.SIGWINCH, note)
    try:
        yield wake
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(wake)
        os.close(tell)
