"""Rounds by hand: python -m tests.integration.power --help."""

import argparse
import random
import re
import secrets
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .machine import MachineError
from .model import WrongError
from .rounds import MAKERS, Trial

# What the client says when something is lost, and not when the machine is slow.
LOSS = re.compile("^wrong: (?!.*: no answer)", re.MULTILINE)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.integration.power", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="in all; 2")
    parser.add_argument(
        "--file-system", action="append", choices=MAKERS, help="of the guest; all, side by side"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument(
        "--broken", default="", choices=["fdatasync", "fsync"],
        help="the test of the test: this call does nothing in the daemon, which must be found",
    )  # fmt: skip
    arguments = parser.parse_args()
    kinds = arguments.file_system or list(MAKERS)
    print(f"seed {arguments.seed}, {arguments.rounds} rounds", flush=True)
    shares = [
        (kind, (arguments.rounds + len(kinds) - 1 - at) // len(kinds))
        for at, kind in enumerate(kinds)
    ]
    # Side by side: machines wait for their clients, and clients for their machines.
    with ThreadPoolExecutor(len(kinds)) as pool:
        trials = [
            pool.submit(play, kind, rounds, arguments.seed, arguments.broken)
            for kind, rounds in shares
            if rounds
        ]
    sys.exit(0 if all(trial.result() for trial in trials) else 1)


def play(kind, rounds, seed, broken):
    """One disk's rounds; whether they ended as they should. A disk with a finding is kept."""
    directory = Path(tempfile.mkdtemp(prefix=f"nbdserve-power-{kind}-"))
    began = time.monotonic()
    trial = Trial(directory, kind, random.Random(f"{seed} {kind}"), broken)
    wrong = None
    try:
        trial.play(rounds)
    except (WrongError, MachineError) as error:
        wrong = error
    finally:
        trial.close()
    counts = ", ".join(f"{name} {n}" for name, n in {**trial.counts, **trial.found}.items())
    print(f"{kind}: boots {trial.boots}, {counts}; {time.monotonic() - began:.0f} s", flush=True)
    if broken:
        good = wrong is not None and LOSS.search(str(wrong)) is not None
        print(f"with a broken {broken}: {wrong or 'nothing was found'}", flush=True)
    else:
        good = wrong is None
        if wrong:
            print(f"wrong: {wrong}")
    if good:
        shutil.rmtree(directory)
    else:
        print(
            f"kept in {directory}: the disk as it was before the last boot (before-boot) and now"
            " (durable), what the client knows (state), the daemon's logs and the consoles of all"
            " boots",
            flush=True,
        )
    return good


if __name__ == "__main__":
    main()
