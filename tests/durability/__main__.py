"""``python -m tests.durability``: examine states until there are enough, or one history again."""

import argparse
import multiprocessing
import os
import secrets
import sys
import time

from .simulation import Finding, History, Tally, simulate


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.durability", description=__doc__)
    parser.add_argument("--states", type=int, default=sys.maxsize, help="how many; no end")
    parser.add_argument("--minutes", type=float, default=1e9, help="how long; no end")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--processes", type=int, default=1, help="at the same time; 1")
    parser.add_argument("--history", metavar="SEED:N", help="only this one")
    arguments = parser.parse_args()
    if "PYTHONHASHSEED" not in os.environ:
        # The order of sets is part of a history.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.durability", *sys.argv[1:]])
    if arguments.history:
        sys.exit(not report(one_history(arguments.history)))
    print(f"seed {arguments.seed}", flush=True)
    end = time.monotonic() + 60 * arguments.minutes
    share = -(-arguments.states // arguments.processes)
    work = [(f"{arguments.seed}.{n}", share, end) for n in range(arguments.processes)]
    if len(work) == 1:
        results = [many_histories(*work[0])]
    else:
        with multiprocessing.Pool(len(work)) as pool:
            results = pool.starmap(many_histories, work)
    good = [report(result) for result in results]
    sys.exit(not all(good))


def one_history(seed):
    tally = Tally()
    try:
        History(seed, tally).run()
    except Finding as finding:
        return tally, str(finding)
    return tally, None


def many_histories(seed, states, end):
    tally = Tally()
    try:
        simulate(seed, states, tally, watch(seed, tally, end))
    except Finding as finding:
        return tally, str(finding)
    return tally, None


def watch(seed, tally, end):
    """What says between two histories whether time is up, and once a minute how far it has come."""
    told = time.monotonic()

    def is_over():
        nonlocal told
        now = time.monotonic()
        if now > told + 60:
            told = now
            print(f"{seed}: {tally.states} states", file=sys.stderr, flush=True)
        return now > end

    return is_over


def report(result):
    """Print what came out; whether nothing was found."""
    tally, finding = result
    places = ", ".join(f"{count} {where}" for where, count in tally.where.most_common())
    print(
        f"power cuts: {tally.states} states ({tally.disks} different disks) of {tally.cuts} moments"
        f" in {tally.histories} histories. Where the power failed: {places}."
        f" {tally.kills} kills recovered, {tally.checks} checks",
        flush=True,
    )
    if finding is not None:
        print(finding)
        seed = finding.split()[1].rstrip(",")
        print(f"to see it again: python -m tests.durability --history {seed}")
    return finding is None


if __name__ == "__main__":
    main()
