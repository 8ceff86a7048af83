"""Look for inputs that break a target's rules, or replay some.

    python -m tests.fuzz TARGET [--runs N] [--seconds N] [--seed N] [--grow DIR] [--findings DIR]
    python -m tests.fuzz TARGET FILE...

Exit status: 0 when nothing was found; an input that broke a rule is kept below --findings.
"""

import argparse
import random
import resource
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
INSTRUMENTED = ["nbdserve.protocol", "nbdserve.server", "nbdserve.workers.channel"]
SLOWEST = 60  # seconds of one input


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=["handshake", "transmission", "channel"])
    parser.add_argument("files", nargs="*", type=Path, help="inputs to replay")
    parser.add_argument("--runs", type=int, default=-1, help="executions, beside the corpus")
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grow", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("--findings", type=Path, default=Path.cwd())
    arguments = parser.parse_args()
    if arguments.files:
        from .seeds import TARGETS  # noqa: PLC0415 - uninstrumented

        for file in arguments.files:
            TARGETS[arguments.target][0](file.read_bytes())
        return
    fuzz(arguments)


def fuzz(arguments):
    """Hand over to atheris, which ends the process."""
    try:
        import atheris  # noqa: PLC0415 - not there on every system
    except ImportError:
        sys.exit("atheris is not installed: it has wheels for CPython on Linux and x86-64 only")
    with atheris.instrument_imports(include=INSTRUMENTED):
        from .seeds import TARGETS  # noqa: PLC0415
    run, make, change = TARGETS[arguments.target]

    def mutate(data, most, seed):
        """One in three by atheris, that knows what the code compares; others keep the shape."""
        dice = random.Random(seed)
        chance = dice.random()
        if chance < 0.34:
            return atheris.Mutate(data, len(data))
        found = make(dice) if chance < 0.4 else change(dice, bytes(data))
        return found[:most]

    corpus = CORPUS / arguments.target
    # libFuzzer looks at the most that was ever resident, which a process inherits from whoever
    # started it.
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    options = [
        f"-runs={arguments.runs}",
        f"-max_total_time={arguments.seconds}",
        f"-seed={arguments.seed}",
        f"-artifact_prefix={arguments.findings}/",
        f"-timeout={SLOWEST}",
        "-max_len=4096",
        f"-rss_limit_mb={1024 + inherited}",
        "-print_final_stats=1",
        "-reload=0",
    ]
    if arguments.grow is not None:
        arguments.grow.mkdir(parents=True, exist_ok=True)
        options.append(str(arguments.grow))
    options.append(str(corpus))
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
