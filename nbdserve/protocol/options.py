"""The data that options carry, and the replies to options.

Rules (specification, "Option types" and "Option reply types"):

- A string is UTF-8 without NUL and at most 4096 bytes long; its length precedes it.
- INFO and GO: name, number of information requests (16 bits), the requests (16 bits each). The
  counts must fill the option exactly. Unknown information requests are ignored.
- LIST_META_CONTEXT and SET_META_CONTEXT: export name, number of queries (32 bits), the queries. A
  query is a namespace, a colon and a leaf-name. What matches no context is ignored. In LIST no
  query asks for all, and one that ends in a colon (``base:``, ``qemu:``, ``qemu:dirty-bitmap:``)
  for all that begin with it; in SET only whole names select.
- LIST, STARTTLS, STRUCTURED_REPLY and EXTENDED_HEADERS carry no data. ABORT's data is ignored.

What breaks a rule raises OptionError with the reply that the specification wants for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from nbdserve.protocol.constants import (
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION_REPLY_MAGIC,
    Info,
    OptionReply,
)

_U16 = Struct(">H")
_U32 = Struct(">I")
_REPLY = Struct(">QIII")
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")


class OptionError(Exception):
    """An option that is refused: ``reply`` is the error reply's type, ``str()`` its text."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True)
class ExportDescription:
    """What the handshake says about an export.

    ``size`` is in bytes, ``block_size`` the preferred one in bytes (a power of two, 512 or more);
    ``description`` is for people and may be empty; ``contexts`` are the names of its metadata
    contexts, ``rotational`` says that seeking costs time.
    """

    name: str
    size: int
    read_only: bool
    block_size: int
    description: str = ""
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    rotational: bool = False


@dataclass(frozen=True)
class InfoRequest:
    """Data of NBD_OPT_INFO and NBD_OPT_GO."""

    name: str
    information: frozenset[int]


@dataclass(frozen=True)
class MetaContextRequest:
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def quoted(name: str) -> str:
    """Return ``name`` fit for a message of one line: escaped, in quotes, cut when long."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def decode_string(data: bytes, what: str) -> str:
    """Decode a string of the protocol; ``what`` names it in the OptionError."""
    if len(data) > MAX_STRING:
        raise OptionError(
            OptionReply.ERR_TOO_BIG,
            f"the {what} has {len(data)} bytes, at most {MAX_STRING} are allowed",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise OptionError(OptionReply.ERR_INVALID, f"the {what} is not UTF-8") from None
    if "\0" in text:
        raise OptionError(OptionReply.ERR_INVALID, f"the {what} contains a NUL character")
    return text


class _Reader:
    """Takes the fields of an option one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def integer(self, layout: Struct, what: str) -> int:
        value: int
        (value,) = layout.unpack(self._take(layout.size, what))
        return value

    def string(self, what: str) -> str:
        length = self.integer(_U32, f"length of the {what}")
        return decode_string(self._take(length, what), what)

    def remaining(self) -> int:
        return len(self._data) - self._position

    def finish(self) -> None:
        if self.remaining():
            raise OptionError(
                OptionReply.ERR_INVALID,
                f"the option carries {self.remaining()} bytes more than its fields need",
            )

    def _take(self, length: int, what: str) -> bytes:
        if length > self.remaining():
            raise OptionError(
                OptionReply.ERR_INVALID,
                f"the option ends inside the {what}: {length} bytes needed, "
                f"{self.remaining()} left",
            )
        start = self._position
        self._position += length
        return self._data[start : self._position]


def parse_info_request(data: bytes) -> InfoRequest:
    """Parse the data of INFO or GO; raises OptionError."""
    reader = _Reader(data)
    name = reader.string("export name")
    count = reader.integer(_U16, "number of information requests")
    if count * 2 > reader.remaining():
        raise OptionError(
            OptionReply.ERR_INVALID,
            f"{count} information requests announced, {reader.remaining() // 2} sent",
        )
    information = frozenset(reader.integer(_U16, "information request") for _ in range(count))
    reader.finish()
    return InfoRequest(name, information)


def parse_meta_context_request(data: bytes) -> MetaContextRequest:
    """Parse the data of LIST_META_CONTEXT or SET_META_CONTEXT; raises OptionError."""
    reader = _Reader(data)
    name = reader.string("export name")
    count = reader.integer(_U32, "number of queries")
    if count * 4 > reader.remaining():  # each query has at least its length field
        raise OptionError(
            OptionReply.ERR_INVALID, f"{count} queries announced, the option is too short for them"
        )
    queries = tuple(reader.string("query") for _ in range(count))
    reader.finish()
    for query in queries:
        if ":" not in query[1:]:
            raise OptionError(
                OptionReply.ERR_INVALID,
                f"the query {quoted(query)} lacks a namespace and a colon, as in base:allocation",
            )
    return MetaContextRequest(name, queries)


def parse_nothing(data: bytes) -> None:
    """Check the data of an option that carries none; raises OptionError."""
    if data:
        raise OptionError(
            OptionReply.ERR_INVALID, f"the option takes no data, {len(data)} bytes were sent"
        )


def matching_contexts(
    contexts: Sequence[str], queries: Sequence[str], *, listing: bool
) -> list[str]:
    """The metadata contexts that the queries of LIST (``listing``) or SET find, in their order."""
    if not listing:
        return [name for name in contexts if name in queries]
    prefixes = tuple(query for query in queries if query.endswith(":"))
    return [
        name for name in contexts if not queries or name in queries or name.startswith(prefixes)
    ]


def encode_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """Encode one option reply."""
    return _REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def encode_error(option: int, reply: OptionReply, message: str) -> bytes:
    """Encode an error reply with its text, cut at the longest string allowed."""
    return encode_reply(option, reply, encode_text(message))


def encode_text(message: str) -> bytes:
    """Encode a text for people: valid UTF-8 of at most MAX_STRING bytes."""
    data = message.encode("utf-8", "replace")[:MAX_STRING]
    return data.decode("utf-8", "ignore").encode("utf-8")


def encode_server(option: int, name: str) -> bytes:
    """Encode NBD_REP_SERVER: one entry of the list of exports."""
    data = name.encode("utf-8")
    return encode_reply(option, OptionReply.SERVER, _U32.pack(len(data)) + data)


def encode_meta_context(option: int, context: int, name: str) -> bytes:
    """Encode NBD_REP_META_CONTEXT."""
    return encode_reply(option, OptionReply.META_CONTEXT, _U32.pack(context) + name.encode("utf-8"))


def encode_information(
    option: int, description: ExportDescription, transmission_flags: int, wanted: frozenset[int]
) -> bytes:
    """Encode the NBD_REP_INFO replies: NBD_INFO_EXPORT always, the others when ``wanted``."""
    items = [_INFO_EXPORT.pack(Info.EXPORT, description.size, transmission_flags)]
    if Info.NAME in wanted:
        items.append(_U16.pack(Info.NAME) + description.name.encode("utf-8"))
    if Info.DESCRIPTION in wanted and description.description:
        items.append(_U16.pack(Info.DESCRIPTION) + encode_text(description.description))
    if Info.BLOCK_SIZE in wanted:
        items.append(_INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, description.block_size, MAX_PAYLOAD))
    return b"".join(encode_reply(option, OptionReply.INFO, item) for item in items)
