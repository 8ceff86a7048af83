"""Who may come in: access lists, places, and what a crowd of silent clients cannot do."""

import asyncio
import contextlib
import os
import struct
import sys
from ipaddress import ip_address, ip_network

import pytest

from nbdserve.protocol.handshake import TlsMode
from nbdserve.server import Server, entrance
from nbdserve.server.entrance import LINES, AccessList, Entrance
from nbdserve.server.identity import Identity
from nbdserve.server.tls import load_tls

from .certificates import client_context, make_certificates
from .harness import serve, settle
from .memory_export import MemoryExport, MemoryRegistry
from .nbd_client import DISC, READ, option, request, string

GREETING = 18
FLAGS = struct.pack(">I", 3)


class Someone:
    """A visitor."""

    def __init__(self, address=None, user=None):
        address = None if address is None else ip_address(address)
        self.identity = Identity(f"{address} {user}", address, user)
        self.aborted = False

    def abort(self):
        self.aborted = True


def in_loop(test):
    async def main():
        test()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("networks", "address", "admitted"),
    [
        (["10.0.0.0/8"], "10.255.0.1", True),
        (["10.0.0.0/8"], "11.0.0.1", False),
        (["10.0.0.0/8"], "fd00::1", False),
        (["192.0.2.1"], "192.0.2.1", True),
        (["192.0.2.1"], "192.0.2.2", False),
        (["10.0.0.0/8", "fd00::/8"], "fd12::1", True),
        (["fd00::/8"], "fe80::1", False),
        (["fd00::/8"], "10.0.0.1", False),
        (["::/0"], "10.0.0.1", False),
        (["0.0.0.0/0"], "10.0.0.1", True),
    ],
)
def test_networks(networks, address, admitted):
    access = AccessList(tuple(map(ip_network, networks)))
    assert access.admits(Someone(address).identity) is admitted
    assert not access.admits(Someone(user=0).identity)


def test_users():
    access = AccessList(users=frozenset({0, 7}))
    assert access.admits(Someone(user=7).identity)
    assert access.admits(Someone(user=0).identity)
    assert not access.admits(Someone(user=8).identity)
    assert not access.admits(Someone("10.0.0.1").identity)
    assert AccessList().admits(Someone(user=8).identity)


def test_silent_clients_lose_their_places_and_others_do_not():
    @in_loop
    def test():
        door = Entrance("here", max_connections=8)
        settled = [Someone("192.0.2.1") for _ in range(3)]
        for one in settled:
            assert door.enter(one)
            door.settle(one)
        honest = Someone("192.0.2.2")
        assert door.enter(honest)
        silent = [Someone("203.0.113.9") for _ in range(50)]
        for one in silent:
            assert door.enter(one)
        # They took each other's places, the oldest first, and the newcomers' too.
        assert [one.aborted for one in silent] == [True] * 46 + [False] * 4
        assert not honest.aborted
        other = Someone("192.0.2.3")
        assert door.enter(other)
        assert silent[46].aborted and not honest.aborted
        for one in (honest, other):
            door.settle(one)
        for _ in range(10):
            assert door.enter(Someone("203.0.113.9"))
        assert not any(one.aborted for one in (*settled, honest, other))


def test_clients_with_open_exports_keep_all_places():
    @in_loop
    def test():
        door = Entrance("here", max_connections=2)
        first, second, third = Someone(user=1), Someone(user=1), Someone(user=2)
        for one in (first, second):
            assert door.enter(one)
            door.settle(one)
        assert not door.enter(third)
        door.leave(first)
        assert door.enter(third)
        assert not (first.aborted or second.aborted or third.aborted)


def test_one_that_was_dropped_leaves_once():
    @in_loop
    def test():
        door = Entrance("here", max_connections=2)
        first, second, third, fourth = (Someone(user=1) for _ in range(4))
        assert door.enter(first) and door.enter(second) and door.enter(third)
        assert first.aborted
        door.settle(first)  # it had just opened its export
        door.leave(first)
        assert door.enter(fourth)
        assert second.aborted and not third.aborted
        for one in (second, third, fourth):
            door.leave(one)
        assert not door._inside and not door._arriving


def test_a_host_with_many_addresses_of_ipv6_is_one():
    @in_loop
    def test():
        door = Entrance("here", max_connections=10)
        honest = [Someone("192.0.2.1"), Someone("2001:db8:0:1::1"), Someone(user=3)]
        for one in honest:
            assert door.enter(one)
        for number in range(100):
            assert door.enter(Someone(f"2001:db8:0:2::{number:x}"))
        assert not any(one.aborted for one in honest)


def test_a_flood_is_a_number_in_the_log(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(entrance, "INTERVAL", 0.05)

    async def main():
        door = Entrance("here", AccessList(users=frozenset()))
        for number in range(LINES + 30):
            assert not door.admits(Someone(user=number).identity)
        assert len(caplog.records) == LINES
        assert caplog.records[0].getMessage() == "refused at here: not on the access list"
        assert caplog.records[0].fields == {"client": "None 0"}
        await settle(lambda: len(caplog.records) > LINES)
        assert caplog.records[LINES].getMessage() == "here: 30 more lines of this kind"
        assert not door.admits(Someone(user=1).identity)
        assert len(caplog.records) == LINES + 2
        door.close()
        assert len(caplog.records) == LINES + 2

    asyncio.run(main())


def test_users_on_a_socket():
    """The number of a real process's user."""

    async def test(harness):
        client = await harness.raw()
        assert len(await client.reader.read(GREETING)) == GREETING
        refused = harness.path + ".other"
        await harness.server.listen_unix(refused, access=AccessList(users=frozenset({4242})))
        reader, writer = await asyncio.open_unix_connection(refused)
        assert await reader.read() == b""
        writer.close()

    serve(test, access=AccessList(users=frozenset({os.geteuid()})))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_addresses_over_tcp(host, caplog):
    caplog.set_level("INFO")

    async def main():
        server = Server(MemoryRegistry(MemoryExport()))
        here = AccessList((ip_network("127.0.0.0/8"), ip_network("::1")))
        elsewhere = AccessList((ip_network("10.0.0.0/8"), ip_network("fd00::/8")))
        try:
            await server.listen_tcp(host, 0, access=here)
            await server.listen_tcp(host, 0, access=elsewhere)
        except OSError:
            pytest.skip("no IPv6 here")
        answers = []
        for address in server.addresses:
            reader, writer = await asyncio.open_connection(host, int(address.rpartition(":")[2]))
            try:
                answers.append(await reader.read(8))
            except ConnectionError:
                answers.append(b"")
            writer.close()
        assert answers == [b"NBDMAGIC", b""]
        assert server.connections <= 1
        assert await server.drain(5)

    asyncio.run(main())
    (line,) = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    shown = f"[{host}]" if ":" in host else host
    assert "not on the access list" in line and f"refused at {shown}:" in line


def test_one_too_many_is_closed_and_served_when_there_is_room(caplog):
    caplog.set_level("INFO")

    async def test(harness):
        clients = [await harness.connect() for _ in range(3)]
        refused = await harness.raw()
        assert await refused.at_end() == b""
        for client in clients:
            assert not (await client.call(READ, 0, 512)).error
        clients[0].send(DISC)
        await clients[0].at_end()
        clients[0].close()
        await settle(lambda: harness.server.connections == 2)
        await harness.connect()

    serve(test, max_connections=3)
    assert "all 3 connections are taken" in caplog.text


def test_half_open_clients_cannot_take_all_places(caplog):
    """They come as the same user as the honest ones, which is the worst case."""
    caplog.set_level("INFO")

    async def test(harness):
        working = await harness.connect()
        for _ in range(40):
            silent = await harness.raw()
            silent.writer.write(FLAGS + option(7, string("disk"))[:-2])
        await settle(lambda: harness.server.connections <= 10)
        assert harness.server.connections <= 10
        for _ in range(9):
            assert not (await (await harness.connect()).call(READ, 0, 512)).error
        assert not (await working.call(READ, 0, 512)).error

    serve(test, max_connections=10)
    assert "others need the place" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_places_are_taken_while_an_export_is_being_opened():
    """One that is dropped just then closes what it opened."""

    async def test(harness):
        harness.registry.gate = asyncio.Event()
        opening = await harness.raw()
        opening.writer.write(FLAGS + option(7, string("disk") + b"\0\0"))
        await settle()
        other = await harness.raw()
        await settle()
        harness.registry.gate.set()
        await opening.at_end()
        assert len(await other.reader.readexactly(GREETING)) == GREETING
        await settle(lambda: harness.registry.closed)
        assert harness.registry.opened == harness.registry.closed == 1

    serve(test, max_connections=1)


GREEDY = """
import socket, struct, sys, threading
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
def read():
    while sock.recv(1 << 20):
        pass
reader = threading.Thread(target=read)
reader.start()
print("ready", flush=True)
try:
    sock.sendall(bytes.fromhex(sys.argv[2]))
    flood = bytes.fromhex(sys.argv[3]) * 10000
    while True:
        sock.sendall(flood)
except OSError:
    pass
reader.join()
"""


def test_options_without_end_have_an_end_and_let_others_work(caplog):
    """A client that is always ready, and reads everything, gets its time and no more."""
    caplog.set_level("INFO")

    async def test(harness):
        names = [f"{number:05}" for number in range(1000)]
        asked = []
        harness.registry.list_names = lambda: asked.append(1) or names
        async with flooding(harness, FLAGS, option(3)) as greedy:
            await settle(lambda: asked)
            before = len(asked)
            client = await harness.connect()
            assert not (await client.call(READ, 0, 512)).error
            # Each turn of the event loop had one of its questions.
            assert 0 < len(asked) - before < 200
            assert await greedy.wait() == 0

    serve(test, handshake_timeout=0.5)
    assert "the handshake took too long" in caplog.text


def test_who_goes_on_after_the_end_is_closed_and_lets_others_work():
    async def test(harness):
        opened = FLAGS + option(7, string("disk") + b"\0\0") + request(DISC)
        async with flooding(harness, opened, b"more") as greedy:
            await settle(lambda: harness.registry.closed)
            for _ in range(3):
                client = await harness.connect()
                assert not (await client.call(READ, 0, 512)).error
            assert await greedy.wait() == 0

    serve(test)


@contextlib.asynccontextmanager
async def flooding(harness, first, flood):
    """A process that sends without end and reads all that it gets, until it is closed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", GREEDY, harness.path, first.hex(), flood.hex()),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_what_is_kept_of_a_client_that_pipelines_is_bounded():
    """While a question is pending, nothing is received."""

    async def test(harness):
        harness.registry.gate = asyncio.Event()
        client = await harness.raw()
        client.writer.write(FLAGS + option(6, string("disk") + b"\0\0"))
        client.writer.write(option(99, bytes(1000)) * 2000)
        await settle()
        ((_, connection),) = harness.server._connections.items()
        assert len(connection._handshake._input) <= 16 << 10
        client.close()
        harness.registry.gate.set()

    serve(test)


@pytest.mark.parametrize(
    "stage", ["silent", "a hello in part", "a byte now and then", "silence after it"]
)
def test_handshakes_with_tls_that_do_not_end(tmp_path, stage, caplog):
    caplog.set_level("INFO")
    certificates = make_certificates(tmp_path / "certificates")
    tls = load_tls(
        TlsMode.REQUIRED, certificates / "server-cert.pem", certificates / "server-key.pem", None
    )
    hello = bytes.fromhex("16030102000100 01fc0303") + bytes(500)

    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(5)
        if stage == "a hello in part":
            client.writer.transport.pause_reading()
            client.writer.write(hello[:-400])
        elif stage == "a byte now and then":
            for number in range(len(hello)):
                client.writer.write(hello[number : number + 1])
                await asyncio.sleep(0.01)
                if not harness.server.connections:
                    break
        elif stage == "silence after it":
            context = client_context(certificates)
            await client.writer.start_tls(context, server_hostname="localhost")
            await client.option(3)
            client.writer.write(option(7, string("disk"))[:-1])
        await harness.no_connections()

    serve(test, tls=tls, handshake_timeout=0.2)
    assert "the handshake took too long" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
