"""The client outside: writes until the machine is gone, knows what must have survived, looks.

It runs under Debian's Python, which has libnbd, once a boot:

    client.py STATE PORT CONTROL_PORT SEED verify|load

STATE is a pickle of what must be there (none before the first boot). First everything is read and
compared; then, with ``load``, it is changed until the connections break, and STATE is written. The
standard output says what happens, a line each; ``wrong: …`` is a finding, and the exit status is 1.
"""

import collections
import contextlib
import http.client
import json
import pickle
import random
import select
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import nbd

from .model import SECTOR, Clock, Volume, WrongError, fill, read_numbers

MIB = 1 << 20
BLOCK = 4096
SIZES = {"a": 6 * MIB, "b": 4 * MIB + 5 * BLOCK, "c": 3 * MIB}
LARGEST = 12 * MIB
SNAPSHOTS = 9
CLONES = 2
IN_FLIGHT = 8
LONGEST = 256 << 10
PATIENCE = 900  # seconds: emulated machines are slow, on a busy host very


class GoneError(Exception):
    """The connection broke: the machine was killed, or the daemon has died."""


@dataclass
class State:
    """What outlives the machine."""

    clock: Clock = field(default_factory=Clock)
    volumes: dict = field(default_factory=dict)
    snapshots: list = field(default_factory=list)
    counts: collections.Counter = field(default_factory=collections.Counter)
    names: int = 0

    def next_name(self):
        self.names += 1
        return self.names


class Control:
    """The control API."""

    def __init__(self, port):
        self._port = port

    def request(self, method, path, body=None):
        """The last line of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request(
                method, f"/v1/{path}", None if body is None else json.dumps(body),
                {"Connection": "close"},
            )  # fmt: skip
            response = connection.getresponse()
            answer = response.read()
            document = json.loads(answer.splitlines()[-1])
        except TimeoutError:
            raise WrongError(f"{method} {path}: no answer in {PATIENCE} seconds") from None
        except (OSError, http.client.HTTPException, IndexError, ValueError) as error:
            raise GoneError(repr(error)) from error
        finally:
            connection.close()
        if "error" in document:
            raise WrongError(f"{method} {path}: {document}")
        return document


class Call:
    """A request to the control API in a thread of its own."""

    def __init__(self, control, *request):
        self._result = self._error = None

        def run():
            try:
                self._result = control.request(*request)
            except (GoneError, WrongError) as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def is_done(self):
        return not self._thread.is_alive()

    def result(self):
        if self._error is not None:
            raise self._error
        return self._result


class Link:
    """A volume's NBD connection, and what is in flight on it."""

    def __init__(self, volume, port, state, source):
        self.volume = volume
        self.paused = False
        self._clock, self._counts, self._source = state.clock, state.counts, source
        # Syncs are rare in some boots, so that much is lost, and frequent in others.
        self._flush_share = source.choice([0.1, 0.02, 0.005])
        self._fua_share = source.choice([0.05, 0.005, 0])
        self._writes = {}  # cookie: (time sent, sectors, FUA)
        self._flushes = {}  # cookie: time sent
        self.handle = connect(port, volume.name)
        if self.handle.get_size() != volume.size * SECTOR:
            raise WrongError(f"{volume.name}: offered with {self.handle.get_size()} bytes")

    @property
    def is_idle(self):
        return not self._writes and not self._flushes

    def issue(self):
        """Send one request, unless enough is in flight."""
        if self.paused or len(self._writes) >= IN_FLIGHT:
            return
        if self._source.random() < self._flush_share and not self._flushes:
            self._flushes[self.handle.aio_flush()] = self._clock.tick()
            return
        kind = self._source.choices(["writes", "zeroes", "trims"], [8, 1, 1])[0]
        first, count = self._choose_range(BLOCK // SECTOR if kind == "trims" else 1)
        sectors = range(first, first + count)
        if any(first < taken.stop and taken.start < sectors.stop
               for _, taken, _ in self._writes.values()):  # fmt: skip
            return
        fua = self._source.random() < self._fua_share
        flags = nbd.CMD_FLAG_FUA if fua else 0
        time = self._clock.tick()
        self.volume.send(sectors, time if kind == "writes" else 0, time)
        offset, length = first * SECTOR, count * SECTOR
        if kind == "writes":
            data = bytearray().join(fill(time, sector) for sector in sectors)
            cookie = self.handle.aio_pwrite(nbd.Buffer.from_bytearray(data), offset, flags=flags)
        elif kind == "zeroes":
            if self._source.random() < 0.5:
                flags |= nbd.CMD_FLAG_NO_HOLE
            cookie = self.handle.aio_zero(length, offset, flags=flags)
        else:
            cookie = self.handle.aio_trim(length, offset, flags=flags)
        self._writes[cookie] = (time, sectors, fua)
        self._counts[kind] += 1

    def collect(self):
        """Take in the replies that have come."""
        for cookie in [*self._writes, *self._flushes]:
            self._take(cookie)

    def give_up(self):
        """Take in what came before the connection broke."""
        for cookie in [*self._writes, *self._flushes]:
            with contextlib.suppress(nbd.Error):
                self._take(cookie)

    def _take(self, cookie):
        if not self._is_completed(cookie):
            return
        if cookie in self._flushes:
            self.volume.settle(self._clock, self._flushes.pop(cookie))
            self._counts["flushes"] += 1
            say("flushed")
            return
        time, sectors, fua = self._writes.pop(cookie)
        self._clock.acknowledged[time] = self._clock.tick()
        self._counts["acknowledged"] += 1
        if fua:
            self.volume.settle(self._clock, self._clock.now + 1, sectors)
            self._counts["fua"] += 1

    def close(self):
        self.handle.shutdown()

    def _is_completed(self, cookie):
        try:
            return self.handle.aio_command_completed(cookie)
        except nbd.Error as error:
            if self.handle.aio_is_ready() or self.handle.aio_is_processing():
                raise WrongError(f"{self.volume.name}: {error.string}") from error
            raise

    def _choose_range(self, grain):
        """First sector and their number; small ones are the most, and many in one place."""
        longest = self._source.choice([1, 8, 8, 8, 16, 40, 128, LONGEST // SECTOR])
        count = max(1, self._source.randint(1, longest) // grain) * grain
        if longest == 8 and self._source.random() < 0.7:
            count = 8
            grain = 8
        area = self.volume.size
        if self._source.random() < 0.4:
            area = min(area, MIB // SECTOR)
        count = min(count, area)
        return self._source.randint(0, (area - count) // grain) * grain, count


class Client:
    """One boot's client."""

    def __init__(self, state, port, control, source):
        self.state, self.port, self.control, self.source = state, port, control, source
        self.links = {}

    def verify(self):
        """Compare everything with what must be there; what was in doubt is known then."""
        state = self.state
        document = self.control.request("GET", "volumes")
        if document["unreadable"]:
            raise WrongError(f"unreadable: {document['unreadable']}")
        volumes = {entry["name"] for entry in document["volumes"]}
        listed = self.control.request("GET", "snapshots")["snapshots"]
        snapshots = {(entry["volume"], entry["name"]) for entry in listed}
        self._settle_names(volumes, snapshots)
        for volume in state.volumes.values():
            lost = volume.examine(self._read(volume.name), state.clock)
            state.counts["sectors that lost acknowledged writes"] += lost
            state.counts["volumes compared"] += 1
        for snapshot in state.snapshots:
            self._examine(snapshot)
        for group in {snapshot.group for snapshot in state.snapshots}:
            members = [snapshot for snapshot in state.snapshots if snapshot.group == group]
            first = max(snapshot.first for snapshot in members)
            last = min(snapshot.last for snapshot in members)
            if first >= last:
                names = ", ".join(snapshot.label for snapshot in members)
                raise WrongError(f"{names}: one has what was sent at {first}, one lacks {last}")
        self._judge(self.control.request("POST", "check", {}))
        state.counts["checks after a boot"] += 1
        say("verified")

    def load(self):
        """Change everything, until the machine is gone."""
        state = self.state
        for name, size in SIZES.items():
            if name not in state.volumes:
                volume = Volume(name, size // SECTOR, [0] * (size // SECTOR), committed=False)
                state.volumes[name] = volume
                self.control.request("POST", "volumes", {"name": name, "size": size})
                volume.committed = True
        try:
            for volume in state.volumes.values():
                self._open(volume)
            say("loading")
            self._work()
        except nbd.Error as error:  # of a connection: those of requests are WrongError
            raise GoneError(error.string) from error
        finally:
            for link in self.links.values():
                link.give_up()

    def _work(self):
        operation = None
        while True:
            for link in self.links.values():
                for _ in range(IN_FLIGHT):
                    link.issue()
            self._wait()
            for link in self.links.values():
                link.collect()
            if operation is None and self.source.random() < 0.3:
                operation = self._choose_operation()
            if operation is not None and next(operation, "done") == "done":
                operation = None

    def _wait(self):
        """Wait a moment for any connection, and let all go on."""
        handles = [link.handle for link in self.links.values()]
        writing = [h for h in handles if h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE]
        with contextlib.suppress(ValueError):  # a broken connection has no descriptor
            select.select(
                [h.aio_get_fd() for h in handles], [h.aio_get_fd() for h in writing], [], 0.02
            )
        for handle in handles:
            handle.poll(0)
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise GoneError("a connection broke")

    # Operations are generators, which the loop advances: each yields while it has to wait. What
    # would be in doubt is marked before it is asked for, and no more once it is acknowledged.

    def _choose_operation(self):
        snapshots = [s for s in self.state.snapshots if s.committed]
        clones = [v for v in self.state.volumes.values() if v.name not in SIZES]
        growing = [v for v in self.state.volumes.values() if v.size * SECTOR < LARGEST]
        volumes = list(self.state.volumes.values())
        ways = [(3, self._check)]
        if len(snapshots) < SNAPSHOTS:
            ways.append((30, lambda: self._snapshot(self.source.sample(volumes, 1))))
            ways.append((15, lambda: self._snapshot(self.source.sample(volumes, 3))))
        if snapshots:
            snapshot = self.source.choice(snapshots)
            ways.append((4 * len(snapshots), lambda: self._delete_snapshot(snapshot)))
            ways.append((8, lambda: self._roll_back(snapshot)))
            ways.append((5, lambda: self._look(snapshot)))
            if len(clones) < CLONES:
                ways.append((8, lambda: self._clone(snapshot)))
        if clones:
            ways.append((5, lambda: self._delete_volume(self.source.choice(clones))))
        if growing:
            ways.append((6, lambda: self._grow(self.source.choice(growing))))
        return self.source.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()

    def _ask(self, what, *request):
        """Ask the control API; the generator's value is the answer."""
        say(f"begins: {what}")
        call = Call(self.control, *request)
        while not call.is_done():
            yield
        answer = call.result()
        self.state.counts[what] += 1
        say(f"done: {what}")
        return answer

    def _snapshot(self, volumes):
        state = self.state
        group, asked = state.next_name(), state.clock.tick()
        taken = [v.begin_snapshot(f"s{state.next_name()}", state.clock, group) for v in volumes]
        state.snapshots += taken
        what = "group snapshots" if len(volumes) > 1 else "snapshots"
        yield from self._ask(
            what, "POST", "snapshots", {"snapshots": [snapshot.label for snapshot in taken]}
        )
        for volume, snapshot in zip(volumes, taken, strict=True):
            volume.watching.remove(snapshot)
            volume.settle(state.clock, asked)
            snapshot.committed = True

    def _delete_snapshot(self, snapshot):
        snapshot.deleting = True
        path = f"volumes/{snapshot.volume}/snapshots/{snapshot.name}"
        yield from self._ask("deletions", "DELETE", path)
        self.state.snapshots.remove(snapshot)

    def _roll_back(self, snapshot):
        volume = self.state.volumes[snapshot.volume]
        self._examine(snapshot)
        yield from self._disconnect(volume)
        volume.rolled_back = snapshot
        yield from self._ask(
            "rollbacks", "POST", f"volumes/{volume.name}/rollback",
            {"snapshot": snapshot.name, "force": True},
        )  # fmt: skip
        volume.rolled_back = None
        volume.become(snapshot.base)
        self._open(volume)

    def _look(self, snapshot):
        self._examine(snapshot)
        yield

    def _clone(self, snapshot):
        self._examine(snapshot)
        volume = Volume(f"v{self.state.next_name()}", 0, [], committed=False)
        volume.become(snapshot.base)
        self.state.volumes[volume.name] = volume
        yield from self._ask(
            "clones", "POST", "volumes", {"name": volume.name, "from": snapshot.label}
        )
        volume.committed = True
        self._open(volume)

    def _delete_volume(self, volume):
        yield from self._disconnect(volume)
        volume.deleting = True
        yield from self._ask(
            "volumes deleted", "DELETE", f"volumes/{volume.name}?with_snapshots=true"
        )
        del self.state.volumes[volume.name]
        self.state.snapshots = [s for s in self.state.snapshots if s.volume != volume.name]

    def _grow(self, volume):
        volume.larger = volume.size + self.source.randint(1, 200) * BLOCK // SECTOR
        yield from self._ask(
            "resizes", "POST", f"volumes/{volume.name}/resize", {"size": volume.larger * SECTOR}
        )
        volume.grow(volume.larger)
        volume.larger = None
        yield from self._disconnect(volume)
        self._open(volume)

    def _check(self):
        self._judge((yield from self._ask("checks under load", "POST", "check", {})))

    def _judge(self, report):
        if report["findings"]:
            raise WrongError(f"check: {report['findings']}")

    def _open(self, volume):
        self.links[volume.name] = Link(volume, self.port, self.state, self.source)

    def _disconnect(self, volume):
        link = self.links[volume.name]
        link.paused = True
        while not link.is_idle:
            yield
        del self.links[volume.name]
        link.close()

    def _settle_names(self, volumes, snapshots):
        """Compare the names with those that must and those that may be there."""
        state = self.state
        for volume in list(state.volumes.values()):
            there = volume.name in volumes
            if volume.committed and not volume.deleting and not there:
                raise WrongError(f"volume {volume.name} is gone")
            if not there:
                del state.volumes[volume.name]
                for snapshot in state.snapshots:
                    snapshot.deleting |= snapshot.volume == volume.name
            volume.committed, volume.deleting = True, False
            volume.watching.clear()
        strange = volumes - set(state.volumes)
        if strange:
            raise WrongError(f"volumes {sorted(strange)} must not be there")
        groups = {}
        for snapshot in list(state.snapshots):
            there = (snapshot.volume, snapshot.name) in snapshots
            if snapshot.committed and not snapshot.deleting and not there:
                raise WrongError(f"snapshot {snapshot.label} is gone")
            if not snapshot.committed:
                groups.setdefault(snapshot.group, set()).add(there)
            if not there:
                state.snapshots.remove(snapshot)
            elif not snapshot.committed or snapshot.deleting:
                state.counts["in doubt and there"] += 1
            snapshot.committed, snapshot.deleting = True, False
        if any(len(there) > 1 for there in groups.values()):
            raise WrongError(f"of a group of snapshots only some are there: {sorted(snapshots)}")
        strange = snapshots - {(s.volume, s.name) for s in state.snapshots}
        if strange:
            raise WrongError(f"snapshots {sorted(strange)} must not be there")

    def _examine(self, snapshot):
        snapshot.examine(self._read(snapshot.label), self.state.clock)
        self.state.counts["snapshots compared"] += 1

    def _read(self, export):
        handle = connect(self.port, export)
        data = bytearray()
        try:
            size = handle.get_size()
            while len(data) < size:
                data += handle.pread(min(MIB, size - len(data)), len(data))
            handle.shutdown()
        except nbd.Error as error:
            if not handle.aio_is_dead():
                raise WrongError(f"{export}: {error.string}") from error
            raise GoneError(str(error)) from error
        numbers = read_numbers(bytes(data))
        self.state.counts["sectors compared"] += len(numbers)
        return numbers


def connect(port, export):
    handle = nbd.NBD()
    handle.set_export_name(export)
    try:
        handle.connect_tcp("127.0.0.1", str(port))
    except nbd.Error as error:
        raise GoneError(f"{export}: {error.string}") from error
    return handle


def say(line):
    print(line, flush=True)


def main():
    path, port, control_port, seed, purpose = sys.argv[1:]
    path = Path(path)
    state = pickle.loads(path.read_bytes()) if path.exists() else State()
    client = Client(state, int(port), Control(int(control_port)), random.Random(int(seed)))
    status = 0
    try:
        client.verify()
        if purpose == "load":
            client.load()
    except WrongError as wrong:
        say(f"wrong: {wrong}")
        status = 1
    except GoneError as gone:
        say(f"gone: {gone}")
    path.write_bytes(pickle.dumps(state))
    say(f"counts: {json.dumps(state.counts)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
