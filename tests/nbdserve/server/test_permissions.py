"""Exports for certain clients only: every option, with and without TLS; and their connections."""

import asyncio
import struct

import pytest

from nbdserve.protocol.handshake import TlsMode
from nbdserve.server.identity import Identity
from nbdserve.server.permissions import ExportRule, PermissionRefusedError, Permissions
from nbdserve.server.tls import load_tls

from .certificates import client_context, make_certificates, make_client, make_odd_client
from .harness import serve, settle
from .memory_export import MemoryExport
from .nbd_client import DISC, option, request, string

GREETING = 18
FLAGS = struct.pack(">I", 3)
LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META = 3, 5, 6, 7, 8, 9, 10
ACK = 1
ERR_POLICY, ERR_TLS_REQD, ERR_UNKNOWN = (1 << 31 | number for number in (2, 5, 6))
NAMES = ["free", "web", "web@monday", "web2"]
RULES = [ExportRule("web*", frozenset({"backup.example.com"}))]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    directory = make_certificates(tmp_path_factory.mktemp("certificates"))
    for name in ("Backup.Example.com", "other.example.com"):
        make_client(directory, name)
    return directory


def exports():
    return [MemoryExport(name) for name in NAMES]


def load(certificates, mode, *, ask=True):
    return load_tls(
        mode,
        certificates / "server-cert.pem",
        certificates / "server-key.pem",
        certificates / "ca-cert.pem" if ask else None,
    )


async def greet(harness):
    client = await harness.raw()
    await client.reader.readexactly(GREETING)
    client.writer.write(FLAGS)
    return client


async def start_tls(client, context):
    await client.option(STARTTLS)
    await client.writer.start_tls(context, server_hostname="localhost")


async def ask(client, kind, data=b""):
    """Send an option; returns the type and text of its final reply, and the data before it."""
    client.writer.write(option(kind, data))
    found = []
    while True:
        header = await client.reader.readexactly(20)
        _, replied, reply, length = struct.unpack(">QIII", header)
        assert replied == kind
        payload = await client.reader.readexactly(length)
        if reply == ACK or reply >> 31:
            return reply, payload.decode(), found
        found.append(payload)


def info(name):
    return string(name) + b"\0\0"


def query(name):
    return string(name) + struct.pack(">I", 1) + string("base:allocation")


async def answers(client, name):
    """The replies to INFO, GO, LIST_META_CONTEXT and SET_META_CONTEXT; refusals carry a text."""
    found = {}
    await client.option(STRUCTURED_REPLY)
    for kind, data in ((INFO, info), (LIST_META, query), (SET_META, query), (GO, info)):
        found[kind], text, before = await ask(client, kind, data(name))
        if found[kind] != ACK:
            assert text and not before
            assert "\n" not in text
    return found


def all_of(reply):
    return dict.fromkeys((INFO, GO, LIST_META, SET_META), reply)


async def listing(client):
    reply, _, names = await ask(client, LIST)
    assert reply == ACK
    return [name[4:].decode() for name in names]


async def refuse_export_name(harness, name, context=None):
    """EXPORT_NAME ends the connection without a word."""
    client = await greet(harness)
    if context is not None:
        await start_tls(client, context)
    client.writer.write(option(1, name.encode()))
    assert await client.at_end() == b""


@pytest.mark.parametrize("name", ["web", "web@monday", "web2", "website-that-is-not-there"])
def test_without_tls_where_it_is_to_be_had(certificates, name):
    async def test(harness):
        client = await greet(harness)
        assert await listing(client) == ["free"]
        found = await answers(client, name)
        # The specification has TLS_REQD for INFO and GO only.
        assert found == all_of(ERR_POLICY) | {INFO: ERR_TLS_REQD, GO: ERR_TLS_REQD}
        await refuse_export_name(harness, name)
        assert await answers(client, "free") == all_of(ACK)

    serve(test, *exports(), rules=RULES, tls=load(certificates, TlsMode.OPTIONAL))


@pytest.mark.parametrize("name", ["web", "web@monday", "website-that-is-not-there"])
def test_without_tls_where_there_is_none(name):
    async def test(harness):
        client = await greet(harness)
        assert await listing(client) == ["free"]
        assert await answers(client, name) == all_of(ERR_POLICY)
        await refuse_export_name(harness, name)
        assert (await answers(client, "absent"))[INFO] == ERR_UNKNOWN
        assert await answers(client, "free") == all_of(ACK)

    serve(test, *exports(), rules=RULES)


@pytest.mark.parametrize("mode", [TlsMode.OPTIONAL, TlsMode.REQUIRED])
@pytest.mark.parametrize("name", ["web", "web@monday", "website-that-is-not-there"])
@pytest.mark.parametrize("shows", [None, "other.example.com", "client"])
def test_with_the_wrong_certificate_or_none(certificates, mode, name, shows, caplog):
    """Once there is TLS, TLS_REQD must not be said any more."""
    caplog.set_level("INFO")
    directory = certificates / shows if shows and shows != "client" else certificates
    context = client_context(directory, identify=shows is not None)

    async def test(harness):
        client = await greet(harness)
        await start_tls(client, context)
        assert await listing(client) == ["free"]
        assert await answers(client, name) == all_of(ERR_POLICY)
        await refuse_export_name(harness, name, context)
        assert await answers(client, "free") == all_of(ACK)

    tls = load(certificates, mode, ask=shows is not None)
    serve(test, *exports(), rules=RULES, tls=tls)
    assert f"export {name!r} is for clients with certain certificates only" in caplog.text


@pytest.mark.parametrize("mode", [TlsMode.OPTIONAL, TlsMode.REQUIRED])
def test_with_the_right_certificate(certificates, mode):
    context = client_context(certificates / "Backup.Example.com", identify=True)

    async def test(harness):
        for name in NAMES:
            client = await greet(harness)
            if mode is TlsMode.OPTIONAL:
                assert await listing(client) == ["free"]
            await start_tls(client, context)
            assert await listing(client) == NAMES
            assert (await ask(client, INFO, info("website-that-is-not-there")))[0] == ERR_UNKNOWN
            assert await answers(client, name) == all_of(ACK)
            client.writer.write(request(DISC))
            await client.at_end()
        # EXPORT_NAME is answered by the export's size.
        client = await greet(harness)
        await start_tls(client, context)
        client.writer.write(option(1, b"web"))
        assert await client.reader.readexactly(8) == struct.pack(">Q", 1 << 20)

    serve(test, *exports(), rules=RULES, tls=load(certificates, mode))


def test_common_name_where_a_certificate_has_no_dns_names(certificates):
    by_common_name = [ExportRule("*", frozenset({"test client"}))]
    # A certificate with DNS names is not known by its common name, which is the same here.
    directory = certificates

    async def test(harness):
        client = await greet(harness)
        await start_tls(client, client_context(directory, identify=True))
        assert await listing(client) == NAMES
        other = await greet(harness)
        await start_tls(other, client_context(directory / "other.example.com", identify=True))
        assert await listing(other) == []

    serve(test, *exports(), rules=by_common_name, tls=load(certificates, TlsMode.REQUIRED))


@pytest.mark.parametrize(
    ("alternative_name", "listed"),
    [
        ("DER:30:05:82:03:ff:fe:61", None),  # not UTF-8
        ("DER:30:03:82:01:61", []),  # "a"
        ("DER:30:05:82:03:61:00:62", []),  # "a", NUL, "b"
        ("DNS:*.example.com", []),
        ("IP:192.0.2.1", NAMES),  # no DNS name: the common name counts
        ("DER:30:00", NAMES),
    ],
)
def test_certificates_with_odd_names(certificates, tmp_path, alternative_name, listed, caplog):
    caplog.set_level("INFO")
    name = f"odd-{tmp_path.name}"
    make_odd_client(certificates, name, alternative_name)
    rules = [ExportRule("*", frozenset({name.lower(), "backup.example.com", "b"}))]

    async def test(harness):
        client = await greet(harness)
        await start_tls(client, client_context(certificates / name, identify=True))
        if listed is None:
            assert await client.at_end() == b""
        else:
            assert await listing(client) == listed

    tls = load(certificates, TlsMode.REQUIRED)
    serve(test, *exports(), rules=rules, tls=tls)
    assert not [record for record in caplog.records if record.exc_info]
    if listed is None:
        assert "the names in the client's certificate cannot be read" in caplog.text


def test_the_first_rule_that_is_for_an_export_holds():
    permissions = Permissions(
        [
            ExportRule("web-public"),
            ExportRule("web*", frozenset({"a", "b"})),
            ExportRule("*", frozenset({"c"})),
        ]
    )
    names = ["web-public", "web-public@x", "web-public2", "web", "web@x", "other"]
    nobody = Identity("peer", secure=True)
    assert permissions.select(names, nobody) == ["web-public", "web-public@x"]
    b = Identity("peer", secure=True, certificate_names=("x", "b"))
    assert permissions.select(names, b) == names[:-1]
    c = Identity("peer", secure=True, certificate_names=("c",))
    assert permissions.select(names, c) == ["web-public", "web-public@x", "other"]
    # Names without TLS would be somebody's word for it.
    plain = Identity("peer", certificate_names=("b", "c"))
    assert permissions.select(names, plain) == ["web-public", "web-public@x"]


@pytest.mark.parametrize("name", ["", "@", "web@", "web\n", "w" * 4096, "web@a@b", "WEB"])
def test_names_of_every_kind_have_a_rule(name):
    permissions = Permissions([ExportRule("*", frozenset({"a"}))])
    with pytest.raises(PermissionRefusedError):
        permissions.check(name, Identity("peer"), TlsMode.OFF)


def test_as_many_connections_as_an_export_may_have(caplog):
    caplog.set_level("INFO")
    rules = [ExportRule("web*", max_connections=2)]

    async def test(harness):
        clients = [await harness.connect("web") for _ in range(2)]
        third = await greet(harness)
        reply, text, _ = await ask(third, GO, info("web"))
        assert reply == ERR_POLICY
        assert "has all the connections that it may have, 2" in text
        # INFO and LIST open nothing, and each export counts by itself.
        assert (await ask(third, INFO, info("web")))[0] == ACK
        assert await listing(third) == NAMES
        assert (await ask(third, GO, info("web@monday")))[0] == ACK
        await harness.connect("web2")
        await harness.connect("free")
        await refuse_export_name(harness, "web")
        # The place of one that left, politely or not, is another's.
        for leave in (lambda: clients[0].send(DISC), clients[1].close):
            leave()
            await settle(lambda: harness.server._permissions._open["web"] == 1)
            assert harness.server._permissions._open["web"] == 1
            await harness.connect("web")

    serve(test, *exports(), rules=rules)
    assert "export 'web' has all the connections" in caplog.text


def test_connections_that_fail_to_open_do_not_count():
    rules = [ExportRule("*", max_connections=1)]

    async def test(harness):
        async def fail(*_):
            raise OSError("broken")

        works = harness.registry.open
        for failure in (fail, lambda *_: 1 / 0):
            harness.registry.open = failure
            client = await greet(harness)
            assert (await ask(client, GO, info("free")))[0] == ERR_UNKNOWN
        harness.registry.open = works
        # One that goes away while its export is being opened.
        harness.registry.gate = asyncio.Event()
        client = await greet(harness)
        client.writer.write(option(GO, info("free")))
        await settle()
        client.close()
        harness.registry.gate.set()
        await settle(lambda: harness.registry.closed == 1)
        assert not harness.server._permissions._open
        await harness.connect("free")

    serve(test, *exports(), rules=rules)


def test_revoked_export_gives_its_place_back():
    async def test(harness):
        await harness.connect("web")
        harness.registry.revokes[0]()
        await harness.no_connections()
        assert not harness.server._permissions._open
        await harness.connect("web")

    serve(test, *exports(), rules=[ExportRule("web", max_connections=1)])


def test_rules_that_change_count_who_is_there_already():
    permissions = Permissions([ExportRule("b*", max_connections=1)])
    permissions.enter("disk")
    permissions.enter("disk")
    permissions.change([ExportRule("disk", max_connections=2)])
    with pytest.raises(PermissionRefusedError):
        permissions.enter("disk")
    permissions.leave("disk")
    permissions.enter("disk")
    with pytest.raises(PermissionRefusedError):
        permissions.enter("disk")
    permissions.change([])
    permissions.enter("disk")
