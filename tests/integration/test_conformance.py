"""nbd-conformance finds nothing wrong with nbdserve, and what is wrong with its peers.

Which checks are skipped is said here, too: a check that is skipped unseen checks nothing.
"""

import json
import runpy
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from scripts.conformance.catalogue import CHECKS

from .parts import GIB, MIB, SCRIPTS, Daemon, require, run, serve_options

Start = Callable[..., Daemon]

NAMES = frozenset(check.name for check in CHECKS)
WRITING = frozenset(check.name for check in CHECKS if check.writes)


def named(*beginnings: str) -> frozenset[str]:
    """Checks whose names begin so."""
    for beginning in beginnings:
        assert any(name.startswith(beginning) for name in NAMES), beginning
    return frozenset(name for name in NAMES if name.startswith(beginnings))


# What nbdserve does not leave a client to try: it advertises all flags, and any byte is a block.
NEVER = named(
    "client-flags/not-advertised",
    "error-values/read-unaligned",
    "error-values/write-unaligned",
    "NBD_CMD_CACHE/not-advertised",
)
READ_ONLY = named("NBD_FLAG_READ_ONLY/")
WRITABLE = WRITING - READ_ONLY - {"NBD_CMD_WRITE/payload-is-read-past"}
FAST_ZERO = named("NBD_CMD_FLAG_FAST_ZERO/not-advertised")
LARGE = named("extended-reply-chunk-message/one-request-of-more-than-4-gib")
NOTLS = named("notls-mode/")
FORCED = named("forcedtls-mode/")
SELECTIVE = named("selectivetls-mode/")
IN_TLS = (
    named("NBD_OPT_STARTTLS/", "tls-versions/", "terminating-the-transmission-phase/tls-is-shut")
    - named("NBD_OPT_STARTTLS/with-data")
    - named("NBD_OPT_STARTTLS/without-fixed", "NBD_OPT_STARTTLS/failed-handshake")
)
OUTSIDE_TLS = named("NBD_OPT_STARTTLS/without-fixed", "NBD_OPT_STARTTLS/failed-handshake")
FORGOTTEN = named(
    "NBD_OPT_STARTTLS/structured-replies-forgotten",
    "NBD_OPT_STARTTLS/extended-headers-forgotten",
    "NBD_OPT_STARTTLS/contexts-forgotten",
)
HALF_CLOSED = named("NBD_CMD_DISC/half-closed")
ON_A_VOLUME = NEVER | READ_ONLY | FAST_ZERO


def check(uri: str, *options: str, fine: Collection[int] = (0,)) -> list[dict[str, Any]]:
    """Run nbd-conformance; its results."""
    done = run(sys.executable, SCRIPTS / "nbd-conformance", uri, "--json", *options, check=False)
    assert done.returncode in fine, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["notes"] == []
    results: list[dict[str, Any]] = document["checks"]
    assert not [result for result in results if result["verdict"] == "error"], results
    return results


def names_of(results: list[dict[str, Any]], verdict: str) -> set[str]:
    return {result["check"] for result in results if result["verdict"] == verdict}


def require_nothing_found(uri: str, skipped: Collection[str], *options: str) -> None:
    """No findings of any level, and of those selected no other checks skipped than these."""
    results = check(uri, "--strict", *options)
    assert names_of(results, "fail") == set()
    selected = {result["check"] for result in results}
    assert names_of(results, "skip") == selected & set(skipped)


def make_volume(daemon: Daemon) -> None:
    """A volume larger than the largest payload, with data and holes, changed since a snapshot."""
    for name in ("disk", "other"):
        daemon.create(name, 64 * MIB)
    daemon.take_snapshot("disk@one")
    require("qemu-io")
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 3M", "-c", "write 20M 4k", daemon.uri("disk"))
    daemon.take_snapshot("disk@two")


@pytest.fixture
def plain_daemon(start_daemon: Start, data_directory: Path) -> Daemon:
    """Return a daemon without TLS."""
    daemon = start_daemon(data_directory)
    make_volume(daemon)
    return daemon


def test_unix_socket(plain_daemon: Daemon) -> None:
    skipped = ON_A_VOLUME | LARGE | FORCED | SELECTIVE | IN_TLS | OUTSIDE_TLS
    require_nothing_found(plain_daemon.uri("disk"), skipped, "--write")


def test_tcp_without_writing(plain_daemon: Daemon) -> None:
    skipped = NEVER | WRITING | FORCED | SELECTIVE | IN_TLS | OUTSIDE_TLS
    require_nothing_found(plain_daemon.tcp_uri("disk"), skipped)


def test_read_only_snapshot(plain_daemon: Daemon) -> None:
    skipped = NEVER | WRITABLE | FORCED | SELECTIVE | IN_TLS | OUTSIDE_TLS
    require_nothing_found(plain_daemon.tcp_uri("disk@two"), skipped, "--write")


def test_volume_beyond_4_gib(start_daemon: Start, data_directory: Path) -> None:
    daemon = start_daemon(data_directory)
    daemon.create("disk", 9 * GIB)
    only = [word for name in ("BLOCK_STATUS", "4-gib", "beyond") for word in ("--only", name)]
    results = check(daemon.uri("disk"), "--write", "--strict", *only)
    assert names_of(results, "fail") == set()
    assert names_of(results, "pass") >= LARGE | named("NBD_REPLY_TYPE_BLOCK_STATUS_EXT/whole")


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_tls(start_daemon: Start, data_directory: Path, certificates: Path, mode: str) -> None:
    daemon = start_daemon(data_directory)
    make_volume(daemon)
    daemon.stop()
    daemon.arguments = (*serve_options(certificates), "--tls", mode)
    daemon.start()
    files = f"tls-certificates={certificates}"
    skipped = ON_A_VOLUME | LARGE | NOTLS | HALF_CLOSED
    skipped |= named("NBD_OPT_EXPORT_NAME/without-fixed-newstyle")
    if mode == "required":
        skipped |= SELECTIVE | FORGOTTEN
        uri = f"nbds://localhost:{daemon.port}/disk?{files}"
        require_nothing_found(uri, skipped, "--write")
    else:
        # The transmission phase in TLS is the same.
        only = [word for part in ("TLS", "tls", "NBD_OPT_") for word in ("--only", part)]
        uri = f"nbds+unix:///disk?socket={daemon.socket}&{files}"
        require_nothing_found(uri, skipped | FORCED, "--write", *only)


def test_plain_client_of_a_daemon_that_requires_tls(
    start_daemon: Start, data_directory: Path, certificates: Path
) -> None:
    daemon = start_daemon(data_directory, *serve_options(certificates))
    daemon.create("disk", MIB)
    results = check(f"nbd+unix:///disk?socket={daemon.socket}", "--write", "--strict")
    assert names_of(results, "fail") == set()
    assert names_of(results, "pass") >= FORCED | named("client-flags/unknown")


# The peers, as scripts/conformance-table starts them


@pytest.mark.parametrize(
    ("name", "defects"),
    [
        (
            "nbdkit",
            {
                "NBD_CMD_FLAG_FAST_ZERO/not-advertised": "MUST",  # the whole server is gone
                "NBD_OPT_SET_META_CONTEXT/unknown-export": "RULE",
                "structured-reply-chunk-message/errors-have-a-text": "RULE",
            },
        ),
        (
            "qemu-nbd",
            {
                "error-values/write-beyond": "SHOULD",
                "request-message/wrong-magic": "RULE",
                "NBD_CMD_FLUSH/reserved-fields": "RULE",
                "NBD_CMD_DISC/outstanding-writes-are-answered": "MUST",
            },
        ),
        (
            "nbd-server",
            {
                "NBD_OPT_INFO-and-NBD_OPT_GO/malformed-info": "MUST",
                "NBD_OPT_ABORT/acknowledged": "MUST",
                "NBD_OPT_INFO-and-NBD_OPT_GO/info-then-go": "MUST",  # INFO says size 0
                "error-values/flag-of-another-command": "SHOULD",
            },
        ),
    ],
)
def test_defects_of_a_peer(name: str, defects: dict[str, str], data_directory: Path) -> None:
    table = runpy.run_path(str(SCRIPTS / "conformance-table"), run_name="table")
    server = next(server for server in table["SERVERS"] if server.name == name)
    require("setpriv", str(server.program))
    only = [word for defect in defects for word in ("--only", defect)]
    directory = data_directory.parent
    with server.start(directory, None) as running:
        uri = f"nbd+unix:///{table['EXPORT']}?socket={running.where}"
        results = check(uri, "--write", "--timeout", "2", *only, fine=(0, 1))
    found = {result["check"]: result["level"] for result in results if result["verdict"] == "fail"}
    assert found == {**found, **defects}
