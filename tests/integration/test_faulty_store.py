"""Backups to an S3 server behind a proxy that does faults; see the package faulty_store.

By default a few rounds with short outages. `make torture`, or the environment, makes it many, from
another seed:

    NBDSERVE_STORE_ROUNDS=500 NBDSERVE_STORE_SEED=7 pytest -s tests/integration/test_faulty_store.py
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .faulty_store.commands import Commands
from .faulty_store.proxy import FaultProxy
from .faulty_store.rounds import CHUNK_SIZE, Rounds
from .parts import Daemon, S3Server
from .test_backup import s3_repository

ROUNDS = int(os.environ.get("NBDSERVE_STORE_ROUNDS", "12"))
SEED = int(os.environ.get("NBDSERVE_STORE_SEED", "1"))
OUTAGE_SECONDS = 30 if "NBDSERVE_STORE_ROUNDS" in os.environ else 2


@pytest.mark.timeout(120 + 60 * ROUNDS)
def test_rounds_of_faults(
    s3_server: S3Server,
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is restored wrongly, nothing is lost, nothing is called done that is not."""
    proxy = FaultProxy(s3_server.endpoint, SEED)
    with s3_repository(s3_server) as repository:
        for name, value in (repository.env | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        daemon = start_daemon(data_directory)
        daemon.command("repo", "init", repository.url, "--chunk-size", CHUNK_SIZE)
        environment = {"NBDSERVE_DATA": str(data_directory)}
        with Commands(environment) as commands, Commands(environment) as beside:
            rounds = Rounds(
                daemon, commands, beside, proxy, s3_server, repository.url, seed=SEED,
                outage_seconds=OUTAGE_SECONDS, say=lambda line: print(line, flush=True),
                work=tmp_path,
            )  # fmt: skip
            try:
                rounds.play(ROUNDS)
            finally:
                print(f"seed {SEED}")
                for what, count in sorted(rounds.tally.items()):
                    print(f"{count:7} {what}")
                print("\n".join(proxy.summary()))
        proxy.stop()
