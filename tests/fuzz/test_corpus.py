"""Every input of the corpus is replayed, and as many random ones: no atheris needed.

A finding is kept in ``corpus/TARGET/found-*``; what else lies there reaches the code between it.
"""

import random
from pathlib import Path

import pytest

from .seeds import TARGETS

CORPUS = Path(__file__).parent / "corpus"
RANDOM = {"handshake": 1000, "transmission": 250, "channel": 300}
INPUTS = [
    pytest.param(file.parent.name, file, id=f"{file.parent.name}/{file.name}")
    for file in sorted(CORPUS.glob("*/*"))
]


@pytest.mark.parametrize(("target", "file"), INPUTS)
def test_replay(target, file):
    TARGETS[target][0](file.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_random_inputs(target):
    run, make, change = TARGETS[target]
    for seed in range(RANDOM[target]):
        dice = random.Random(seed)
        data = make(dice)
        for _ in range(seed % 3):
            data = change(dice, data)
        try:
            run(data)
        except Exception:
            print(f"seed {seed}: {data.hex()}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_changed_can_be_run(target):
    """The mutator takes whatever atheris makes of an input."""
    run, _, change = TARGETS[target]
    for seed in range(100):
        dice = random.Random(seed)
        data = dice.randbytes(dice.randrange(60))
        run(change(dice, data))
