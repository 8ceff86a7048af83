"""Connections over TLS: byte-exact both ways, hostile input, back-pressure, every way to end."""

import asyncio
import random
import ssl
import struct
from itertools import count
from pathlib import Path

import pytest

from nbdserve.protocol.handshake import TlsMode
from nbdserve.server import tls_relay
from nbdserve.server.tls import load_tls

from .certificates import client_context, make_certificates
from .harness import serve, settle
from .memory_export import MemoryExport
from .nbd_client import DISC, FLUSH, READ, SIMPLE, STYLES, WRITE, option, request, string

MIB = 1 << 20
GREETING = 18
FLAGS = struct.pack(">I", 3)
GO = option(7, string("disk") + b"\0\0")
STARTTLS = option(5)
ACK = struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def required(certificates):
    return load(certificates)


def load(certificates, mode=TlsMode.REQUIRED, *, identify=False):
    return load_tls(
        mode,
        certificates / "server-cert.pem",
        certificates / "server-key.pem",
        certificates / "ca-cert.pem" if identify else None,
    )


async def start_tls(client, context):
    """Send STARTTLS, then TLS on the client's streams."""
    await client.option(5)
    await client.writer.start_tls(context, server_hostname="localhost")


async def connect(harness, certificates, *, style=SIMPLE):
    """An open export over TLS."""
    client = await harness.raw()
    await client.reader.readexactly(GREETING)
    client.writer.write(FLAGS)
    await start_tls(client, client_context(certificates))
    await client.agree("disk", style)
    return client


class Wire:
    """TLS in memory over the harness's plain streams: says when each byte goes, and how it ends."""

    def __init__(self, client, context):
        self.client = client
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    @classmethod
    async def open(cls, harness, certificates):
        """An open export."""
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(5)
        wire = cls(client, client_context(certificates))
        await wire.handshake()
        wire.tls.write(GO)
        wire.flush()
        # Information, acknowledgement.
        await wire.read(20 + 12 + 20)
        return wire

    async def handshake(self):
        """The client's side; its last message is not sent before ``flush``."""
        while True:
            try:
                self.tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.flush()
                self.incoming.write(await self.client.reader.read(1 << 16))

    def flush(self):
        self.client.writer.write(self.outgoing.read())

    async def read(self, size):
        """Exactly that many decrypted bytes; fewer at the end of the stream."""
        data = b""
        while len(data) < size:
            try:
                piece = self.tls.read(size - len(data))
                if not piece:
                    break
                data += piece
            except ssl.SSLWantReadError:
                received = await self.client.reader.read(1 << 16)
                if not received:
                    raise AssertionError("the stream ended without close_notify") from None
                self.incoming.write(received)
            except ssl.SSLZeroReturnError:
                break
        return data


def simple(cookie, data=b""):
    return struct.pack(">IIQ", 0x67446698, 0, cookie) + data


def count_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def one_line_each(caplog):
    """No traceback, and no line breaks."""
    return not any(r.exc_info or "\n" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("style", STYLES)
def test_reads_and_writes_of_all_sizes_pipelined(certificates, required, style):
    source = random.Random(11)
    content = bytearray(source.randbytes(48 * MIB))
    sizes = [1, 511, 4096, 65536, 16384 - 28, 16384 - 27, MIB, 3 * MIB + 7, 20 * MIB]

    async def test(harness):
        client = await connect(harness, certificates, style=style)
        at = 0
        cookies = {}
        for cookie in count():
            size = source.choice(sizes)
            if at + size > len(content):
                break
            client.send(WRITE, at, cookie=cookie, data=bytes(content[at : at + size]))
            cookies[cookie] = (at, size)
            at += size
        for _ in cookies:
            reply = await client.reply()
            assert not reply.error
        assert harness.export.content[:at] == content[:at]
        for cookie, (offset, size) in cookies.items():
            client.send(READ, offset, size, cookie=cookie)
        while cookies:
            reply = await client.reply()
            offset, size = cookies.pop(reply.cookie)
            assert reply.data == content[offset : offset + size]

    serve(test, MemoryExport(size=len(content)), tls=required)


def test_records_cut_anywhere(certificates, required):
    source = random.Random(12)
    data = source.randbytes(MIB)

    async def test(harness):
        wire = await Wire.open(harness, certificates)
        for cookie in range(0, 64):
            piece = data[cookie << 14 : (cookie + 1) << 14]
            # Records of all sizes, requests across their borders.
            message = request(WRITE, cookie << 14, cookie=cookie, data=piece)
            while message:
                cut = source.choice([1, 7, 28, 5000, 1 << 14])
                wire.tls.write(message[:cut])
                message = message[cut:]
        sent = memoryview(wire.outgoing.read())
        while sent:
            cut = source.choice([1, 4, 5, 6, 29, 3000, 100_000])
            wire.client.writer.write(bytes(sent[:cut]))
            await asyncio.sleep(0 if source.random() < 0.5 else 0.0005)
            sent = sent[cut:]
        assert await wire.read(64 * 16) == b"".join(map(simple, range(64)))
        assert harness.export.content == data

    serve(test, tls=required)


def test_disc_behind_pipelined_writes_has_all_answered(certificates, required):
    async def test(harness):
        harness.export.refuse_writes = True  # every write is a task
        wire = await Wire.open(harness, certificates)
        for cookie in range(200):
            wire.tls.write(request(WRITE, cookie * 512, cookie=cookie, data=bytes([cookie]) * 512))
        wire.tls.write(request(DISC, cookie=999))
        wire.flush()
        answers = await wire.read(201 * 16)
        assert sorted(struct.iter_unpack(">IIQ", answers)) == sorted(
            (0x67446698, 0, cookie) for cookie in range(200)
        )
        assert all(harness.export.content[n * 512] == n for n in range(200))
        # close_notify came before the end of the stream.
        assert await wire.client.reader.read() == b""
        wire.client.close()
        await harness.no_connections()

    serve(test, tls=required)


def test_client_that_ends_its_stream_gets_all_answers(certificates, required):
    """With a close_notify, or by the end of the stream alone."""

    async def test(harness):
        for close_notify in (True, False):
            wire = await Wire.open(harness, certificates)
            for cookie in range(50):
                wire.tls.write(request(READ, 0, 65536, cookie=cookie))
            if close_notify:
                with pytest.raises(ssl.SSLWantReadError):
                    wire.tls.unwrap()
            wire.flush()
            wire.client.writer.write_eof()
            expected = b"".join(simple(n, bytes(65536)) for n in range(50))
            if close_notify:  # OpenSSL reads no more data then: count records
                cipher = await wire.client.reader.read()
                assert len(expected) < len(cipher) < len(expected) * 1.02
            else:
                assert await wire.read(len(expected) + 1) == expected
            wire.client.close()
            await harness.no_connections()

    serve(test, tls=required)


def test_what_comes_with_the_last_record_of_the_tls_handshake(certificates, required):
    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(5)
        wire = Wire(client, client_context(certificates))
        await wire.handshake()
        for cookie in range(3):
            wire.tls.write((b"" if cookie else GO) + request(READ, 0, 8, cookie=cookie))
        wire.flush()
        await wire.read(20 + 12 + 20)
        assert await wire.read(3 * 24) == b"".join(simple(n, bytes(8)) for n in range(3))

    serve(test, tls=required)


def test_choices_before_tls_are_gone(certificates):
    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(8)
        await start_tls(client, client_context(certificates))
        await client.option(7, string("disk") + b"\0\0")
        assert (await client.call(READ, 0, 16)).chunks == ()  # a simple reply
        plain = await harness.connect()
        assert not (await plain.call(READ, 0, 16)).error

    serve(test, tls=load(certificates, TlsMode.OPTIONAL))


def test_plain_client_is_refused_when_tls_is_required(certificates, required):
    async def test(harness):
        with pytest.raises(AssertionError, match="TLS"):
            await harness.connect()
        assert harness.registry.opened == 0
        client = await harness.raw()
        client.writer.write(FLAGS + option(1, b"disk"))
        assert len(await client.at_end()) == GREETING

    serve(test, tls=required)


def test_plain_text_behind_starttls_is_never_obeyed(certificates):
    async def test(harness):
        for behind in (GO, b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"):
            client = await harness.raw()
            client.writer.write(FLAGS + STARTTLS + behind)
            assert len(await client.at_end()) == GREETING
        # Behind the acknowledgement it is taken for TLS, which it is not.
        client = await harness.raw()
        client.writer.write(FLAGS)
        await client.reader.readexactly(GREETING)
        client.writer.write(STARTTLS)
        assert await client.reader.readexactly(20) == ACK
        client.writer.write(GO + request(WRITE, data=b"x" * 512))
        await client.at_end()
        await harness.no_connections()
        assert harness.registry.opened == 0
        assert not any(harness.export.content)

    serve(test, tls=load(certificates, TlsMode.OPTIONAL))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\xff" * 70000,
        b"\x16\x03\x01\x40\x00" + bytes(1 << 14),
    ],
)
def test_garbage_in_place_of_a_client_hello(certificates, required, garbage, caplog):
    caplog.set_level("INFO")

    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(5)
        client.writer.write(garbage)
        await client.at_end()
        client.close()
        await harness.no_connections()

    serve(test, tls=required)
    (line,) = [r.getMessage() for r in caplog.records if "TLS" in r.getMessage()]
    assert "TLS handshake failed" in line
    assert one_line_each(caplog)


def test_garbage_inside_the_session(certificates, required, caplog):
    caplog.set_level("INFO")

    async def test(harness):
        wire = await Wire.open(harness, certificates)
        wire.client.writer.write(b"\x17\x03\x03\x00\x40" + bytes(64))
        with pytest.raises((ssl.SSLError, AssertionError)):
            await wire.read(1)
        wire.client.close()
        await harness.no_connections()

    serve(test, tls=required)
    assert [r.getMessage() for r in caplog.records if "TLS failed" in r.getMessage()]
    assert one_line_each(caplog)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_client_that_hangs_in_the_tls_handshake_is_dropped(certificates, required, sent, caplog):
    caplog.set_level("INFO")

    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(5)
        client.writer.write(sent)
        assert await client.at_end() == b""
        await harness.no_connections()

    serve(test, tls=required, handshake_timeout=0.1)
    assert "took too long" in caplog.text
    assert one_line_each(caplog)


def test_client_certificates(certificates, tmp_path, caplog):
    caplog.set_level("INFO")
    strangers = make_certificates(tmp_path / "strangers")
    unknown = client_context(certificates)
    unknown.load_cert_chain(strangers / "client-cert.pem", strangers / "client-key.pem")
    server_as_client = client_context(certificates)
    server_as_client.load_cert_chain(
        certificates / "server-cert.pem", certificates / "server-key.pem"
    )

    async def test(harness):
        for context in (client_context(certificates), unknown, server_as_client):
            client = await harness.raw()
            await client.reader.readexactly(GREETING)
            client.writer.write(FLAGS)
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await start_tls(client, context)
                await client.option(3)
            client.close()
        assert harness.registry.opened == 0
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await start_tls(client, client_context(certificates, identify=True))
        await client.option(7, string("disk") + b"\0\0")
        assert not (await client.call(FLUSH)).error

    serve(test, tls=load(certificates, identify=True))
    assert caplog.text.count("TLS handshake failed") == 3
    assert "peer did not return a certificate" in caplog.text
    assert "the client's certificate was refused" in caplog.text
    assert one_line_each(caplog)


def test_server_that_the_client_does_not_trust(required, tmp_path, caplog):
    caplog.set_level("INFO")
    strangers = make_certificates(tmp_path / "strangers")

    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        with pytest.raises(ssl.SSLCertVerificationError):
            await start_tls(client, client_context(strangers))
        client.close()
        await harness.no_connections()

    serve(test, tls=required)
    assert "TLS handshake failed" in caplog.text
    assert one_line_each(caplog)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions(certificates, required, version):
    async def test(harness):
        context = client_context(certificates)
        context.minimum_version = context.maximum_version = version
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await start_tls(client, context)
        await client.option(7, string("disk") + b"\0\0")
        assert not (await client.call(WRITE, data=bytes(MIB))).error
        assert (await client.call(READ, 0, MIB)).data == bytes(MIB)

    serve(test, tls=required)


def test_client_that_vanishes_amid_transfers(certificates, required, caplog):
    caplog.set_level("INFO")

    async def test(harness):
        descriptors = count_descriptors()
        for number in range(6):
            client = await connect(harness, certificates)
            for cookie in range(40):
                client.send(READ, 0, MIB, cookie=cookie)
            client.writer.write(request(WRITE, 0, data=bytes(MIB))[: MIB // 2])
            if number % 2:
                await client.reader.readexactly(100_000)
            client.close()
            await harness.no_connections()
        assert count_descriptors() <= descriptors

    serve(test, tls=required)
    assert one_line_each(caplog)


def test_client_that_takes_no_replies_is_held_back_and_loses_nothing(certificates, required):
    """What is read ahead for it is bounded; others are served; then it gets everything."""

    async def test(harness):
        wire = await Wire.open(harness, certificates)
        amount = 200
        for cookie in range(amount):
            wire.tls.write(request(READ, 0, MIB, cookie=cookie))
        wire.flush()
        wire.client.writer.transport.pause_reading()
        other = await connect(harness, certificates)
        for _ in range(50):
            assert not (await other.call(READ, 0, 65536)).error
        read = sum(length for what, _, length in harness.export.calls if length == MIB)
        assert read <= 64 * MIB
        wire.client.writer.transport.resume_reading()
        for cookie in range(amount):
            assert await wire.read(16) == simple(cookie)
            assert len(await wire.read(MIB)) == MIB

    serve(test, MemoryExport(size=2 * MIB), tls=required)


def test_slow_export_holds_back_a_client_that_sends(certificates, required):
    """Writes that wait fill the buffers between, and no more of them is taken in."""
    amount = 100

    async def test(harness):
        export = harness.export
        export.refuse_writes = True
        export.gate = asyncio.Event()
        client = await connect(harness, certificates)
        for cookie in range(amount):
            client.send(WRITE, 0, cookie=cookie, data=bytes([cookie]) * MIB)
        await settle()
        assert export.most_waiting_bytes <= 40 * MIB
        export.gate.set()
        assert {(await client.reply()).cookie for _ in range(amount)} == set(range(amount))

    serve(test, tls=required)


def test_client_that_leaves_its_replies_is_dropped(certificates, required, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(tls_relay, "DELIVERY_TIMEOUT", 0.1)

    async def test(harness):
        wire = await Wire.open(harness, certificates)
        wire.client.writer.transport.pause_reading()
        # Twice what the kernel's buffers hold, within what the server's hold.
        for cookie in range(2):
            wire.tls.write(request(READ, 0, MIB, cookie=cookie))
        wire.tls.write(request(DISC))
        wire.flush()
        await harness.no_connections()

    serve(test, tls=required)
    assert "did not take" in caplog.text or "lost" in caplog.text


def test_client_that_stays_after_the_end_is_dropped(certificates, required, monkeypatch):
    monkeypatch.setattr(tls_relay, "LINGER_TIMEOUT", 0.1)

    async def test(harness):
        wire = await Wire.open(harness, certificates)
        wire.tls.write(request(DISC))
        wire.flush()
        assert await wire.read(1) == b""
        await harness.no_connections()  # though we have not closed

    serve(test, tls=required)


def test_stopping_server_answers_what_it_has_and_says_goodbye(certificates, required):
    async def test(harness):
        wire = await Wire.open(harness, certificates)
        harness.export.gate = asyncio.Event()
        harness.export.refuse_reads = True
        wire.tls.write(request(READ, 0, 512, cookie=7))
        wire.flush()
        await settle(lambda: harness.export.waiting)
        draining = asyncio.create_task(harness.server.drain(10))
        await settle(lambda: False)
        harness.export.gate.set()
        assert await wire.read(528 + 1) == simple(7, bytes(512))
        wire.client.close()
        assert await draining

    serve(test, tls=required)


def test_stopping_server_ends_tls_handshakes(certificates, required):
    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        await client.option(5)
        assert await harness.server.drain(5)
        assert await client.at_end() == b""

    serve(test, tls=required)


def test_revoked_export_ends_the_connection_at_once(certificates, required):
    async def test(harness):
        wire = await Wire.open(harness, certificates)
        wire.client.writer.transport.pause_reading()
        for cookie in range(20):
            wire.tls.write(request(READ, 0, MIB, cookie=cookie))
        wire.flush()
        await settle(lambda: harness.export.calls)
        harness.registry.revokes[0]()
        await harness.no_connections()

    serve(test, tls=required)


def test_connections_leave_no_descriptors(certificates, required):
    async def test(harness):
        descriptors = count_descriptors()
        for _ in range(20):
            client = await connect(harness, certificates)
            client.send(DISC)
            await client.at_end()
            client.close()
        await harness.no_connections()
        assert count_descriptors() <= descriptors

    serve(test, tls=required)
