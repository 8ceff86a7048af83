"""A client that keeps writing until the daemon is gone, and knows what must have survived.

It runs under Debian's Python, which has libnbd, as a process of its own:

    crash_client.py STATE URI SEED NBDSERVE

The volume is divided into slots of odd sizes, so that neighbours share blocks. Each slot has one
operation in flight at most: a write of one 32-bit word over and over, or a TRIM or WRITE_ZEROES,
which makes the word 0. A slot's operations are numbered from 1; the word of a write is made from
the slot and that number, so what is found later tells which operation left it there.

STATE is a JSON file that this program reads (when it is there) and writes when the connection
breaks: for each slot all words in the order of its operations, how many operations had been issued,
the number of the last one that was acknowledged, and of the last one that an acknowledged flush or
FUA made durable; and for each snapshot
that the daemon acknowledged, the same as a range: from what was acknowledged before it was asked
for, to what had been issued when it was confirmed.
"""

import json
import random
import subprocess
import sys
import time

import nbd

SLOT_SIZES = (512, 1000, 4096, 5000, 12000, 16384, 60000, 100)
SLOTS = 400
IN_FLIGHT = 32
COMMAND_SECONDS = 0.2
SNAPSHOTS = 5  # before one is deleted for each that is taken
WORD = 4


def lay_out_slots():
    """Return (offset, length) of every slot, one behind the other."""
    slots = []
    offset = 0
    for index in range(SLOTS):
        length = SLOT_SIZES[index % len(SLOT_SIZES)]
        slots.append((offset, length))
        offset += length
    return slots


class Load:
    """The state of the slots, and the operations in flight."""

    def __init__(self, state, handle, source):
        self.words = state["words"]  # per slot: the word of each operation, [0] before the first
        self.durable = state["durable"]
        self.snapshots = state["snapshots"]
        self.acknowledged = list(self.durable)
        self.handle = handle
        self.source = source
        self.slots = lay_out_slots()
        self.busy = {}  # cookie: (slot, number, fua)
        self.flushes = {}  # cookie: what was acknowledged when the flush was sent

    def issue(self):
        """Send one operation to a slot that has none in flight."""
        taken = {slot for slot, _, _ in self.busy.values()}
        slot = self.source.randrange(SLOTS)
        if slot in taken:
            return
        offset, length = self.slots[slot]
        number = len(self.words[slot])
        fua = self.source.random() < 0.05
        flags = nbd.CMD_FLAG_FUA if fua else 0
        kind = self.source.random()
        word = 0 if kind < 0.2 else slot << 20 | number
        self.words[slot].append(word)
        if kind < 0.1 and offset % 4096 == 0 and length % 4096 == 0:
            cookie = self.handle.aio_trim(length, offset, flags=flags)
        elif word == 0:
            cookie = self.handle.aio_zero(length, offset, flags=flags)
        else:
            data = bytearray(word.to_bytes(WORD, "little") * (length // WORD))
            cookie = self.handle.aio_pwrite(nbd.Buffer.from_bytearray(data), offset, flags=flags)
        self.busy[cookie] = (slot, number, fua)

    def flush(self):
        """Send a flush; it covers what is acknowledged now."""
        cookie = self.handle.aio_flush()
        self.flushes[cookie] = list(self.acknowledged)

    def collect(self):
        """Take in the replies that have come."""
        for cookie in list(self.busy):
            if self.handle.aio_command_completed(cookie):
                slot, number, fua = self.busy.pop(cookie)
                self.acknowledged[slot] = number
                if fua:
                    self.durable[slot] = max(self.durable[slot], number)
        for cookie in list(self.flushes):
            if self.handle.aio_command_completed(cookie):
                covered = self.flushes.pop(cookie)
                self.durable[:] = map(max, self.durable, covered)

    def issued(self):
        """Return the number of the last operation sent to each slot."""
        return [len(words) - 1 for words in self.words]


def run(load, nbdserve):
    """Load the volume, with snapshots being taken and deleted, until the connection breaks."""
    command = name = before = None
    next_command = time.monotonic() + COMMAND_SECONDS
    try:
        while True:
            while len(load.busy) < IN_FLIGHT:
                load.issue()
            if not load.flushes and load.source.random() < 0.02:
                load.flush()
            load.handle.poll(100)
            load.collect()
            if command is None and time.monotonic() > next_command:
                if len(load.snapshots) < SNAPSHOTS:
                    name = f"s{time.monotonic_ns()}"
                    before = list(load.acknowledged)
                    action = "create"
                else:
                    # From now on it may be there or not.
                    name = load.source.choice(sorted(load.snapshots))
                    del load.snapshots[name]
                    before = None
                    action = "delete"
                command = subprocess.Popen(
                    [nbdserve, "snapshot", action, f"disk@{name}"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            elif command is not None and command.poll() is not None:
                if command.returncode == 0 and before is not None:
                    load.snapshots[name] = {"first": before, "last": load.issued()}
                    print("snapshot", flush=True)
                command = None
                next_command = time.monotonic() + COMMAND_SECONDS
    except nbd.Error:
        if not load.handle.aio_is_dead() and not load.handle.aio_is_closed():
            raise
        # Replies that came before the break still count.
        for cookies in (load.busy, load.flushes):
            for cookie in list(cookies):
                try:
                    load.collect()
                except nbd.Error:
                    cookies.pop(cookie, None)
    if command is not None:
        # What the last command did is not known. With the daemon gone it may have taken the
        # directory and be doing the work itself: it is killed too.
        command.kill()
        command.wait()


def main():
    """Load, then write down what must have survived."""
    path, uri, seed, nbdserve = sys.argv[1:]
    try:
        with open(path) as file:
            state = json.load(file)
    except FileNotFoundError:
        state = {"words": [[0] for _ in range(SLOTS)], "durable": [0] * SLOTS, "snapshots": {}}
    handle = nbd.NBD()
    handle.connect_uri(uri)
    print("connected", flush=True)
    load = Load(state, handle, random.Random(int(seed)))
    run(load, nbdserve)
    state["acknowledged"] = load.acknowledged
    with open(path, "w") as file:
        json.dump(state, file)


if __name__ == "__main__":
    main()
