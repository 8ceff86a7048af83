"""`make torture`: fuzzing, power cuts and a storm for as many minutes as there are, then all faults.

What reaches new code is kept in .cache/fuzz, for the next time to go on from; an input that breaks
a rule goes to corpus/TARGET/found-…, which every test run replays from then on.
"""

import argparse
import hashlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).parent / "corpus"
GROWN = PROJECT / ".cache" / "fuzz"
SHARES = {"transmission": 0.3, "handshake": 0.15, "channel": 0.05}
POWER_CUTS_SHARE = 0.25
STORM = "tests/integration/test_hostile_clients.py::test_a_storm"
STORM_SHARE = 0.25
FAULTS = "tests/durability/test_faults.py"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    seconds = arguments.minutes * 60
    good = [fuzz(target, share * seconds, arguments.seed) for target, share in SHARES.items()]
    good.append(power_cuts(POWER_CUTS_SHARE * arguments.minutes, arguments.seed))
    good.append(storm(STORM_SHARE * seconds, arguments.seed))
    good.append(faults())
    sys.exit(0 if all(good) else 1)


def fuzz(target, seconds, seed):
    """Fuzz one target; whether nothing was found."""
    with tempfile.TemporaryDirectory(prefix="nbdserve-fuzz-") as findings:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", target, "--seconds", str(round(seconds)),
             "--seed", str(seed), "--grow", GROWN / target, "--findings", findings],
            cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", check=False,
        )  # fmt: skip
        found = [keep(target, file) for file in sorted(Path(findings).iterdir())]
    runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
    reached = re.findall(r"cov: (\d+)", done.stdout)
    print(
        f"{target}: {runs[-1] if runs else 0} inputs, {reached[-1] if reached else 0} places"
        f" reached, {len(found)} findings",
        flush=True,
    )
    if done.returncode or found:
        print(done.stdout[-6000:])
    for file in found:
        print(f"kept; to replay it: python -m tests.fuzz {target} {file.relative_to(PROJECT)}")
    return not done.returncode and not found


def keep(target, file):
    """Put an input into the corpus."""
    data = file.read_bytes()
    kept = CORPUS / target / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    kept.write_bytes(data)
    return kept


def power_cuts(minutes, seed):
    """Examine what power cuts could leave, on all processors; whether all of it was right."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.durability", "--minutes", str(minutes),
         "--seed", str(seed), "--processes", str(os.cpu_count() or 1)],
        cwd=PROJECT, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False,
    )  # fmt: skip
    return done.returncode == 0


def storm(seconds, seed):
    """Let random clients at a daemon; whether it stood that."""
    environment = {
        "NBDSERVE_STORM_SECONDS": str(round(seconds)),
        "NBDSERVE_STORM_SEED": str(seed),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--capture=no", STORM],
        cwd=PROJECT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    return done.returncode == 0


def faults():
    """Let every call fail in every way, however long that takes; whether all was right."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--numprocesses=auto", FAULTS],
        cwd=PROJECT, env={**os.environ, "NBDSERVE_FAULTS": "all"}, check=False,
    )  # fmt: skip
    return done.returncode == 0


if __name__ == "__main__":
    main()
