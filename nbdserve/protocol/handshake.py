"""The handshake as a state machine without input or output.

States and what leads from one to the next::

    CLIENT_FLAGS --4 bytes of flags--> OPTION --EXPORT_NAME, GO--> QUESTION --accepted--> DONE
         |                             |    ^                        |
         | unknown flags        a wrong|    +--answered, refused-----+  (EXPORT_NAME: CLOSED)
         v                        magic|    ^
       CLOSED <-------ABORT------------+    +--SKIPPING (an option too long to be kept)
         ^                             |    ^
         | data behind it              |    +--tls_started--+
         +----------------------STARTTLS----accepted-->SECURING

Rules (specification, "Newstyle negotiation" and "Fixed newstyle negotiation"):

- The server speaks first: NBDMAGIC, IHAVEOPT, handshake flags.
- Client flags that the server does not know end the connection.
- An option is magic, type, length, data. A wrong magic ends the connection: nothing tells where
  the next option would begin.
- Every option gets replies that end with ACK or an error, save EXPORT_NAME: that is answered by
  the export itself, or by closing the connection. The client waits for the final reply.
- A client that did not set FIXED_NEWSTYLE knows EXPORT_NAME only, and could not read a reply to
  anything else: any other option ends the connection.
- An option longer than MAX_OPTION is read past without being kept, and answered ERR_TOO_BIG.
- SET_META_CONTEXT replaces the earlier choice, even when it fails, and holds for the export that
  it names only. It wants STRUCTURED_REPLY or EXTENDED_HEADERS first.
- EXTENDED_HEADERS supersedes STRUCTURED_REPLY, which is refused behind it, and rules out
  EXPORT_NAME.

TLS ("TLS support", "NBD_OPT_STARTTLS"):

- Off (the specification's NOTLS): STARTTLS is answered ERR_UNSUP. Optional (SELECTIVETLS): the
  client may; until then INFO and GO of a TLS-only export are answered ERR_TLS_REQD. Required
  (FORCEDTLS): until TLS has started, every option but STARTTLS and ABORT is answered ERR_TLS_REQD,
  and EXPORT_NAME ends the connection.
- What was chosen before it is forgotten; only the client flags stay. A second one is refused.
- The client has to wait for the ACK. What came behind STARTTLS in plain text could have been put
  there by somebody in between, to be taken for the client's own: it ends the connection.

Use: give what was received to ``receive``; ask ``next_event`` until it returns None (more input
is needed); answer each question with ``answer_*`` or ``refuse`` before asking again; send what
``data_to_send`` returns. After ``StartTls`` send, let TLS begin, then call ``tls_started``; from
then on ``receive`` takes what TLS decrypted. ``Ended`` is the last event: send, then close. After
``answer_open`` the transmission phase has begun: ``trailing_data`` holds what the client sent
beyond the handshake.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from struct import Struct

from nbdserve.protocol.constants import (
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_CAN_MULTI_CONN,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    INIT_PASSWD,
    OPTION_MAGIC,
    Option,
    OptionReply,
    ReplyStyle,
)
from nbdserve.protocol.options import (
    ExportDescription,
    InfoRequest,
    MetaContextRequest,
    OptionError,
    decode_string,
    encode_error,
    encode_information,
    encode_meta_context,
    encode_reply,
    encode_server,
    matching_contexts,
    parse_info_request,
    parse_meta_context_request,
    parse_nothing,
)

MAX_OPTION = 64 << 10
"""Most bytes of data of one option that are kept."""

MAX_CONTEXTS = 16
"""Most metadata contexts of one connection: each costs memory, and a chunk of every status."""

_GREETING = Struct(">QQH")
_CLIENT_FLAGS = Struct(">I")
_OPTION = Struct(">QII")
_EXPORT = Struct(">QH")


@dataclass(frozen=True)
class ListExports:
    """Question: which exports are there? ``answer_list``."""


@dataclass(frozen=True)
class DescribeExport:
    """Question: what is this export? ``answer_describe`` or ``refuse``."""

    name: str


@dataclass(frozen=True)
class OpenExport:
    """Question: may the client have this export now? ``answer_open`` or ``refuse``."""

    name: str


@dataclass(frozen=True)
class StartTls:
    """Send what there is, let TLS begin on the connection, then call ``tls_started``."""


@dataclass(frozen=True)
class Ended:
    """The connection is to be closed once everything is sent; ``reason`` is for the log."""

    reason: str


Event = ListExports | DescribeExport | OpenExport | StartTls | Ended


class TlsMode(Enum):
    """Whether connections are encrypted; the values are what a configuration says."""

    OFF = "off"
    OPTIONAL = "optional"
    REQUIRED = "required"


class _State(Enum):
    CLIENT_FLAGS = auto()
    OPTION = auto()
    SKIPPING = auto()
    QUESTION = auto()
    SECURING = auto()
    DONE = auto()
    CLOSED = auto()


def transmission_flags(description: ExportDescription, style: ReplyStyle, *, contexts: bool) -> int:
    """Return what NBD_INFO_EXPORT and EXPORT_NAME say that the server can do.

    ``contexts``: metadata contexts of this export were chosen.
    """
    flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE
    if description.read_only:
        flags |= FLAG_READ_ONLY
    else:
        flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO
    if description.rotational:
        flags |= FLAG_ROTATIONAL
    if style is not ReplyStyle.SIMPLE:
        flags |= FLAG_SEND_DF
    if style is ReplyStyle.EXTENDED and contexts:
        flags |= FLAG_BLOCK_STATUS_PAYLOAD
    return flags


class Handshake:
    """The server's side of one handshake."""

    def __init__(self, tls: TlsMode = TlsMode.OFF) -> None:
        self.style = ReplyStyle.SIMPLE
        self._tls = tls
        self._secure = False
        self._input = bytearray()
        self._output = bytearray(
            _GREETING.pack(INIT_PASSWD, OPTION_MAGIC, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
        )
        self._state = _State.CLIENT_FLAGS
        self._reason = ""
        self._client_flags = 0
        self._option = 0
        self._to_skip = 0
        self._request: InfoRequest | MetaContextRequest | None = None
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._context_export: str | None = None  # export that they were chosen for
        self._handlers: dict[int, Callable[[bytes], Event | None]] = {
            Option.EXPORT_NAME: self._on_export_name,
            Option.ABORT: self._on_abort,
            Option.LIST: self._on_list,
            Option.STARTTLS: self._on_starttls,
            Option.INFO: self._on_info,
            Option.GO: self._on_info,
            Option.STRUCTURED_REPLY: self._on_structured_reply,
            Option.LIST_META_CONTEXT: self._on_meta_context,
            Option.SET_META_CONTEXT: self._on_meta_context,
            Option.EXTENDED_HEADERS: self._on_extended_headers,
        }

    @property
    def contexts(self) -> tuple[tuple[int, str], ...]:
        """Metadata contexts, (ID, name), chosen for the export that is, or is to be, opened."""
        request = self._request
        return self._contexts_of(request) if isinstance(request, InfoRequest) else ()

    @property
    def trailing_data(self) -> bytes:
        """What came behind the last option: the first requests of a hasty client."""
        return bytes(self._input)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent."""
        self._input += data

    def data_to_send(self) -> bytes:
        """Return what is to be sent to the client now, and forget it."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def next_event(self) -> Event | None:
        """Go on with what was received: the next question, or None when more input is needed."""
        assert self._state not in (_State.QUESTION, _State.SECURING, _State.DONE), (
            "a question is to be answered"
        )
        while True:
            event: Event | None = None
            if self._state is _State.CLOSED:
                return Ended(self._reason)
            if self._state is _State.CLIENT_FLAGS:
                if len(self._input) < _CLIENT_FLAGS.size:
                    return None
                self._on_client_flags()
            elif self._state is _State.SKIPPING:
                skipped = min(self._to_skip, len(self._input))
                del self._input[:skipped]
                self._to_skip -= skipped
                if self._to_skip:
                    return None
                self._on_skipped()
            else:
                if not self._option_complete():
                    if self._state is not _State.OPTION:
                        continue
                    return None
                event = self._take_option()
            if event is not None:
                return event

    def answer_list(self, names: Iterable[str]) -> None:
        """Answer ListExports."""
        assert self._option == Option.LIST
        for name in names:
            self._output += encode_server(self._option, name)
        self._acknowledge()

    def answer_describe(self, description: ExportDescription) -> None:
        """Answer DescribeExport: the export exists."""
        request = self._request
        if isinstance(request, InfoRequest):
            self._output += self._information(description, request)
            self._acknowledge()
        else:
            assert request is not None
            self._answer_contexts(description, request)

    def answer_open(self, description: ExportDescription) -> None:
        """Answer OpenExport: the client has it, the transmission phase begins."""
        request = self._request
        assert isinstance(request, InfoRequest)
        if self._option == Option.GO:
            self._output += self._information(description, request)
            self._acknowledge()
        else:
            self._output += _EXPORT.pack(description.size, self._flags_of(description, request))
            if not self._client_flags & FLAG_C_NO_ZEROES:
                self._output += bytes(124)
        self._state = _State.DONE

    def tls_started(self) -> None:
        """TLS has begun after StartTls: go on with the options, none of which has been chosen."""
        assert self._state is _State.SECURING
        self._secure = True
        self._state = _State.OPTION

    def refuse(self, message: str, reply: OptionReply = OptionReply.ERR_UNKNOWN) -> None:
        """Answer a question with an error; after EXPORT_NAME that ends the connection.

        ERR_TLS_REQD, of one export, is for INFO and GO only; otherwise it becomes ERR_POLICY.
        """
        if reply is OptionReply.ERR_TLS_REQD and self._option not in (Option.INFO, Option.GO):
            reply = OptionReply.ERR_POLICY
        self._error(reply, message)

    def _on_client_flags(self) -> None:
        (self._client_flags,) = _CLIENT_FLAGS.unpack_from(self._input)
        del self._input[: _CLIENT_FLAGS.size]
        self._state = _State.OPTION
        if self._client_flags & ~(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES):
            self._close(f"unknown client flags {self._client_flags:#010x}")

    def _option_complete(self) -> bool:
        """Look at the option in front: True when it can be taken; may change the state."""
        if len(self._input) < _OPTION.size:
            return False
        length: int
        magic, self._option, length = _OPTION.unpack_from(self._input)
        if magic != OPTION_MAGIC:
            self._close(f"bad option magic {magic:#018x}")
            return False
        if not self._client_flags & FLAG_C_FIXED_NEWSTYLE and self._option != Option.EXPORT_NAME:
            self._close(f"option {self._option} from a client without fixed newstyle")
            return False
        if length > MAX_OPTION:
            del self._input[: _OPTION.size]
            self._to_skip = length
            self._state = _State.SKIPPING
            if self._option == Option.EXPORT_NAME:  # no error can be sent: no need to wait
                self._close(f"export name of {length} bytes")
            return False
        return len(self._input) >= _OPTION.size + length

    def _take_option(self) -> Event | None:
        _, _, length = _OPTION.unpack_from(self._input)
        end = _OPTION.size + length
        data = bytes(self._input[_OPTION.size : end])
        del self._input[:end]
        handler = self._handlers.get(self._option)
        try:
            self._check_secure()
            if handler is None:
                raise OptionError(
                    OptionReply.ERR_UNSUP, f"this server does not know option {self._option}"
                )
            return handler(data)
        except OptionError as error:
            self._error(error.reply, str(error))
            return None

    def _on_skipped(self) -> None:
        try:
            self._check_secure()
            raise OptionError(
                OptionReply.ERR_TOO_BIG, f"an option carries at most {MAX_OPTION} bytes"
            )
        except OptionError as error:
            self._error(error.reply, str(error))

    def _check_secure(self) -> None:
        """Refuse whatever must not be answered before TLS; raises OptionError."""
        if (
            self._tls is TlsMode.REQUIRED
            and not self._secure
            and self._option not in (Option.STARTTLS, Option.ABORT)
        ):
            raise OptionError(
                OptionReply.ERR_TLS_REQD, "this server wants TLS: NBD_OPT_STARTTLS comes first"
            )

    def _on_export_name(self, data: bytes) -> Event:
        if self.style is ReplyStyle.EXTENDED:
            raise OptionError(
                OptionReply.ERR_INVALID, "NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS"
            )
        self._request = InfoRequest(decode_string(data, "export name"), frozenset())
        return self._ask(OpenExport(self._request.name))

    def _on_abort(self, _data: bytes) -> None:
        self._acknowledge()
        self._close("the client ended the handshake")

    def _on_list(self, data: bytes) -> Event:
        parse_nothing(data)
        return self._ask(ListExports())

    def _on_starttls(self, data: bytes) -> Event | None:
        parse_nothing(data)
        if self._secure:
            raise OptionError(OptionReply.ERR_INVALID, "TLS has started already")
        if self._tls is TlsMode.OFF:
            raise OptionError(OptionReply.ERR_UNSUP, "this server does not offer TLS")
        if self._input:
            self._close(f"{len(self._input)} bytes in plain text behind NBD_OPT_STARTTLS")
            return None
        self.style = ReplyStyle.SIMPLE
        self._context_export = None
        self._acknowledge()
        return self._ask(StartTls(), _State.SECURING)

    def _on_extended_headers(self, data: bytes) -> None:
        parse_nothing(data)
        self.style = ReplyStyle.EXTENDED
        self._acknowledge()

    def _on_structured_reply(self, data: bytes) -> None:
        parse_nothing(data)
        if self.style is ReplyStyle.EXTENDED:
            raise OptionError(
                OptionReply.ERR_EXT_HEADER_REQD, "extended headers are in use already"
            )
        self.style = ReplyStyle.STRUCTURED
        self._acknowledge()

    def _on_info(self, data: bytes) -> Event:
        self._request = parse_info_request(data)
        question = OpenExport if self._option == Option.GO else DescribeExport
        return self._ask(question(self._request.name))

    def _on_meta_context(self, data: bytes) -> Event:
        if self.style is ReplyStyle.SIMPLE:
            raise OptionError(
                OptionReply.ERR_INVALID,
                "metadata contexts need NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS first",
            )
        self._request = parse_meta_context_request(data)
        return self._ask(DescribeExport(self._request.name))

    def _answer_contexts(self, description: ExportDescription, request: MetaContextRequest) -> None:
        """Answer LIST_META_CONTEXT and SET_META_CONTEXT: one reply a context."""
        listing = self._option == Option.LIST_META_CONTEXT
        found = matching_contexts(description.contexts, request.queries, listing=listing)
        if listing:
            numbered = [(0, name) for name in found]
        elif len(found) > MAX_CONTEXTS:
            self._error(
                OptionReply.ERR_TOO_BIG,
                f"{len(found)} metadata contexts, at most {MAX_CONTEXTS} are allowed",
            )
            return
        else:
            numbered = list(enumerate(found, 1))
            self._contexts = tuple(numbered)
            self._context_export = request.name
        for number, name in numbered:
            self._output += encode_meta_context(self._option, number, name)
        self._acknowledge()

    def _contexts_of(self, request: InfoRequest) -> tuple[tuple[int, str], ...]:
        return self._contexts if request.name == self._context_export else ()

    def _information(self, description: ExportDescription, request: InfoRequest) -> bytes:
        return encode_information(
            self._option, description, self._flags_of(description, request), request.information
        )

    def _flags_of(self, description: ExportDescription, request: InfoRequest) -> int:
        contexts = bool(self._contexts_of(request))
        return transmission_flags(description, self.style, contexts=contexts)

    def _ask(self, question: Event, state: _State = _State.QUESTION) -> Event:
        self._state = state
        return question

    def _acknowledge(self) -> None:
        self._output += encode_reply(self._option, OptionReply.ACK)
        self._state = _State.OPTION

    def _error(self, reply: OptionReply, message: str) -> None:
        self._state = _State.OPTION
        if self._option == Option.SET_META_CONTEXT:
            self._context_export = None
        if self._option == Option.EXPORT_NAME:
            self._close(message)
        else:
            self._output += encode_error(self._option, reply, message)

    def _close(self, reason: str) -> None:
        self._reason = reason
        self._state = _State.CLOSED
