"""The client's handshake, against the server's own and against bytes made by hand."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol.client_handshake import (
    MAX_REPLIES,
    MAX_REPLY,
    Agreed,
    ClientHandshake,
    ExportInformation,
    HandshakeError,
)
from nbdserve.protocol.constants import (
    FLAG_READ_ONLY,
    FLAG_SEND_TRIM,
    MAX_PAYLOAD,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
)
from nbdserve.protocol.handshake import (
    DescribeExport,
    Handshake,
    OpenExport,
    StartTls,
    TlsMode,
)
from nbdserve.protocol.options import ExportDescription

GREETING = struct.pack(">QQH", 0x4E42444D41474943, OPTION_MAGIC, 3)
EXPORTS = {
    "web": ExportDescription("web", 1 << 30, False, 4096),
    "web@monday": ExportDescription("web@monday", 1 << 20, True, 4096),
}


def talk(client: ClientHandshake, server: Handshake, step: int = 1 << 16) -> ExportInformation:
    """Let both speak, `step` bytes at a time, until the client has what it wants."""
    for _ in range(100_000):
        event = client.next_event()
        if isinstance(event, Agreed):
            return event.export
        server.receive(client.data_to_send())
        if isinstance(event, StartTls):
            client.tls_started()
            continue
        question = server.next_event()
        if isinstance(question, StartTls):
            server.tls_started()
        elif isinstance(question, OpenExport | DescribeExport):
            if question.name not in EXPORTS:
                server.refuse(f"there is no volume {question.name}")
            elif isinstance(question, OpenExport):
                server.answer_open(EXPORTS[question.name])
            else:
                server.answer_describe(EXPORTS[question.name])
        said = server.data_to_send()
        for start in range(0, len(said), step):
            client.receive(said[start : start + step])
            if start + step < len(said):
                assert client.next_event() is None
    raise AssertionError("they do not come to an end")


def reply(kind: int, data: bytes = b"", option: int = Option.GO) -> bytes:
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def information(size: int = 4096, flags: int = 1) -> bytes:
    return reply(OptionReply.INFO, struct.pack(">HQH", Info.EXPORT, size, flags))


def hear(*said: bytes, tls: bool = False) -> ExportInformation | None:
    """What a client that wants `web` makes of these bytes."""
    client = ClientHandshake("web", opening=True, tls=tls)
    client.receive(b"".join((GREETING, *said)))
    event = client.next_event()
    return event.export if isinstance(event, Agreed) else None


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("step", [1, 7, 1 << 16])
def test_our_own_server(opening: bool, tls: bool, step: int) -> None:
    server = Handshake(TlsMode.REQUIRED if tls else TlsMode.OFF)
    found = talk(ClientHandshake("web", opening=opening, tls=tls), server, step)
    assert found.size == 1 << 30
    assert found.flags & FLAG_SEND_TRIM
    assert (found.minimum_block, found.preferred_block, found.maximum_payload) == (
        1,
        4096,
        MAX_PAYLOAD,
    )


def test_a_snapshot_is_read_only() -> None:
    found = talk(ClientHandshake("web@monday", opening=True, tls=False), Handshake())
    assert found.flags & FLAG_READ_ONLY


@pytest.mark.parametrize(
    ("name", "tls", "mode", "kind", "words"),
    [
        ("none", False, TlsMode.OFF, OptionReply.ERR_UNKNOWN, "there is no volume none"),
        ("web", True, TlsMode.OFF, OptionReply.ERR_UNSUP, "does not offer TLS"),
        ("web", False, TlsMode.REQUIRED, OptionReply.ERR_TLS_REQD, "wants TLS"),
    ],
)
def test_refusals(name: str, tls: bool, mode: TlsMode, kind: OptionReply, words: str) -> None:
    with pytest.raises(HandshakeError, match=words) as caught:
        talk(ClientHandshake(name, opening=True, tls=tls), Handshake(mode))
    assert caught.value.reply == kind


def test_what_the_server_says_becomes_one_harmless_line() -> None:
    with pytest.raises(HandshakeError) as caught:
        hear(reply(OptionReply.ERR_POLICY, "no\n\x1b[2Jwords \xff".encode("latin-1")))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([reply(OptionReply.ACK)], "did not tell the size"),
        ([information(), reply(OptionReply.SERVER)], "unknown type"),
        ([reply(OptionReply.ACK, option=Option.LIST)], "not asked"),
        ([reply(OptionReply.INFO, b"\0")], "without a type"),
        ([reply(OptionReply.INFO, b"\0\0\0")], "3 bytes"),
        ([information()] * (MAX_REPLIES + 1), "does not come to an end"),
        ([struct.pack(">QIII", OPTION_REPLY_MAGIC, Option.GO, 3, MAX_REPLY + 1)], "a reply of"),
        ([bytes(20)], "not asked"),
        ([reply((1 << 31) + 999)], "0x800003e7"),
    ],
)
def test_wrong_answers(said: list[bytes], words: str) -> None:
    with pytest.raises(HandshakeError, match=words):
        hear(*said)


def test_unknown_information_is_ignored() -> None:
    other = reply(OptionReply.INFO, struct.pack(">H", 77) + b"whatever")
    assert hear(other, information(8192), reply(OptionReply.ACK)) == ExportInformation(8192, 1)


def test_plain_text_behind_starttls_is_refused() -> None:
    acknowledged = reply(OptionReply.ACK, option=Option.STARTTLS)
    with pytest.raises(HandshakeError, match="plain text"):
        hear(acknowledged + b"x", tls=True)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n", bytes(18)])
def test_no_nbd_server(greeting: bytes) -> None:
    client = ClientHandshake("web", opening=True, tls=False)
    client.receive(greeting)
    with pytest.raises(HandshakeError, match="no NBD server"):
        client.next_event()


def test_a_server_that_is_too_old() -> None:
    client = ClientHandshake("web", opening=True, tls=False)
    client.receive(struct.pack(">QQH", 0x4E42444D41474943, OPTION_MAGIC, 0))
    with pytest.raises(HandshakeError, match="too old"):
        client.next_event()


@given(st.lists(st.binary(max_size=64)))
def test_any_bytes(pieces: list[bytes]) -> None:
    client = ClientHandshake("web", opening=True, tls=False)
    client.receive(GREETING)
    for piece in pieces:
        client.receive(piece)
        try:
            client.next_event()
        except HandshakeError:
            return
