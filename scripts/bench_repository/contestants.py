"""The programs that are compared: nbdserve, restic and borg, each with a repository of its own.

All start with what they compress with by default. restic always encrypts; nbdserve is therefore
there with encryption, too; borg does not encrypt here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nbdserve.control import address
from nbdserve.control.client import Client as Control
from nbdserve.control.client import path
from scripts.bench.client import Client
from scripts.bench.process import BenchError
from scripts.bench.scale import BLOCK
from scripts.bench.servers import NBDSERVE, Nbdserve
from scripts.bench_repository.disk import PIECE, Disk
from scripts.bench_repository.measuring import Cost, measure
from scripts.bench_repository.stores import Place
from snapshots.repository import init_repository
from snapshots.repository.secret import passphrase

PASSPHRASE = "a passphrase for the benchmark"

Check = Callable[[int, bytes], None]
"""Called with an offset and what a restored disk has there."""


class Contestant(Protocol):
    """One program with one repository at a time.

    ``begin`` makes a new repository, which the steps then use in their order, and ``end`` removes
    it. A step is named by what it pushed as, or is to act on.
    """

    name: str

    def begin(self, place: Place) -> None: ...
    def end(self) -> None: ...
    def push(self, snapshot: str) -> Cost: ...
    def restore(self, snapshot: str, check: Check | None) -> Cost: ...
    def first_byte(self, snapshot: str, offset: int) -> Cost | None: ...
    def delete(self, snapshot: str) -> Cost: ...
    def collect(self) -> Cost: ...
    def stored(self) -> int: ...


class _Base:
    def __init__(self, name: str, disk: Disk, scratch: Path) -> None:
        self.name = name
        self.disk = disk
        self.scratch = scratch / name.replace(" ", "-").replace(",", "")
        self.place = Place("", "", None)

    def begin(self, place: Place) -> None:
        self.place = place
        self.scratch.mkdir()

    def end(self) -> None:
        self.place.remove()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def stored(self) -> int:
        return self.place.stored()

    def first_byte(self, snapshot: str, offset: int) -> Cost | None:
        return None

    def _check_file(self, file: Path, check: Check | None) -> None:
        if check is not None:
            with file.open("rb") as restored:
                for offset in range(0, self.disk.size, PIECE):
                    check(offset, restored.read(PIECE))
        file.unlink()


class OfNbdserve(_Base):
    """``repo push`` and so on, beside a running daemon; snapshots of the disk's volume."""

    def __init__(self, name: str, disk: Disk, scratch: Path, *, encrypted: bool = False) -> None:
        super().__init__(name, disk, scratch)
        self._encrypted = encrypted
        self._environment: dict[str, str] = {}

    def begin(self, place: Place) -> None:
        super().begin(place)
        secret = None
        if self._encrypted:
            named = self.scratch / "passphrase"
            named.write_text(PASSPHRASE + "\n")
            self._environment = {"NBDSERVE_PASSPHRASE_FILE": str(named)}
            secret = passphrase(PASSPHRASE, "it")
        init_repository(place.url, secret=secret)

    def push(self, snapshot: str) -> Cost:
        return self._measure("push", f"{self.disk.volume}@{snapshot}", self.place.url)

    def restore(self, snapshot: str, check: Check | None) -> Cost:
        cost = self._restore(snapshot)
        with Client(self.disk.ours.socket, "restored") as client:
            for offset in range(0, self.disk.size, PIECE) if check else ():
                assert check is not None
                check(offset, client.read(offset, min(PIECE, self.disk.size - offset)))
        delete_volume(self.disk.ours, "restored")
        return cost

    def first_byte(self, snapshot: str, offset: int) -> Cost | None:
        if self._encrypted:  # the daemon would have to know the passphrase
            return None
        cost = self._restore(snapshot, "--lazy")
        begin = time.monotonic()
        with Client(self.disk.ours.socket, "restored") as client:
            client.read(offset, BLOCK)
            seconds = cost.seconds + time.monotonic() - begin
        delete_volume(self.disk.ours, "restored")
        return Cost(seconds, cost.cpu, cost.peak, cost.others)

    def delete(self, snapshot: str) -> Cost:
        return self._measure("delete", self.place.url, f"{self.disk.volume}@{snapshot}")

    def collect(self) -> Cost:
        return self._measure("gc", self.place.url)

    def _restore(self, snapshot: str, *options: str) -> Cost:
        label = f"{self.disk.volume}@{snapshot}"
        return self._measure("restore", self.place.url, label, "restored", *options)

    def _measure(self, verb: str, *arguments: str) -> Cost:
        ours = self.disk.ours
        # What has to do with the bucket alone takes no data directory.
        data = ["--data", str(ours.data)] if verb in ("push", "restore") else []
        command = [str(NBDSERVE), "repo", verb, *arguments, *data]
        return measure(*command, environment=self._environment, daemon=ours.pid)[0]


class Restic(_Base):
    """restic on the raw image, as a file, or from its standard input."""

    def __init__(self, name: str, disk: Disk, scratch: Path, *, stdin: bool = False) -> None:
        super().__init__(name, disk, scratch)
        self._stdin = stdin
        self._ids: dict[str, str] = {}
        self._environment: dict[str, str] = {}

    def begin(self, place: Place) -> None:
        super().begin(place)
        self._ids.clear()
        self._environment = {
            "RESTIC_REPOSITORY": place.restic,
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(self.scratch / "cache"),
        }
        measure("restic", "init", environment=self._environment)

    def push(self, snapshot: str) -> Cost:
        image = self.disk.image
        words = ["backup", "--json", "--quiet"]
        if self._stdin:
            words += ["--stdin", "--stdin-filename", image.name]
        else:
            words.append(image.name)
        cost, output = measure(
            "restic",
            *words,
            environment=self._environment,
            directory=image.parent,
            stdin=image if self._stdin else None,
        )
        try:
            self._ids[snapshot] = json.loads(output.splitlines()[-1])["snapshot_id"]
        except (LookupError, ValueError) as error:
            raise BenchError(f"restic backup: no snapshot in {output[-300:]!r}") from error
        return cost

    def restore(self, snapshot: str, check: Check | None) -> Cost:
        id_, target = self._ids[snapshot], self.scratch / "restored"
        target.mkdir()
        file = target / self.disk.image.name
        if self._stdin:
            cost, _ = measure("restic", "dump", id_, file.name,
                              environment=self._environment, stdout=file)  # fmt: skip
        else:
            cost, _ = measure("restic", "restore", "--quiet", "--target", target, id_,
                              environment=self._environment)  # fmt: skip
            # It is below the directories that it was in.
            (file,) = target.rglob(self.disk.image.name)
        self._check_file(file, check)
        shutil.rmtree(target)
        return cost

    def delete(self, snapshot: str) -> Cost:
        return self._measure("forget", self._ids[snapshot])

    def collect(self) -> Cost:
        return self._measure("prune")

    def _measure(self, *words: str) -> Cost:
        return measure("restic", *words, "--quiet", environment=self._environment)[0]


class Borg(_Base):
    """borg on the raw image, without encryption."""

    def __init__(self, name: str, disk: Disk, scratch: Path) -> None:
        super().__init__(name, disk, scratch)
        self._environment: dict[str, str] = {}

    def begin(self, place: Place) -> None:
        super().begin(place)
        self._environment = {
            "BORG_REPO": str(place.directory),
            "BORG_BASE_DIR": str(self.scratch / "base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self._measure("init", "--encryption=none")

    def push(self, snapshot: str) -> Cost:
        image = self.disk.image
        return self._measure("create", f"::{snapshot}", image.name, directory=image.parent)

    def restore(self, snapshot: str, check: Check | None) -> Cost:
        target = self.scratch / "restored"
        target.mkdir()
        cost = self._measure("extract", "--sparse", f"::{snapshot}", directory=target)
        self._check_file(target / self.disk.image.name, check)
        target.rmdir()
        return cost

    def delete(self, snapshot: str) -> Cost:
        return self._measure("delete", f"::{snapshot}")

    def collect(self) -> Cost:
        return self._measure("compact")

    def _measure(self, *words: str, directory: Path | None = None) -> Cost:
        return measure("borg", *words, environment=self._environment, directory=directory)[0]


def delete_volume(ours: Nbdserve, volume: str) -> None:
    """Delete a volume that has no snapshots, through the control socket."""
    Control(lambda: address.connect(ours.data)).delete(path("volumes", volume))
