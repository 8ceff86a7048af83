"""nbd-conformance's connection: it never waits for ever, and loses nothing."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from scripts.conformance.connection import Connection
from scripts.conformance.verdicts import Closed, Silent, Violation

MIB = 1 << 20


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    connection = Connection(ours, 0.2, time.monotonic() + 20, [])
    yield connection, theirs
    connection.close()
    theirs.close()


def test_exactly_what_was_asked_for(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    theirs.sendall(b"one, two")
    assert connection.receive(3, "one") == b"one"
    assert connection.receive(5, "two") == b", two"


def test_nothing_is_taken_from_the_socket_that_may_belong_to_tls() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, 0.2, time.monotonic() + 20, [])
    theirs.sendall(b"ACK\x15\x03\x03")
    assert connection.receive(3, "ACK") == b"ACK"
    assert ours.recv(3) == b"\x15\x03\x03"
    connection.close()
    theirs.close()


def test_silence_and_the_end_are_told_apart(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    with pytest.raises(Silent, match="a reply"):
        connection.receive(1, "a reply")
    theirs.sendall(b"half")
    theirs.close()
    with pytest.raises(Closed, match="4 bytes"):
        connection.receive(8, "a reply")
    connection.expect_close()


def test_more_than_the_end(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    theirs.sendall(b"\x67")
    with pytest.raises(Violation, match="67"):
        connection.expect_close()


def test_what_comes_while_we_send_is_kept(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    taken = []

    def serve() -> None:
        theirs.sendall(b"r" * 4 * MIB)  # before it reads anything
        while data := theirs.recv(MIB):
            taken.append(len(data))
        theirs.sendall(b"end")

    connection.timeout = 10
    thread = threading.Thread(target=serve)
    thread.start()
    connection.send(b"s" * 4 * MIB, "4 MiB")
    connection.shut_down_sending()
    assert connection.receive(4 * MIB, "4 MiB") == b"r" * 4 * MIB
    assert connection.receive(3, "the end") == b"end"
    thread.join()
    assert sum(taken) == 4 * MIB


def test_a_server_that_takes_nothing(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    with pytest.raises(Silent, match="not taken"):
        connection.send(bytes(MIB), "1 MiB", reading=False)


def test_what_was_said_before_the_end_is_read(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    theirs.sendall(b"no")
    theirs.close()
    connection.send(bytes(MIB), "1 MiB")
    assert connection.receive(2, "an error") == b"no"
    with pytest.raises(Closed):
        connection.receive(1, "more")


def test_the_deadline_of_a_check() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, 60, time.monotonic() + 0.1, [])
    theirs.sendall(b"a")
    assert connection.receive(1, "a") == b"a"
    with pytest.raises(Silent):
        connection.receive(1, "b")
    theirs.sendall(b"c")
    with pytest.raises(Silent, match="no end"):
        connection.receive(1, "c")
    connection.close()
    theirs.close()
