"""The handshake with TLS: what is answered before, what is left after, what ends it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol.constants import Option, OptionReply, ReplyStyle
from nbdserve.protocol.handshake import MAX_OPTION, TlsMode

from .test_handshake import BOTH_FLAGS, DISK, WRITABLE, Peer, contexts, info, option

ACK = [(OptionReply.ACK, b"")]
WITH_TLS = [TlsMode.OPTIONAL, TlsMode.REQUIRED]
ORDINARY = [
    (Option.LIST, b""),
    (Option.INFO, info("disk")),
    (Option.GO, info("disk")),
    (Option.STRUCTURED_REPLY, b""),
    (Option.LIST_META_CONTEXT, contexts("disk")),
    (Option.SET_META_CONTEXT, contexts("disk", "base:allocation")),
]


def secured(mode, flags=BOTH_FLAGS):
    peer = Peer(flags, mode)
    start_tls(peer)
    return peer


def start_tls(peer):
    assert peer.ask(Option.STARTTLS) == ACK
    assert peer.securing
    peer.securing = False
    peer.handshake.tls_started()


@pytest.mark.parametrize("mode", WITH_TLS)
def test_all_options_work_once_tls_has_started(mode):
    peer = secured(mode)
    for kind in (Option.LIST, Option.INFO, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT):
        assert peer.ask(kind, dict(ORDINARY)[kind])[-1:] == ACK
    assert peer.ask(Option.GO, info("disk"))[-1:] == ACK
    assert peer.opened == "disk"
    assert peer.handshake.style is ReplyStyle.STRUCTURED
    assert peer.handshake.contexts


@pytest.mark.parametrize(("kind", "data"), [*ORDINARY, (Option.EXTENDED_HEADERS, b""), (99, b"?")])
def test_required_tls_comes_before_every_option(kind, data):
    peer = Peer(tls=TlsMode.REQUIRED)
    assert peer.error(kind, data) == OptionReply.ERR_TLS_REQD
    assert peer.error(kind, b"nonsense") == OptionReply.ERR_TLS_REQD
    assert peer.error(kind, bytes(MAX_OPTION + 1)) == OptionReply.ERR_TLS_REQD
    assert peer.opened is None
    assert peer.handshake.style is ReplyStyle.SIMPLE
    start_tls(peer)
    assert peer.ask(Option.LIST)[-1:] == ACK


def test_required_tls_and_export_name_end_the_connection():
    peer = Peer(tls=TlsMode.REQUIRED)
    assert peer.feed(option(Option.EXPORT_NAME, b"disk")) == b""
    assert "TLS" in peer.ended
    peer = secured(TlsMode.REQUIRED)
    assert peer.feed(option(Option.EXPORT_NAME, b"disk")) == struct.pack(">QH", DISK.size, WRITABLE)


def test_abort_needs_no_tls():
    peer = Peer(tls=TlsMode.REQUIRED)
    assert peer.ask(Option.ABORT) == ACK
    assert peer.ended


@pytest.mark.parametrize(("kind", "data"), ORDINARY[:2] + ORDINARY[3:4])
def test_optional_tls_can_be_left_alone(kind, data):
    peer = Peer(tls=TlsMode.OPTIONAL)
    assert peer.ask(kind, data)[-1:] == ACK


@pytest.mark.parametrize("mode", TlsMode)
def test_tls_errors_are_never_about_missing_tls_without_need(mode):
    peer = Peer(tls=mode) if mode is not TlsMode.REQUIRED else secured(mode)
    assert peer.error(99) == OptionReply.ERR_UNSUP
    assert peer.error(Option.GO, info("nothing")) == OptionReply.ERR_UNKNOWN
    assert peer.error(Option.LIST, bytes(MAX_OPTION + 1)) == OptionReply.ERR_TOO_BIG


@pytest.mark.parametrize("mode", WITH_TLS)
def test_second_starttls_is_invalid(mode):
    peer = secured(mode)
    assert peer.error(Option.STARTTLS) == OptionReply.ERR_INVALID
    assert peer.error(Option.STARTTLS, b"data") == OptionReply.ERR_INVALID
    assert peer.ask(Option.LIST)[-1:] == ACK


@pytest.mark.parametrize("mode", WITH_TLS)
def test_starttls_with_data_is_invalid_and_can_be_repeated(mode):
    peer = Peer(tls=mode)
    assert peer.error(Option.STARTTLS, b"data") == OptionReply.ERR_INVALID
    assert peer.error(Option.STARTTLS, bytes(MAX_OPTION + 1)) >= OptionReply.ERR_UNSUP
    start_tls(peer)


def test_what_was_chosen_before_tls_is_forgotten():
    peer = Peer(tls=TlsMode.OPTIONAL)
    peer.ask(Option.STRUCTURED_REPLY)
    peer.ask(Option.SET_META_CONTEXT, contexts("disk", "base:allocation"))
    start_tls(peer)
    assert peer.handshake.style is ReplyStyle.SIMPLE
    assert (
        peer.error(Option.SET_META_CONTEXT, contexts("disk", "base:allocation"))
        == OptionReply.ERR_INVALID
    )
    peer.ask(Option.STRUCTURED_REPLY)
    peer.ask(Option.GO, info("disk"))
    assert peer.handshake.contexts == ()


def test_client_flags_are_not_negotiated_again():
    peer = secured(TlsMode.REQUIRED, struct.pack(">I", 1))
    assert len(peer.feed(option(Option.EXPORT_NAME, b"disk"))) == 10 + 124


@pytest.mark.parametrize("mode", WITH_TLS)
@given(behind=st.binary(min_size=1, max_size=40))
def test_plain_text_behind_starttls_ends_the_connection(mode, behind):
    peer = Peer(tls=mode)
    assert peer.feed(option(Option.STARTTLS) + behind) == b""
    assert "plain text" in peer.ended
    assert not peer.securing


def test_plain_text_behind_a_refused_starttls_is_the_next_option():
    peer = Peer(tls=TlsMode.OPTIONAL)
    answer = peer.feed(option(Option.STARTTLS, b"?") + option(Option.STRUCTURED_REPLY))
    assert answer and peer.handshake.style is ReplyStyle.STRUCTURED
    assert peer.ended is None


def test_client_without_fixed_newstyle_gets_no_tls():
    peer = Peer(struct.pack(">I", 2), TlsMode.OPTIONAL)
    assert peer.feed(option(Option.STARTTLS)) == b""
    assert "fixed newstyle" in peer.ended
