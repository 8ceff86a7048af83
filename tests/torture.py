"""`make torture`: what `make test` does a little of, at length.

Fuzzing and a storm of hostile clients take as many minutes as there are; power cuts, faults and the
rest have counts. What reaches new code is kept in .cache/fuzz, for the next time to go on from; an
input that breaks a rule goes to fuzz/corpus/TARGET/found-…, which every test run replays from then
on.
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

PROJECT = Path(__file__).resolve().parents[1]
CORPUS = PROJECT / "tests" / "fuzz" / "corpus"
GROWN = PROJECT / ".cache" / "fuzz"
SHARES = {"transmission": 0.4, "handshake": 0.2, "channel": 0.1}
STORM_SHARE = 0.3


def main():
    parts = {
        "fuzz": fuzz_all,
        "storm": storm,
        "twin": twin,
        "models": models,
        "power-cuts": power_cuts,
        "bites": bites,
        "faults": faults,
        "vm": machine,
        "snapshots": snapshots,
        "protocol": protocol,
        "damage": damage,
        "store": store,
        "many-snapshots-in-a-repository": backups,
        "restarts": restarts,
        "cron": cron,
        "attach": attach,
    }
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for fuzz and storm; 10")
    parser.add_argument("--states", type=int, default=1_000_000, help="of power cuts; a million")
    parser.add_argument(
        "--rounds", type=int, default=20, help="of real power cuts, and restarts; 20"
    )
    parser.add_argument("--store-rounds", type=int, default=500, help="of store faults; 500")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--only", action="append", choices=parts, help="only this part")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    wrong = [name for name in arguments.only or parts if not parts[name](arguments)]
    print(f"wrong: {', '.join(wrong)}" if wrong else "nothing was found")
    sys.exit(1 if wrong else 0)


def fuzz_all(arguments):
    """Fuzz all targets; whether nothing was found."""
    seconds = 60 * arguments.minutes
    good = [fuzz(target, share * seconds, arguments.seed) for target, share in SHARES.items()]
    return all(good)


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


def storm(arguments):
    """Let random clients at a daemon; whether it stood that."""
    return run_test(
        "tests/integration/test_hostile_clients.py::test_a_storm",
        NBDSERVE_STORM_SECONDS=round(STORM_SHARE * 60 * arguments.minutes),
        NBDSERVE_STORM_SEED=arguments.seed,
    )


def twin(_arguments):
    """Four million random requests beside a slow, obvious twin; whether they agree."""
    return run_test("tests/nbdserve/server/test_twin.py", NBDSERVE_TWIN=18)


def models(_arguments):
    """Long random histories of volumes beside a model of them; whether they agree."""
    tests = ("tests/snapshots/test_model.py", "tests/nbdserve/workers/test_model.py")
    good = [run_test(test, NBDSERVE_MODEL=20) for test in tests]
    return all(good)


def power_cuts(arguments):
    """Examine what power cuts could leave, on all processors; whether all of it was right."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.durability", "--states", str(arguments.states),
         "--seed", str(arguments.seed), "--processes", str(os.cpu_count() or 1)],
        cwd=PROJECT, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False,
    )  # fmt: skip
    return done.returncode == 0


def bites(_arguments):
    """Put every bug in that the power cuts are to find; whether they find it."""
    return run_test("tests/durability/test_bites.py", NBDSERVE_BITES="all")


def faults(arguments):
    """Let every call fail in every way; whether all was right."""
    tests = ("tests/durability/test_faults.py", "tests/durability/test_faults_check.py")
    good = [run_test(test, NBDSERVE_FAULTS="all") for test in tests]
    return all(good)


def machine(arguments):
    """Cut off a virtual machine, and one whose daemon does not sync; whether all was right."""
    program = [sys.executable, "-m", "tests.integration.power", "--seed", str(arguments.seed)]
    ways = (
        ["--rounds", str(arguments.rounds)],
        ["--rounds", "3", "--file-system", "ext4", "--broken", "fdatasync"],
    )
    ends = [subprocess.run([*program, *way], cwd=PROJECT, check=False) for way in ways]
    return all(done.returncode == 0 for done in ends)


def snapshots(arguments):
    """As many snapshots as a volume can have, deleted in random order; whether all was right."""
    return run_test(
        "tests/integration/test_many_snapshots.py",
        NBDSERVE_SNAPSHOTS=250,
        NBDSERVE_SNAPSHOTS_SEED=arguments.seed,
    )


def protocol(arguments):
    """Run a million schedules of pushes, deletes and collections; whether all was right."""
    return run_test(
        "tests/snapshots/repository/test_protocol.py",
        NBDSERVE_SCHEDULES=30,
        NBDSERVE_SCHEDULES_SEED=arguments.seed,
    )


def damage(_):
    """Many repositories damaged at random, and restores interrupted; whether all was right."""
    tests = [f"tests/snapshots/repository/test_{name}.py"
             for name in ("verify", "losses", "repairing")]  # fmt: skip
    good = [run_test(test, NBDSERVE_VERIFY_ROUNDS=600) for test in tests]
    return all([*good, run_test("tests/snapshots/test_restoring.py", NBDSERVE_RESTORE_ROUNDS=1000)])


def store(arguments):
    """Back up to a store that misbehaves, and restore; whether all was right."""
    return run_test(
        "tests/integration/test_faulty_store.py",
        NBDSERVE_STORE_ROUNDS=arguments.store_rounds,
        NBDSERVE_STORE_SEED=arguments.seed,
    )


def backups(arguments):
    """A thousand snapshots of a volume in a repository; whether all was right."""
    return run_test(
        "tests/integration/test_many_backups.py",
        NBDSERVE_BACKUPS=1000,
        NBDSERVE_BACKUPS_SEED=arguments.seed,
    )


def restarts(arguments):
    """Restart the daemon under a guest's load, and kill it; whether the guest saw no error."""
    return run_test("tests/integration/test_restart.py", NBDSERVE_RESTARTS=arguments.rounds)


def cron(_arguments):
    """Let cron run a policy for five minutes; whether all was right."""
    return run_test("tests/integration/test_schedules.py", NBDSERVE_CRON_MINUTES=5)


def attach(_):
    """Kill and stop the daemon ten times under a host and a guest; whether they only waited."""
    return run_test("tests/integration/test_attach.py", NBDSERVE_ATTACH_RESTARTS=10)


def run_test(test, **environment):
    """Run a test that makes more of itself when the environment says so; whether it passed."""
    more = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--capture=no", test],
        cwd=PROJECT, env={**os.environ, **more}, check=False,
    )  # fmt: skip
    return done.returncode == 0


if __name__ == "__main__":
    main()
