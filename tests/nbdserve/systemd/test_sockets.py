"""What the environment says of passed sockets, the service manager's socket and the watchdog."""

import os
import socket

import pytest

from nbdserve.systemd.notify import take_notifier
from nbdserve.systemd.sockets import PassedSockets, take_passed_sockets
from nbdserve.systemd.watchdog import take_interval

OURS = str(os.getpid())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": OURS},
        {"LISTEN_PID": OURS, "LISTEN_FDS": "-1"},
        {"LISTEN_PID": OURS, "LISTEN_FDS": "some", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": OURS, "LISTEN_FDS": "0"},
    ],
)
def test_nothing_is_passed_to_this_process(environment: dict[str, str]) -> None:
    assert take_passed_sockets(environment).unused == []
    assert environment == {}


def test_each_socket_is_taken_once_and_can_be_given_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        key = sock.getsockname()
        passed = PassedSockets({key: sock})
        assert passed.unused == [f"127.0.0.1:{key[1]}"]
        assert passed.take(("127.0.0.1", 1)) is None
        assert passed.take(key) is sock
        assert passed.take(key) is None and passed.unused == []
        passed.give_back(sock)
        assert passed.take(key) is sock


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": OURS}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog(environment: dict[str, str], seconds: float | None) -> None:
    assert take_interval(environment) == seconds
    assert environment == {}


def test_nobody_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": "relative"}):
        take_notifier(environment).ready("here")
        assert caplog.records == [] and environment == {}
    take_notifier({"NOTIFY_SOCKET": "/absent/socket"}).ready("here")
    assert "was not told READY=1" in caplog.text


def test_the_abstract_name_space() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0nbdserve-test-{OURS}")
        take_notifier({"NOTIFY_SOCKET": f"@nbdserve-test-{OURS}"}).alive()
        assert manager.recv(100) == b"WATCHDOG=1"
