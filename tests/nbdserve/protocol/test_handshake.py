"""The handshake: every option, well and badly formed, and input cut anywhere."""

import struct
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol.constants import (
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_CAN_MULTI_CONN,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    Info,
    Option,
    OptionReply,
    ReplyStyle,
)
from nbdserve.protocol.handshake import (
    MAX_CONTEXTS,
    MAX_OPTION,
    DescribeExport,
    Ended,
    Handshake,
    ListExports,
    OpenExport,
    StartTls,
    TlsMode,
)
from nbdserve.protocol.options import ExportDescription

DISK = ExportDescription("disk", 1 << 30, False, 4096, "a disk")
SNAPSHOT = ExportDescription("disk@one", 1 << 20, True, 4096)
DEPTH = "qemu:allocation-depth"
BITMAPS = [f"qemu:dirty-bitmap:{number}" for number in range(20)]
MANY = ExportDescription(
    "many", 1 << 20, False, 4096, contexts=("base:allocation", DEPTH, *BITMAPS), rotational=True
)
EXPORTS = {export.name: export for export in (DISK, SNAPSHOT, MANY)}

BOTH_FLAGS = struct.pack(">I", 3)
WRITABLE = (
    FLAG_HAS_FLAGS
    | FLAG_SEND_FLUSH
    | FLAG_SEND_FUA
    | FLAG_SEND_TRIM
    | FLAG_SEND_WRITE_ZEROES
    | FLAG_SEND_FAST_ZERO
    | FLAG_CAN_MULTI_CONN
    | FLAG_SEND_CACHE
)


def option(kind, data=b"", length=None):
    return struct.pack(">8sII", b"IHAVEOPT", kind, len(data) if length is None else length) + data


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack(">I", len(data)) + data


def info(name, *wanted):
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def contexts(name, *queries):
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def replies(data):
    """Cut option replies apart: [(option, type, data)]."""
    found = []
    while data:
        magic, kind, reply, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        assert len(data) >= 20 + length
        found.append((kind, OptionReply(reply), data[20 : 20 + length]))
        data = data[20 + length :]
    return found


class Peer:
    """Drives a handshake as a server with EXPORTS would."""

    def __init__(self, flags=BOTH_FLAGS, tls=TlsMode.OFF):
        self.handshake = Handshake(tls)
        self.greeting = self.handshake.data_to_send()
        self.opened = None
        self.ended = None
        self.securing = False
        self.feed(flags)

    def feed(self, data):
        """Give data; returns what is sent in answer."""
        self.handshake.receive(data)
        while self.opened is None and self.ended is None and not self.securing:
            event = self.handshake.next_event()
            if event is None:
                break
            self.on_event(event)
        return self.handshake.data_to_send()

    def on_event(self, event):
        if isinstance(event, Ended):
            self.ended = event.reason
        elif isinstance(event, StartTls):
            self.securing = True
        elif isinstance(event, ListExports):
            self.handshake.answer_list(EXPORTS)
        elif event.name not in EXPORTS:
            self.handshake.refuse(f"there is no export {event.name!r}")
        elif isinstance(event, OpenExport):
            self.handshake.answer_open(EXPORTS[event.name])
            self.opened = event.name
        else:
            assert isinstance(event, DescribeExport)
            self.handshake.answer_describe(EXPORTS[event.name])

    def ask(self, kind, data=b"", length=None):
        found = replies(self.feed(option(kind, data, length)))
        assert all(replied == kind for replied, _, _ in found)
        return [(reply, payload) for _, reply, payload in found]

    def error(self, kind, data=b"", length=None):
        """Ask, expecting one error with a text; returns its type."""
        ((reply, text),) = self.ask(kind, data, length)
        assert reply >= 1 << 31
        assert text.decode().isprintable() and text
        return reply


def test_greeting():
    assert Peer().greeting == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("flags", [4, 1 << 31, 7])
def test_unknown_client_flags_end_the_connection(flags):
    assert "flags" in Peer(struct.pack(">I", flags)).ended


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name(flags, padding):
    peer = Peer(struct.pack(">I", flags))
    answer = peer.feed(option(Option.EXPORT_NAME, b"disk"))
    assert answer == struct.pack(">QH", DISK.size, WRITABLE) + bytes(padding)
    assert peer.opened == "disk"


@pytest.mark.parametrize(
    "option_bytes",
    [
        option(Option.EXPORT_NAME, b"nothing"),
        option(Option.EXPORT_NAME, b"\xff"),
        option(Option.EXPORT_NAME, b"di\0sk"),
        option(Option.EXPORT_NAME, b"x" * 4097),
        option(Option.EXPORT_NAME, b"", length=MAX_OPTION + 1),
    ],
)
def test_export_name_that_cannot_be_had_ends_the_connection(option_bytes):
    peer = Peer()
    assert peer.feed(option_bytes) == b""
    assert peer.ended and peer.opened is None


@pytest.mark.parametrize("kind", [kind for kind in Option if kind != Option.EXPORT_NAME] + [99])
def test_client_without_fixed_newstyle_may_only_name_an_export(kind):
    peer = Peer(struct.pack(">I", 2))
    assert peer.feed(option(kind)) == b""
    assert "fixed newstyle" in peer.ended


def test_abort_is_acknowledged_whatever_it_carries():
    peer = Peer()
    assert peer.ask(Option.ABORT, b"goodbye") == [(OptionReply.ACK, b"")]
    assert peer.ended


def test_wrong_option_magic_ends_the_connection():
    peer = Peer()
    assert peer.feed(b"IHAVEOPX" + bytes(8)) == b""
    assert "magic" in peer.ended


def test_list():
    assert Peer().ask(Option.LIST) == [
        (OptionReply.SERVER, string("disk")),
        (OptionReply.SERVER, string("disk@one")),
        (OptionReply.SERVER, string("many")),
        (OptionReply.ACK, b""),
    ]


@pytest.mark.parametrize(
    "kind", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]
)
def test_options_that_take_no_data(kind):
    peer = Peer()
    assert peer.error(kind, b"?") == OptionReply.ERR_INVALID
    assert peer.handshake.style is ReplyStyle.SIMPLE


@pytest.mark.parametrize("kind", [Option.STARTTLS, Option.PEEK_EXPORT, 0, 12, 0xFFFFFFFF])
def test_options_that_are_not_offered(kind):
    peer = Peer()
    assert peer.error(kind) == OptionReply.ERR_UNSUP
    assert peer.ask(Option.LIST)[-1][0] == OptionReply.ACK


def test_unknown_option_with_data_is_skipped():
    peer = Peer()
    assert peer.error(77, b"x" * 1000) == OptionReply.ERR_UNSUP
    assert peer.ask(Option.LIST)[-1][0] == OptionReply.ACK


@pytest.mark.parametrize("kind", [Option.LIST, Option.GO, Option.SET_META_CONTEXT, 77])
def test_option_that_is_too_long_is_read_past_without_being_kept(kind):
    peer = Peer()
    length = 10 << 20
    assert peer.feed(option(kind, b"", length)) == b""
    for _ in range(10):
        assert peer.feed(bytes((1 << 20) - 1)) == b""
        assert len(peer.handshake.trailing_data) == 0
    ((_, reply, _),) = replies(peer.feed(bytes(10)))
    assert reply == OptionReply.ERR_TOO_BIG
    assert peer.ask(Option.LIST)[-1][0] == OptionReply.ACK


def test_info_gives_only_what_was_asked_for_and_the_export():
    peer = Peer()
    export = struct.pack(">HQH", Info.EXPORT, DISK.size, WRITABLE)
    assert peer.ask(Option.INFO, info("disk")) == [
        (OptionReply.INFO, export),
        (OptionReply.ACK, b""),
    ]
    assert peer.ask(Option.INFO, info("disk", 3, 2, 1, 3, 999)) == [
        (OptionReply.INFO, export),
        (OptionReply.INFO, struct.pack(">H", Info.NAME) + b"disk"),
        (OptionReply.INFO, struct.pack(">H", Info.DESCRIPTION) + b"a disk"),
        (OptionReply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 32 << 20)),
        (OptionReply.ACK, b""),
    ]
    assert peer.opened is None


def test_go_says_the_same_as_info_and_begins_the_transmission():
    peer = Peer()
    said = peer.ask(Option.INFO, info("disk", 1, 2, 3))
    assert peer.ask(Option.GO, info("disk", 1, 2, 3)) == said
    assert peer.opened == "disk"


def test_transmission_flags():
    peer = Peer()
    assert peer.ask(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
    (_, data), _ = peer.ask(Option.INFO, info("disk"))
    assert struct.unpack(">HQH", data)[2] == WRITABLE | FLAG_SEND_DF
    (_, data), _ = peer.ask(Option.INFO, info("disk@one"))
    flags = struct.unpack(">HQH", data)[2]
    assert flags & FLAG_READ_ONLY
    assert not flags & (FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO)


def flags_of(peer, name):
    (_, data), _ = peer.ask(Option.INFO, info(name))
    return struct.unpack(">HQH", data)[2]


def test_rotational():
    assert flags_of(Peer(), "many") == WRITABLE | FLAG_ROTATIONAL


def test_status_payload_is_for_clients_with_extended_headers_and_contexts():
    peer = structured_peer()
    peer.ask(Option.SET_META_CONTEXT, contexts("disk", "base:allocation"))
    assert not flags_of(peer, "disk") & FLAG_BLOCK_STATUS_PAYLOAD
    peer.ask(Option.EXTENDED_HEADERS)
    assert flags_of(peer, "disk") == WRITABLE | FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD
    assert not flags_of(peer, "disk@one") & FLAG_BLOCK_STATUS_PAYLOAD
    peer.ask(Option.SET_META_CONTEXT, contexts("disk"))
    assert not flags_of(peer, "disk") & FLAG_BLOCK_STATUS_PAYLOAD


def test_extended_headers_need_nothing_before_and_supersede_structured_replies():
    peer = Peer()
    assert peer.ask(Option.EXTENDED_HEADERS) == [(OptionReply.ACK, b"")]
    assert peer.handshake.style is ReplyStyle.EXTENDED
    assert peer.error(Option.STRUCTURED_REPLY) == OptionReply.ERR_EXT_HEADER_REQD
    assert peer.handshake.style is ReplyStyle.EXTENDED
    assert peer.ask(Option.SET_META_CONTEXT, contexts("disk", "base:allocation"))[0][1]
    assert peer.ask(Option.EXTENDED_HEADERS) == [(OptionReply.ACK, b"")]
    assert peer.ask(Option.GO, info("disk"))[-1] == (OptionReply.ACK, b"")
    assert peer.handshake.contexts == ((1, "base:allocation"),)


def test_export_name_after_extended_headers_ends_the_connection():
    peer = Peer()
    peer.ask(Option.EXTENDED_HEADERS)
    assert peer.feed(option(Option.EXPORT_NAME, b"disk")) == b""
    assert peer.ended
    assert peer.opened is None


@pytest.mark.parametrize("kind", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", OptionReply.ERR_INVALID),
        (b"\0\0\0", OptionReply.ERR_INVALID),
        (string("disk"), OptionReply.ERR_INVALID),
        (struct.pack(">I", 100) + b"disk", OptionReply.ERR_INVALID),
        (struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0", OptionReply.ERR_INVALID),
        (string("disk") + b"\0", OptionReply.ERR_INVALID),
        (string("disk") + b"\0\2\0\0", OptionReply.ERR_INVALID),
        (string("disk") + b"\0\1\0\0\0", OptionReply.ERR_INVALID),
        (info(b"\xc3"), OptionReply.ERR_INVALID),
        (info("di\0sk"), OptionReply.ERR_INVALID),
        (info("x" * 4097), OptionReply.ERR_TOO_BIG),
        (info(""), OptionReply.ERR_UNKNOWN),
        (info("nothing", 3), OptionReply.ERR_UNKNOWN),
        (info("x" * 4096), OptionReply.ERR_UNKNOWN),
    ],
)
def test_malformed_info_and_go(kind, data, error):
    peer = Peer()
    assert peer.error(kind, data) == error
    assert peer.ask(Option.GO, info("disk"))[-1][0] == OptionReply.ACK


def structured_peer():
    peer = Peer()
    peer.ask(Option.STRUCTURED_REPLY)
    return peer


ALLOCATION = b"base:allocation"


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], True),
        (["base:"], True),
        (["base:allocation"], True),
        (["x-mine:a", "base:allocation", "base:allocation"], True),
        (["base:other"], False),
        (["qemu:dirty-bitmap:x"], False),
    ],
)
def test_list_meta_context(queries, found):
    expected = [(OptionReply.META_CONTEXT, bytes(4) + ALLOCATION)] if found else []
    peer = structured_peer()
    assert peer.ask(Option.LIST_META_CONTEXT, contexts("disk", *queries)) == [
        *expected,
        (OptionReply.ACK, b""),
    ]
    peer.ask(Option.GO, info("disk"))
    assert peer.handshake.contexts == ()


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], False),
        (["base:"], False),
        (["base:allocation"], True),
        (["qemu:allocation-depth", "base:allocation"], True),
        (["base:other"], False),
    ],
)
def test_set_meta_context(queries, found):
    peer = structured_peer()
    *chosen, last = peer.ask(Option.SET_META_CONTEXT, contexts("disk", *queries))
    assert last == (OptionReply.ACK, b"")
    assert [(reply, data[4:]) for reply, data in chosen] == (
        [(OptionReply.META_CONTEXT, ALLOCATION)] if found else []
    )
    peer.ask(Option.GO, info("disk"))
    if found:
        assert chosen[0][1][:4] == struct.pack(">I", peer.handshake.contexts[0][0])
    else:
        assert peer.handshake.contexts == ()


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], ["base:allocation", DEPTH, *BITMAPS]),
        (["qemu:"], [DEPTH, *BITMAPS]),
        (["base:", "qemu:dirty-bitmap:"], ["base:allocation", *BITMAPS]),
        (["qemu:dirty-bitmap:1"], BITMAPS[1:2]),
        (["qemu:dirty-bitmap", "qemu:dirty-bitmap:2 "], []),
    ],
)
def test_list_finds_by_prefixes_that_end_in_a_colon(queries, found):
    *listed, last = structured_peer().ask(Option.LIST_META_CONTEXT, contexts("many", *queries))
    assert listed == [(OptionReply.META_CONTEXT, bytes(4) + name.encode()) for name in found]
    assert last == (OptionReply.ACK, b"")


def test_set_selects_whole_names_only_each_with_a_number_of_its_own():
    peer = structured_peer()
    queries = ["qemu:dirty-bitmap:7", DEPTH, "qemu:", "qemu:dirty-bitmap:", DEPTH, "qemu:x"]
    replies = peer.ask(Option.SET_META_CONTEXT, contexts("many", *queries))
    named = [(1, DEPTH), (2, BITMAPS[7])]
    assert replies == [
        *((OptionReply.META_CONTEXT, struct.pack(">I", n) + name.encode()) for n, name in named),
        (OptionReply.ACK, b""),
    ]
    peer.ask(Option.GO, info("many"))
    assert peer.handshake.contexts == tuple(named)


def test_too_many_contexts():
    peer = structured_peer()
    most = BITMAPS[:MAX_CONTEXTS]
    assert len(peer.ask(Option.SET_META_CONTEXT, contexts("many", *most))) == MAX_CONTEXTS + 1
    refused = contexts("many", *BITMAPS[: MAX_CONTEXTS + 1])
    assert peer.error(Option.SET_META_CONTEXT, refused) == OptionReply.ERR_TOO_BIG
    peer.ask(Option.GO, info("many"))
    assert peer.handshake.contexts == ()


@pytest.mark.parametrize("kind", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", OptionReply.ERR_INVALID),
        (string("disk"), OptionReply.ERR_INVALID),
        (contexts("disk") + b"x", OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">I", 0xFFFFFFFF), OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">II", 1, 50) + b"base:", OptionReply.ERR_INVALID),
        (contexts("disk", "allocation"), OptionReply.ERR_INVALID),
        (contexts("disk", ":allocation"), OptionReply.ERR_INVALID),
        (contexts("disk", b"base:\xff"), OptionReply.ERR_INVALID),
        (contexts("disk", "x" * 4097), OptionReply.ERR_TOO_BIG),
        (contexts("nothing", "base:allocation"), OptionReply.ERR_UNKNOWN),
    ],
)
def test_malformed_meta_context(kind, data, error):
    assert structured_peer().error(kind, data) == error


@pytest.mark.parametrize("kind", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_meta_context_needs_structured_replies(kind):
    assert Peer().error(kind, contexts("disk", "base:allocation")) == OptionReply.ERR_INVALID


def test_meta_context_holds_for_its_export_only():
    peer = structured_peer()
    peer.ask(Option.SET_META_CONTEXT, contexts("disk", "base:allocation"))
    peer.ask(Option.GO, info("disk@one"))
    assert peer.handshake.contexts == ()


@pytest.mark.parametrize(
    "failing",
    [contexts("disk", "broken"), contexts("nothing"), contexts("disk"), bytes(MAX_OPTION + 1)],
)
def test_failed_or_empty_set_meta_context_takes_back_the_earlier_one(failing):
    peer = structured_peer()
    peer.ask(Option.SET_META_CONTEXT, contexts("disk", "base:allocation"))
    peer.ask(Option.SET_META_CONTEXT, failing)
    peer.ask(Option.GO, info("disk"))
    assert peer.handshake.contexts == ()


SESSION = b"".join(
    [
        BOTH_FLAGS,
        option(Option.LIST, b"?"),
        option(Option.STRUCTURED_REPLY),
        option(77, b"x" * 50),
        option(Option.SET_META_CONTEXT, contexts("disk", "base:allocation")),
        option(Option.INFO, info("nothing")),
        option(Option.GO, info("disk", 3)),
        b"first request",
    ]
)


def test_split_at_every_byte():
    whole = Peer(b"")
    expected = whole.feed(SESSION)
    assert whole.opened == "disk"
    bytewise = Peer(b"")
    sent = b"".join(bytewise.feed(SESSION[i : i + 1]) for i in range(len(SESSION)))
    assert sent == expected
    assert bytewise.handshake.trailing_data == b"first request"
    for cut in range(len(SESSION)):
        peer = Peer(b"")
        assert peer.feed(SESSION[:cut]) + peer.feed(SESSION[cut:]) == expected
        assert peer.handshake.contexts


@given(st.binary(max_size=200))
def test_garbage_never_raises(data):
    peer = Peer(b"")
    peer.feed(data)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.binary(max_size=60)
            | st.sampled_from(
                [
                    info("disk"),
                    contexts("disk", "base:allocation"),
                    string("disk"),
                ]
            ),
        ),
        max_size=8,
    ),
    st.integers(1, 30),
)
def test_every_option_gets_one_final_reply(options, step):
    peer = Peer()
    for kind, data in options:
        message = option(kind, data)
        sent = b"".join(peer.feed(message[i : i + step]) for i in range(0, len(message), step))
        if peer.ended is not None or peer.opened is not None:
            return
        found = replies(sent)
        finals = [reply for _, reply, _ in found if reply == 1 or reply >= 1 << 31]
        assert len(finals) == 1
        assert found[-1][1] == finals[0]


def test_error_text_is_cut_at_the_longest_string():
    peer = Peer(b"")
    peer.handshake.receive(BOTH_FLAGS + option(Option.INFO, info("disk")))
    assert isinstance(peer.handshake.next_event(), DescribeExport)
    peer.handshake.refuse("ü" * 5000)
    ((_, _, text),) = replies(peer.handshake.data_to_send())
    assert len(text) <= 4096
    assert set(text.decode()) == {"ü"}


def test_many_exports_are_listed_in_full():
    handshake = Handshake()
    handshake.data_to_send()
    handshake.receive(BOTH_FLAGS + option(Option.LIST))
    assert isinstance(handshake.next_event(), ListExports)
    numbers = count()
    handshake.answer_list(f"volume{next(numbers)}" for _ in range(10000))
    assert len(replies(handshake.data_to_send())) == 10001
