"""The client's side of the handshake as a state machine without input or output.

States and what leads from one to the next::

    GREETING --server's flags--> OPTION --ACK--> DONE
        |                         ^  |
        | TLS wanted              |  +--error reply--> HandshakeError
        v                         |
    STARTTLS --ACK--> SECURING --tls_started

Rules (specification, "Fixed newstyle negotiation", "NBD_OPT_GO", "NBD_OPT_STARTTLS"):

- The server speaks first: NBDMAGIC, IHAVEOPT, handshake flags. One without FIXED_NEWSTYLE could
  only be asked by EXPORT_NAME, which tells neither why it refuses nor its block sizes: it is not
  used here, and all servers of the last ten years know better.
- The client asks for one export, by GO (it is then open) or INFO (the client ends the connection
  afterwards). Replies to it are INFO, any number, then ACK or an error. Of what INFO says, EXPORT
  is mandatory, BLOCK_SIZE is kept and the rest is ignored.
- A client that asks for BLOCK_SIZE promises to keep to it.
- Neither structured replies nor metadata contexts are asked for: the kernel, which takes the
  connection over, knows simple replies only.
- A client that wants TLS ends the handshake when the server will not: nothing goes on in plain.
  What the server sent behind the ACK of STARTTLS in plain text could be somebody else's: it ends
  the handshake.

Use: ``receive`` what came; ask ``next_event`` until it returns None (more input is needed); send
what ``data_to_send`` returns. After ``StartTls`` let TLS begin, then call ``tls_started``.
``Agreed`` is the last event. HandshakeError is what the server refused, or did wrong.
"""

from dataclasses import dataclass
from enum import Enum, auto
from struct import Struct

from nbdserve.protocol.constants import (
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    INIT_PASSWD,
    MAX_PAYLOAD,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
)
from nbdserve.protocol.handshake import StartTls
from nbdserve.protocol.options import quoted

MAX_REPLY = 64 << 10
"""Most bytes of data of one option reply."""

MAX_REPLIES = 64
"""Most INFO replies to one option: there are four kinds, and servers may have more of their own."""

_GREETING = Struct(">QQH")
_CLIENT_FLAGS = Struct(">I")
_OPTION = Struct(">QII")
_REPLY = Struct(">QIII")
_U16 = Struct(">H")
_U32 = Struct(">I")
_EXPORT = Struct(">HQH")
_BLOCK_SIZE = Struct(">HIII")

_REASONS = {
    OptionReply.ERR_UNSUP: "the server does not know this option",
    OptionReply.ERR_POLICY: "the server does not allow it",
    OptionReply.ERR_INVALID: "the server finds the request wrong",
    OptionReply.ERR_PLATFORM: "the server cannot do that",
    OptionReply.ERR_TLS_REQD: "the server wants TLS",
    OptionReply.ERR_UNKNOWN: "the server has no such export",
    OptionReply.ERR_SHUTDOWN: "the server is shutting down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "the server has no block sizes that suit",
    OptionReply.ERR_TOO_BIG: "the request is too long for the server",
    OptionReply.ERR_EXT_HEADER_REQD: "the server wants extended headers",
}


class HandshakeError(Exception):
    """The server refused, or is no NBD server; ``reply`` is the error reply's type, if it sent one.

    ``str()`` is one line, with the server's own words made harmless.
    """

    def __init__(self, message: str, reply: int | None = None) -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True)
class ExportInformation:
    """What the server says about an export: ``size`` and block sizes in bytes, transmission flags.

    Block sizes are those of the specification when the server does not tell: 1, 4096, 32 MiB.
    """

    size: int
    flags: int
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD


@dataclass(frozen=True)
class Agreed:
    """The server has described the export, and after GO opened it."""

    export: ExportInformation


class _State(Enum):
    GREETING = auto()
    STARTTLS = auto()
    SECURING = auto()
    OPTION = auto()
    DONE = auto()


class ClientHandshake:
    """One handshake for the export ``name``; ``opening`` asks by GO, else by INFO."""

    def __init__(self, name: str, *, opening: bool, tls: bool) -> None:
        self._name = name
        self._option = Option.GO if opening else Option.INFO
        self._tls = tls
        self._state = _State.GREETING
        self._input = bytearray()
        self._output = bytearray()
        self._replies = 0
        self._export: tuple[int, int] | None = None
        self._blocks: tuple[int, int, int] | None = None

    def receive(self, data: bytes) -> None:
        """Take what the server sent."""
        self._input += data

    def data_to_send(self) -> bytes:
        """Return what is to be sent to the server now, and forget it."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def next_event(self) -> StartTls | Agreed | None:
        """Go on with what was received; None when more input is needed. Raises HandshakeError."""
        assert self._state is not _State.SECURING, "tls_started comes first"
        while self._state is not _State.DONE:
            if self._state is _State.GREETING:
                if len(self._input) < _GREETING.size:
                    return None
                self._on_greeting()
                continue
            reply = self._take_reply()
            if reply is None:
                return None
            if self._state is _State.STARTTLS:
                self._on_starttls(*reply)
                return StartTls()
            self._on_reply(*reply)
        assert self._export is not None
        return Agreed(ExportInformation(*self._export, *(self._blocks or ())))

    def tls_started(self) -> None:
        """TLS has begun after StartTls: ask for the export."""
        assert self._state is _State.SECURING
        self._ask_for_export()

    def _on_greeting(self) -> None:
        password, magic, flags = _GREETING.unpack_from(self._input)
        if password != INIT_PASSWD:
            raise HandshakeError("what answers there is no NBD server")
        if magic != OPTION_MAGIC or not flags & FLAG_FIXED_NEWSTYLE:
            raise HandshakeError("the server is too old: it does not speak fixed newstyle")
        del self._input[: _GREETING.size]
        client_flags = FLAG_C_FIXED_NEWSTYLE
        if flags & FLAG_NO_ZEROES:
            client_flags |= FLAG_C_NO_ZEROES
        self._output += _CLIENT_FLAGS.pack(client_flags)
        if self._tls:
            self._output += _OPTION.pack(OPTION_MAGIC, Option.STARTTLS, 0)
            self._state = _State.STARTTLS
        else:
            self._ask_for_export()

    def _ask_for_export(self) -> None:
        name = self._name.encode()
        data = _U32.pack(len(name)) + name + _U16.pack(1) + _U16.pack(Info.BLOCK_SIZE)
        self._output += _OPTION.pack(OPTION_MAGIC, self._option, len(data)) + data
        self._state = _State.OPTION

    def _take_reply(self) -> tuple[int, bytes] | None:
        """The type and data of the reply in front; None when it is not complete."""
        if len(self._input) < _REPLY.size:
            return None
        magic, option, kind, length = _REPLY.unpack_from(self._input)
        asked = Option.STARTTLS if self._state is _State.STARTTLS else self._option
        if magic != OPTION_REPLY_MAGIC or option != asked:
            raise HandshakeError("the server answered something that was not asked")
        if length > MAX_REPLY:
            raise HandshakeError(f"the server sent a reply of {length} bytes")
        end = _REPLY.size + length
        if len(self._input) < end:
            return None
        data = bytes(self._input[_REPLY.size : end])
        del self._input[:end]
        if kind & 1 << 31:
            raise HandshakeError(_describe_error(kind, data), kind)
        return kind, data

    def _on_starttls(self, kind: int, _data: bytes) -> None:
        if kind != OptionReply.ACK:
            raise HandshakeError("the server answered something that was not asked")
        if self._input:
            raise HandshakeError("the server sent plain text where TLS was to begin")
        self._state = _State.SECURING

    def _on_reply(self, kind: int, data: bytes) -> None:
        if kind == OptionReply.INFO:
            self._replies += 1
            if self._replies > MAX_REPLIES:
                raise HandshakeError("the server does not come to an end with its information")
            self._on_information(data)
        elif kind != OptionReply.ACK:
            raise HandshakeError(f"the server sent a reply of the unknown type {kind}")
        elif self._export is None:
            raise HandshakeError("the server did not tell the size of the export")
        else:
            self._state = _State.DONE

    def _on_information(self, data: bytes) -> None:
        if len(data) < _U16.size:
            raise HandshakeError("the server sent information without a type")
        (kind,) = _U16.unpack_from(data)
        layout = {Info.EXPORT: _EXPORT, Info.BLOCK_SIZE: _BLOCK_SIZE}.get(kind)
        if layout is None:
            return
        if len(data) != layout.size:
            raise HandshakeError(f"the server sent information of {len(data)} bytes")
        _, *fields = layout.unpack(data)
        if kind == Info.EXPORT:
            self._export = (fields[0], fields[1])
        else:
            self._blocks = (fields[0], fields[1], fields[2])


def _describe_error(kind: int, data: bytes) -> str:
    reason = _REASONS.get(OptionReply(kind)) if kind in set(OptionReply) else None
    text = reason or f"the server refused with error {kind:#010x}"
    words = data.decode("utf-8", "replace").strip()
    return f"{text}: {quoted(words)[1:-1]}" if words else text
