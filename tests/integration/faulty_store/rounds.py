"""Rounds of backup, restore, delete and collect over a store that misbehaves.

The model knows what each volume holds, and of each snapshot in the repository what it must restore
to. After every command the store is asked, directly and with no request under way any more, which
snapshots there are:

* a command that says that it is done did what it was told, and nothing else changed;
* one that failed or was killed did it or did not: its snapshot is absent, or there in whole;
* what is there and was not before restores to exactly what was pushed.

A restore, lazy or not, or an export that succeeds has exactly the model's bytes. In between, and at
the end, everything that was acknowledged and not deleted is restored and compared. At the end
collections also have to remove all that nothing needs.
"""

import asyncio
import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from unittest import mock

from nbdserve.control.client import path
from snapshots.repository import open_repository
from snapshots.repository.holdings import read_outcome
from snapshots.repository.layout import OUTCOMES, parse_push_key
from tests.integration.parts import KIB, MIB
from tests.nbdserve.server.nbd_client import FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Client
from tests.snapshots.repository.model import ModelSink

VOLUMES = {"small": 2 * MIB + 4 * KIB, "middle": 5 * MIB, "large": 9 * MIB}
CHUNK_SIZE = "4K"
PIECE = 1 * MIB
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
KILLED = 0.15  # share of the rounds whose command is killed
AFRESH = 0.1  # share of the commands that are not forked
OUTAGES = 0.03  # share of the rounds with an outage
MOST_STORED = 24  # snapshots in the repository, about
LOCAL = 3  # snapshots of a volume in the data directory
CHECK_EVERY = 25  # rounds
MOST_COLLECTIONS = 8  # until nothing changes any more


class WrongError(AssertionError):
    """The product broke a promise."""


class Rounds:
    """Plays rounds; ``say`` is called with lines for people."""

    def __init__(self, daemon, commands, beside, proxy, server, url, *,
                 seed, outage_seconds, say, work):  # fmt: skip
        self.daemon = daemon
        self.commands = commands
        self.beside = beside
        self.proxy = proxy
        self.url = url
        self.say = say
        self.work = work
        self.seed = seed
        self.outage_seconds = outage_seconds
        self.dice = random.Random(seed)
        self.volumes = {name: bytearray(size) for name, size in VOLUMES.items()}
        self.local = {}  # label -> content, of snapshots in the data directory, oldest first
        self.ages = {}  # label -> number, ascending with the time of the snapshot
        self.stored = {}  # label -> content, of snapshots that must be in the repository
        self.tally = Counter()
        self.lazies = 0
        self.late = []  # lazy volumes of commands that were killed, or failed
        self.names = 0
        with mock.patch.dict(os.environ, server.env):
            self.direct = open_repository(url)

    # Playing

    def play(self, rounds):
        """Play so many rounds, then check everything and collect until nothing is left over."""
        for name, size in VOLUMES.items():
            self.daemon.create(name, size)
        began = time.monotonic()
        for number in range(rounds):
            self.play_round(number)
            if number % CHECK_EVERY == CHECK_EVERY - 1:
                self.check_all()
                self.say(
                    f"round {number + 1} of {rounds}, {time.monotonic() - began:.0f} s,"
                    f" {len(self.stored)} snapshots: all right"
                )
        self.finish()

    def play_round(self, number):
        """One command, with faults; perhaps killed, perhaps with another beside it."""
        dice = self.dice
        play = self._pick_play()
        rate = dice.choice(RATES)
        # What is garbled three times in a row is damaged, for all that verify can tell.
        self.proxy.begin(min(rate, 0.1) if play == self.verify else rate, number)
        if dice.random() < OUTAGES:
            self.proxy.begin_outage(self.outage_seconds, refuse=dice.random() < 0.5)
        self.tally[f"{play.__name__}"] += 1
        try:
            play()
        except WrongError as error:
            raise WrongError(f"seed {self.seed}, round {number}: {error}") from error
        finally:
            self.proxy.calm()

    def _pick_play(self):
        plays = {
            self.push: 16,
            self.push_again: 8,
            self.backup: 14,
            self.restore: 12,
            self.export: 8,
            self.delete: 8 if len(self.stored) < MOST_STORED else 40,
            self.prune: 5,
            self.collect: 12,
            self.verify: 8,
            self.list: 5,
            self.restore_lazily: 4,
        }
        if not self.stored:
            return self.push
        return self.dice.choices(list(plays), list(plays.values()))[0]

    # The plays

    def push(self):
        """Change a volume, take a snapshot, push it."""
        volume = self.dice.choice(list(VOLUMES))
        self.change(volume)
        self.names += 1
        label = f"{volume}@s{self.names}"
        self.daemon.take_snapshot(label)
        self.local[label] = bytes(self.volumes[volume])
        self.ages[label] = self.names
        self._push(label)
        older = [label for label in self.local if label.startswith(f"{volume}@")]
        for old in older[:-LOCAL]:
            self._delete_local(old)

    def push_again(self):
        """Push a snapshot that is still here: half done, done, or deleted in the repository."""
        if self.local:
            self._push(self.dice.choice(list(self.local)))

    def _push(self, label):
        content = {label: self.local[label]}
        ended = self.run("repo", "push", label, self.url)
        self.settle(ended, adds=content)

    def backup(self):
        """Change volumes and back them up; sometimes with a rule that deletes older backups."""
        volumes = self.dice.sample(list(VOLUMES), self.dice.randint(1, 2))
        for volume in volumes:
            self.change(volume)
        keep = self.dice.choice((0, 0, 2, 3))
        ended = self.run(
            "backup", *volumes, "--repo", self.url, *(["--keep-last", keep] if keep else []),
            "--json",
        )  # fmt: skip
        contents = {volume: bytes(self.volumes[volume]) for volume in volumes}
        deletes = set()
        for volume in volumes if keep else ():
            backups = self.by_age(f"{volume}@backup-")
            deletes.update(backups[: len(backups) - keep + 1])
        if ended.done:
            reports = ended.json()["backups"]
            adds = {f"{it['volume']}@{it['snapshot']}": contents[it["volume"]] for it in reports}
            gone = {
                f"{it['volume']}@{one['snapshot']}"
                for it in reports if keep
                for one in it["prune"]["snapshots"] if one["action"] == "delete"
            }  # fmt: skip
            if len(adds) != len(volumes) or not gone <= deletes:
                raise WrongError(f"{ended}\ndeleted {gone}, allowed were {deletes}")
            self.settle(ended, adds=adds, deletes=gone)
        else:
            self.settle(ended, backups=contents, deletes=deletes)

    def restore(self):
        """Restore a snapshot as a new volume; compare every byte."""
        label = self.dice.choice(list(self.stored))
        ended = self.run("repo", "restore", self.url, label, "restored")
        there = self._exists("restored")
        if ended.done and not there:
            raise WrongError(f"{ended}\nthere is no new volume")
        if there:
            if not ended.done and not ended.killed:
                raise WrongError(f"{ended}\nyet there is a new volume")
            self._compare_volume("restored", label)
            self._delete_volume("restored")
        self.settle(ended)

    def export(self):
        """Write a snapshot to a file; compare every byte."""
        label = self.dice.choice(list(self.stored))
        file = self.work / "exported"
        ended = self.run("repo", "export", self.url, label, file, "--format", "raw")
        if ended.done or file.exists():
            if file.read_bytes() != self.stored[label]:
                raise WrongError(f"{ended}\nthe file is not what {label} holds")
            file.unlink()
        for left in self.work.glob(".nbdserve-*"):
            if not ended.killed:
                raise WrongError(f"{ended}\nleft {left.name}")
            left.unlink()
        self.settle(ended)

    def delete(self):
        """Delete a snapshot, mostly an old one."""
        label = self.dice.choice(list(self.stored))
        self.settle(self.run("repo", "delete", self.url, label), deletes={label})

    def prune(self):
        """Delete all but the newest snapshots of a volume."""
        volume = self.dice.choice([label.partition("@")[0] for label in self.stored])
        keep = self.dice.randint(2, 6)
        allowed = set(self.by_age(f"{volume}@")[:-keep])
        ended = self.run("repo", "prune", self.url, volume, "--keep-last", keep, "--json")
        deletes = allowed
        if ended.done:
            decisions = ended.json()["snapshots"]
            deletes = {
                f"{volume}@{one['snapshot']}" for one in decisions if one["action"] == "delete"
            }
            if not deletes <= allowed:
                raise WrongError(f"{ended}\ndeleted {deletes - allowed} against the rule")
        self.settle(ended, deletes=deletes)

    def collect(self):
        """Free space; pushes that were killed are given up or not."""
        after = self.dice.choice(("7d", "7d", "0s"))
        self.settle(self.run("repo", "gc", self.url, "--give-up-after", after))
        for label in self.dice.sample(list(self.stored), min(2, len(self.stored))):
            self.check(label)

    def verify(self):
        """Verify all; nothing may be called damaged, for nothing is."""
        deep = self.dice.choice(([], ["--deep"]))
        ended = self.run("repo", "verify", self.url, *deep)
        if "damaged object" in ended.errors:
            sound = not self.direct.verify(deep=True).damaged
            raise WrongError(f"{ended}\n{ended.output}\nthe store is sound: {sound}")
        self.settle(ended)

    def list(self):
        """List all snapshots."""
        ended = self.run("repo", "list", self.url, "--json")
        if ended.done and "warning" not in ended.errors:
            listed = {f"{it['volume']}@{it['snapshot']}" for it in ended.json()["snapshots"]}
            if listed != self.stored.keys():
                wrong = listed ^ self.stored.keys()
                raise WrongError(f"{ended}\nwrongly listed, or not listed: {wrong}")
        self.settle(ended)

    def restore_lazily(self):
        """Restore lazily, read through the faults, then fetch the rest without."""
        label = self.dice.choice(list(self.stored))
        rate = self.dice.choice(("0", "1M", "unlimited"))
        self.delete_late()
        self.lazies += 1
        lazy = f"lazy-{self.lazies}"
        ended = self.run("repo", "restore", self.url, label, lazy, "--lazy", "--rate", rate)
        if not self._exists(lazy):
            if ended.done:
                raise WrongError(f"{ended}\nthere is no new volume")
            self.late.append(lazy)
            self.settle(ended)
            return
        content, expected = self.read(lazy, may_fail=True), self.stored[label]
        for at, piece in content.items():
            if piece is None:
                self.tally["lazy reads that failed"] += 1
            elif piece != expected[at : at + len(piece)]:
                raise WrongError(f"{label} at {at} is read wrongly from a lazy volume")
        self.proxy.calm()
        hydrated = self.commands.run("volume", "hydrate", lazy, "--rate", "unlimited", "--wait")
        if not hydrated.done:
            raise WrongError(f"after the faults: {hydrated}")
        self._compare_volume(lazy, label)
        self._delete_volume(lazy)
        self.settle(ended)

    def delete_late(self):
        """The daemon goes on when a command is killed: delete what it made then."""
        for volume in self.late:
            if self._exists(volume):
                self.tally["volumes made after the command was killed"] += 1
                self._delete_volume(volume)

    # What the plays are made of

    def run(self, *arguments):
        """Run a command, which may be killed, or have a collection beside it."""
        dice = self.dice
        kill_after = dice.choice((0.2, 0.6, 2.0)) * dice.random()
        kill_after = kill_after if dice.random() < KILLED else None
        afresh = dice.random() < AFRESH
        with self._something_beside(dice.random() < 0.1):
            ended = self.commands.run(*arguments, kill_after=kill_after, afresh=afresh)
        self.look_at(ended)
        return ended

    def look_at(self, ended):
        """Whether a command ended as one may: done, killed, or failed with a line that says why."""
        how = "done" if ended.done else "killed" if ended.killed else "failed"
        self.tally[f"commands that were {how}"] += 1
        if ended.done or ended.killed:
            return
        lines = ended.errors.splitlines()
        if (
            ended.status != 1
            or "Traceback" in ended.errors
            or "internal error" in ended.errors
            or not lines
            or not lines[-1].startswith("nbdserve: ")
        ):
            raise WrongError(str(ended))
        self.tally[_kind_of(lines[-1])] += 1

    @contextmanager
    def _something_beside(self, wanted):
        """Another host's collection at the same time."""
        if not wanted:
            yield
            return
        with self.beside.background("repo", "gc", self.url) as finish:
            yield
            self.look_at(finish())
        self.tally["collections beside a command"] += 1

    def settle(self, ended, *, adds=None, backups=None, deletes=()):
        """See which snapshots there are now, and whether these may be there; see the module's text.

        ``adds`` are contents by label. ``backups`` are contents by volume, of snapshots whose names
        are not known. ``deletes`` are labels.
        """
        self.proxy.calm()
        adds, backups = adds or {}, backups or {}
        there = {summary.label for summary in self.direct.list()}
        needed = (self.stored.keys() - set(deletes)) | (adds.keys() if ended.done else set())
        allowed = self.stored | adds
        for label in there - allowed.keys():
            volume, _, name = label.partition("@")
            if volume in backups and name.startswith("backup-"):
                allowed[label] = backups[volume]
        if not needed <= there:
            raise WrongError(f"{ended}\nlost {', '.join(needed - there)}")
        if not there <= allowed.keys():
            raise WrongError(f"{ended}\nnobody pushed {', '.join(there - allowed.keys())}")
        if ended.done and there & set(deletes):
            raise WrongError(f"{ended}\nnot deleted: {', '.join(there & set(deletes))}")
        fresh = there - self.stored.keys()
        self.stored = {label: allowed[label] for label in sorted(there)}
        for label in sorted(fresh):
            if label not in self.ages:
                self.names += 1
                self.ages[label] = self.names
            self.check(label)
        if not ended.done and fresh:
            self.tally["failed or killed, yet committed"] += 1

    def by_age(self, prefix):
        """Return labels in the repository, oldest first."""
        found = [label for label in self.stored if label.startswith(prefix)]
        return sorted(found, key=self.ages.__getitem__)

    def check(self, label):
        """Restore a snapshot directly, and compare."""
        content = self.stored[label]
        sink = ModelSink(len(content))
        volume, _, name = label.partition("@")
        self.direct.restore(volume, name, sink)
        if sink.data != content:
            raise WrongError(f"{label} restores wrongly")
        self.tally["snapshots compared"] += 1

    def check_all(self):
        """Check every snapshot."""
        for label in self.stored:
            self.check(label)

    def finish(self):
        """Collect until nothing changes; then everything is sound and nothing is left over."""
        self.proxy.calm()
        self.delete_late()
        self.check_all()
        before = None
        for _ in range(MOST_COLLECTIONS):
            self.direct.collect(0.0)
            sizes = dict(self.direct.store.list(""))
            if sizes == before:
                break
            before = sizes
        else:
            raise WrongError("collections find no end")
        damaged = self.direct.verify(deep=True).damaged
        if damaged:
            raise WrongError(f"damaged: {damaged}")
        self.check_all()
        left = self.unneeded(sizes)
        if left:
            raise WrongError(f"not needed, and not collected: {sorted(left)}")

    def unneeded(self, sizes):
        """Return the keys of objects that nothing needs: no restore asks for them."""
        asked = set()
        store = self.direct.store
        get, get_range = store.get, store.get_range

        def noting_get(key, limit):
            asked.add(key)
            return get(key, limit)

        def noting_get_range(key, offset, length):
            asked.add(key)
            return get_range(key, offset, length)

        with (
            mock.patch.object(store, "get", noting_get),
            mock.patch.object(store, "get_range", noting_get_range),
        ):
            self.check_all()
        # Tombstones and ABORTED stay for ever, so that what is dead stays dead; a few bytes each.
        left = sizes.keys() - asked - {"config"}
        left = {key for key in left if not key.startswith("tombstones/")}
        return {key for key in left if not self._is_aborted(key)}

    def _is_aborted(self, key):
        push = parse_push_key(OUTCOMES, key)
        if push is None:
            return False
        outcome, _ = read_outcome(self.direct.store, self.direct.config, push)
        return outcome.root is None and not outcome.repacked

    # Volumes

    def change(self, volume):
        """Write, trim and zero at random, then FLUSH."""
        content, dice = self.volumes[volume], self.dice

        async def work():
            client = await Client.connect(str(self.daemon.socket), volume)
            for _ in range(dice.choice((0, 1, 3, 12))):
                length = min(dice.randint(1, 40) * dice.choice((512, 4 * KIB)), len(content))
                offset = dice.randrange((len(content) - length) // 512 + 1) * 512
                kind = dice.choice((WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES))
                data = _make_data(dice, length) if kind == WRITE else b""
                reply = await client.call(kind, offset, length, data=data)
                assert not reply.error
                content[offset : offset + length] = data or bytes(length)
            assert not (await client.call(FLUSH)).error
            client.close()

        asyncio.run(work())

    def read(self, volume, may_fail=False):
        """Return the content of a volume, by offset; None where reading failed."""

        async def work():
            found = {}
            client = await Client.connect(str(self.daemon.socket), volume)
            size = self.daemon.control().get(path("volumes", volume))["size"]
            for at in range(0, size, PIECE):
                reply = await client.call(READ, at, min(PIECE, size - at))
                assert may_fail or not reply.error
                found[at] = None if reply.error else reply.data
            client.close()
            return found

        return asyncio.run(work())

    def _compare_volume(self, volume, label):
        if b"".join(self.read(volume).values()) != self.stored[label]:
            raise WrongError(f"{label} was restored wrongly")
        self.tally["volumes compared"] += 1

    def _exists(self, volume):
        listed = self.daemon.control().get(path("volumes"))["volumes"]
        return volume in {found["name"] for found in listed}

    def _delete_volume(self, volume):
        self.daemon.control().delete(path("volumes", volume))

    def _delete_local(self, label):
        del self.local[label]
        volume, _, name = label.partition("@")
        where = path("volumes", volume, "snapshots", name)
        with self.daemon.control().stream("DELETE", where) as answer:
            for _ in answer.lines():
                pass


def _make_data(dice, length):
    if dice.random() < 0.5:
        return dice.randbytes(length)
    return (b"%016x" % dice.getrandbits(64) * (length // 16 + 1))[:length]


def _kind_of(line):
    """Return what failures are counted by: the line without what differs."""
    words = ("give", "damaged", "connection broke", "did not answer", "keeps failing", "connect",
             "refused", "not known", "pushed by somebody", "gone on with", "no longer",
             "is missing", "does not answer as S3", "digest", "nothing was collected")  # fmt: skip
    found = [word for word in words if word in line]
    return f"failed: {found[-1] if found else line}"
