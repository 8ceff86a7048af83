"""Target: the handshake, given any bytes, cut anywhere, with its questions answered anyhow.

Input: 6 bytes of terms (which TLS, whether data comes right behind STARTTLS, how questions are
answered, how many contexts and exports there are, the cuts), then what the client sends.

Rules:

- No exception; ``next_event`` comes to an end.
- The output is what the specification allows in answer to exactly these options: read here a second
  time, option by option, each with one final reply, or the end of the connection where it is due.
- The same bytes, cut in other places, lead to the same output, events and agreement.
- What is kept of the input is at most one option; the output is bounded by what was asked.
- The contexts agreed on are those of the last SET_META_CONTEXT for the export that is opened.
"""

import random
import struct
from dataclasses import dataclass, field
from itertools import pairwise

from nbdserve.protocol.constants import OptionReply
from nbdserve.protocol.handshake import (
    DescribeExport,
    Ended,
    Handshake,
    ListExports,
    OpenExport,
    StartTls,
    TlsMode,
)
from nbdserve.protocol.options import ExportDescription

from . import wire
from .wire import check

TERMS = 6
GREETING = b"NBDMAGICIHAVEOPT\0\3"
MODES = (TlsMode.OFF, TlsMode.OPTIONAL, TlsMode.REQUIRED, TlsMode.OPTIONAL)
SIZE = 1 << 30
BYTEWISE = 400  # longest input that is also given byte by byte
CONTEXTS = (
    "base:allocation",
    "qemu:allocation-depth",
    *(f"qemu:dirty-bitmap:snapshot-{number}" for number in range(20)),
)


@dataclass
class Terms:
    """What the first bytes of the input say."""

    mode: TlsMode
    rude: bool  # sends on right behind STARTTLS
    read_only: bool
    answers: int
    contexts: int
    exports: int
    cuts: int

    @classmethod
    def of(cls, data):
        kind, answers, more, contexts, exports, cuts = data[:TERMS].ljust(TERMS, b"\0")
        return cls(
            MODES[kind & 3],
            bool(kind & 4),
            bool(kind & 8),
            answers << 8 | more,
            contexts % (len(CONTEXTS) + 1),
            exports % 40,
            cuts,
        )


@dataclass
class Transcript:
    """What one run led to."""

    output: bytes = b""
    events: list = field(default_factory=list)
    agreed: tuple = ()
    rest: bytes = b""
    end: str = "waiting"  # or "ended", "done"


def run(data):
    """Check one input."""
    terms = Terms.of(data)
    sent = data[TERMS:]
    borders = [end for kind, end in _options(sent) if kind == wire.STARTTLS]
    whole = _drive(terms, sent, [] if terms.rude else borders)
    _Reading(terms, sent, whole).check()
    dice = random.Random(terms.cuts)
    cuts = sorted({dice.randrange(len(sent) + 1) for _ in range(1 + terms.cuts % 8)})
    ways = [cuts]
    if len(sent) <= BYTEWISE:
        ways.append(list(range(len(sent))))
    for way in ways:
        at = set(way) - set(borders) if terms.rude else set(way) | set(borders)
        other = _drive(terms, sent, sorted(at))
        check(other == whole, f"cut at {sorted(at)}: {other} instead of {whole}")


def _options(sent):
    """(kind, where it ends) of the options that lie in ``sent``."""
    at = 4
    while at + wire.OPTION_HEADER.size <= len(sent):
        magic, kind, length = wire.OPTION_HEADER.unpack_from(sent, at)
        at += wire.OPTION_HEADER.size + length
        if magic != wire.IHAVEOPT or at > len(sent):
            return
        yield kind, at


def _drive(terms, sent, cuts):
    """Give the handshake ``sent`` in pieces."""
    handshake = Handshake(terms.mode)
    found = Transcript()
    places = [0, *(cut for cut in cuts if 0 < cut < len(sent)), len(sent)]
    asked = 0
    for start, stop in pairwise(places):
        handshake.receive(sent[start:stop])
        for _ in range((stop - start) // 16 + 8):
            event = handshake.next_event()
            if event is None:
                break
            # Why it ended may say how much there was to read.
            found.events.append(Ended if isinstance(event, Ended) else event)
            if isinstance(event, Ended):
                check(event.reason and "\n" not in event.reason, "no reason of one line")
                found.end = "ended"
            elif isinstance(event, StartTls):
                handshake.tls_started()
            elif _answer(terms, handshake, event, asked):
                found.end = "done"
                found.agreed = (handshake.style, handshake.contexts)
            if found.end != "waiting":
                break
            asked += not isinstance(event, StartTls)
        else:
            raise wire.ProtocolError("more events than options")
        found.output += handshake.data_to_send()
        if found.end != "waiting":
            if found.end == "done":
                found.rest = handshake.trailing_data + sent[stop:]
            break
        kept = len(handshake._input)
        check(kept < wire.MAX_OPTION + 16, f"{kept} bytes of input are kept")
    return found


def _answer(terms, handshake, question, asked):
    """Answer a question; whether that was the last one."""
    choice = terms.answers >> 2 * (asked % 8) & 3
    if choice == 3:
        handshake.refuse("because of the \udcff terms " * 300, OptionReply.ERR_POLICY)
    elif isinstance(question, ListExports):
        if choice == 2:
            handshake.refuse("the server is shutting down", OptionReply.ERR_SHUTDOWN)
        else:
            handshake.answer_list([f"disk-{number}" for number in range(terms.exports)])
    else:
        assert isinstance(question, DescribeExport | OpenExport)
        name = question.name
        check("\0" not in name and len(name.encode()) <= wire.MAX_STRING, "a name")
        if choice == 2:
            handshake.refuse("there is no such export")
            return False
        description = ExportDescription(
            name, SIZE, terms.read_only, 4096, "", CONTEXTS[: terms.contexts]
        )
        if isinstance(question, OpenExport):
            handshake.answer_open(description)
            return True
        handshake.answer_describe(description)
    return False


class _Reading:
    """Reads what was sent and what was answered side by side."""

    def __init__(self, terms, sent, found):
        self.terms = terms
        self.sent = sent
        self.found = found
        self.at = len(GREETING)
        self.secure = False
        self.style = wire.SIMPLE_REPLIES
        self.contexts = (None, ())  # export, what was chosen

    def check(self):
        """The whole of it."""
        output = self.found.output
        check(output.startswith(GREETING), "the greeting")
        end = self._read()
        check(self.found.end == end, f"{self.found.end} instead of {end}")
        check(self.at == len(output), f"{len(output) - self.at} bytes too much were answered")

    def _read(self):
        """How it must end."""
        sent = self.sent
        if len(sent) < 4:
            return "waiting"
        (flags,) = struct.unpack_from(">I", sent)
        if flags & ~3:
            return "ended"
        place = 4
        while True:
            if len(sent) - place < wire.OPTION_HEADER.size:
                return "waiting"
            magic, kind, length = wire.OPTION_HEADER.unpack_from(sent, place)
            if magic != wire.IHAVEOPT:
                return "ended"
            if not flags & 1 and kind != wire.EXPORT_NAME:
                return "ended"
            if kind == wire.EXPORT_NAME and length > wire.MAX_OPTION:
                return "ended"
            data = sent[place + 16 : place + 16 + length]
            if len(data) < length:
                return "waiting"
            place += 16 + length
            if kind == wire.EXPORT_NAME:
                return self._export_name(flags, data, place)
            reply, infos = self._replies(kind)
            self._judge(kind, data, reply, infos)
            if kind == wire.ABORT and length <= wire.MAX_OPTION:
                check(reply == wire.ACK, "ABORT without ACK")
                return "ended"
            if reply != wire.ACK:
                plain_text_follows = kind == wire.STARTTLS and reply is None
                if plain_text_follows:
                    check(self.terms.rude and place < len(sent), "STARTTLS without a reply")
                    return "ended"
                continue
            if kind == wire.GO:
                self._agreed(data[4 : 4 + struct.unpack_from(">I", data)[0]])
                check(self.found.rest == sent[place:], "what follows the handshake is lost")
                return "done"

    def _replies(self, kind):
        """The final reply to one option (None: the connection ends), and those before it."""
        infos = []
        if kind == wire.STARTTLS and self.at == len(self.found.output):
            return None, infos
        while True:
            reply, payload, self.at = wire.read_option_reply(self.found.output, self.at, kind)
            if reply == wire.ACK or reply & wire.ERROR_BIT:
                check(reply == wire.ACK or not infos, "an error behind other replies")
                return reply, infos
            infos.append((reply, payload))

    def _judge(self, kind, data, reply, infos):
        """What the reply must have been, as far as it does not depend on how we answer."""
        if self.terms.mode is TlsMode.REQUIRED and not self.secure:
            if kind not in (wire.STARTTLS, wire.ABORT) or len(data) > wire.MAX_OPTION:
                expected = (wire.TLS_REQD,)
                if kind in (wire.STARTTLS, wire.ABORT):
                    expected = (wire.TOO_BIG,)
                check(reply in expected, f"option {kind} before TLS: {reply}")
                return
        elif len(data) > wire.MAX_OPTION:
            check(reply == wire.TOO_BIG, f"an option of {len(data)} bytes: {reply:#x}")
        if reply == wire.TOO_BIG and kind == wire.SET_META:
            self.contexts = (None, ())
        if len(data) > wire.MAX_OPTION:
            return
        if kind in (wire.LIST, wire.STARTTLS, wire.STRUCTURED, wire.EXTENDED) and data:
            check(reply == wire.INVALID, f"option {kind} with data: {reply}")
            return
        if kind == wire.STARTTLS:
            if reply == wire.ACK:
                check(self.terms.mode is not TlsMode.OFF and not self.secure, "TLS was accepted")
                self.secure = True
                self.style = wire.SIMPLE_REPLIES
                self.contexts = (None, ())
            elif reply is not None:
                expected = wire.INVALID if self.secure else wire.UNSUP
                check(reply == expected, f"STARTTLS was refused: {reply:#x}")
        elif kind == wire.STRUCTURED:
            if self.style == wire.EXTENDED_HEADERS:
                check(reply == wire.TOO_BIG + 1, f"STRUCTURED_REPLY after EXTENDED: {reply:#x}")
            else:
                check(reply == wire.ACK, "STRUCTURED_REPLY was refused")
                self.style = wire.STRUCTURED_REPLIES
        elif kind == wire.EXTENDED:
            check(reply == wire.ACK, "EXTENDED_HEADERS was refused")
            self.style = wire.EXTENDED_HEADERS
        elif kind in (wire.LIST_META, wire.SET_META):
            if self.style == wire.SIMPLE_REPLIES:
                check(reply == wire.INVALID, f"contexts without structured replies: {reply:#x}")
            chosen = tuple(
                (struct.unpack_from(">I", payload)[0], payload[4:].decode()) for _, payload in infos
            )
            check(all(name in CONTEXTS for _, name in chosen), f"contexts {chosen}")
            check(len({name for _, name in chosen}) == len(chosen), "a context twice")
            if kind == wire.SET_META:
                check(len({number for number, _ in chosen}) == len(chosen), "a number twice")
                check(len(chosen) <= 16, "too many contexts")
                self.contexts = (None, ())
                if reply == wire.ACK:
                    self.contexts = (data[4 : 4 + struct.unpack_from(">I", data)[0]], chosen)
        elif kind in (wire.INFO, wire.GO):
            kinds = [struct.unpack_from(">H", payload)[0] for _, payload in infos]
            check(len(set(kinds)) == len(kinds), "an information twice")
            check((0 in kinds) == (reply == wire.ACK), "NBD_INFO_EXPORT")
        elif kind == wire.LIST:
            check(reply != wire.ACK or len(infos) == self.terms.exports, "the list of exports")
        elif kind != wire.ABORT:
            check(reply == wire.UNSUP, f"option {kind}: {reply:#x}")

    def _export_name(self, flags, name, place):
        rest = len(self.found.output) - self.at
        if not rest:
            return "ended"
        check(rest == (10 if flags & 2 else 134), f"EXPORT_NAME: {rest} bytes")
        size, transmission = struct.unpack_from(">QH", self.found.output, self.at)
        check(size == SIZE and transmission & 1, "EXPORT_NAME: size and flags")
        check(self.found.output[self.at + 10 :] in (b"", bytes(124)), "EXPORT_NAME: zeroes")
        check(self.style != wire.EXTENDED_HEADERS, "EXPORT_NAME with extended headers")
        check(self.terms.mode is not TlsMode.REQUIRED or self.secure, "EXPORT_NAME before TLS")
        self.at += rest
        self._agreed(name)
        check(self.found.rest == self.sent[place:], "what follows the handshake is lost")
        return "done"

    def _agreed(self, name):
        style, contexts = self.found.agreed
        check(style.value == self.style, f"{style} was agreed on, {self.style} negotiated")
        export, chosen = self.contexts
        expected = chosen if export == name else ()
        check(contexts == expected, f"contexts {contexts} were agreed on, {expected} chosen")
