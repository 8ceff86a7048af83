"""The client's side of the transmission phase: requests, and the format of every reply.

Which replies are allowed depends on what was negotiated: simple ones; structured ones, with simple
ones for whatever carries no data; or extended ones only. Requests may be pipelined: replies are
told apart by their cookies and kept until they are asked for.

The rules of "Simple reply message", "Structured reply chunk message", "Extended reply chunk
message" and "Structured reply types" are looked at in every reply of every check. What they are
violated by is a Violation with their own level: MUST, nearly all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from .connection import Connection
from .constants import (
    CHUNK_ERROR_BIT,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REPLY_FLAG_DONE,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    name_errors,
    name_flags,
    name_of,
)
from .handshake import Export
from .strings import decode, shown
from .verdicts import Level, Violation

_LARGEST_REPLY = 80 << 20
"""Bytes of payload of one chunk that we are ready to read: more than any check asks for."""
_LARGEST_STATUS = 8 + (16 << 20)
_MOST_CHUNKS = 1 << 20
_FORMAT = "Structured reply types: the format of reply chunks"
_STATUS_CHUNKS = (
    "NBD_REPLY_TYPE_BLOCK_STATUS: a successful block status request MUST have exactly one status "
    "chunk per negotiated metadata context ID"
)


class Mode(Enum):
    """What replies were negotiated."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass
class Reply:
    """One request, and what came as its reply; lengths and offsets in bytes."""

    command: int
    flags: int
    offset: int
    length: int
    asked: tuple[int, ...] | None = None
    """IDs that a BLOCK_STATUS with a payload asked for."""
    error: int = 0
    text: str = ""
    simple: bool = False
    data: bytes = b""
    """What a READ was answered, in order."""
    pieces: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    """Offset, length and data (None for a hole) of every content chunk."""
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Length and flags of the descriptors, by context ID."""
    done: bool = False

    def __str__(self) -> str:
        if not self.error:
            return "success"
        text = f' "{self.text}"' if self.text else ""
        return name_of(Errno, self.error, "NBD_") + text


class Transmission:
    """A connection in the transmission phase."""

    def __init__(
        self,
        connection: Connection,
        mode: Mode,
        export: Export,
        contexts: Mapping[int, str],
        max_payload: int | None,
    ) -> None:
        self.connection = connection
        connection.reads_ahead = True
        self.mode = mode
        self.export = export
        self.contexts = dict(contexts)
        self._max_payload = max_payload
        self._cookie = 0x1000
        self._pending: dict[int, Reply] = {}
        self._answered: dict[int, Reply] = {}

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | None = None,
        cookie: int | None = None,
        asked: tuple[int, ...] | None = None,
        exact_flags: bool = False,
        magic: int | None = None,
        reading: bool = True,
    ) -> int:
        """Send a request, return its cookie.

        ``payload`` sets the length; with extended headers it also sets PAYLOAD_LEN unless the
        flags are exact. ``reading``: see Connection.send. ``asked`` names the IDs that a
        BLOCK_STATUS carries, for its reply.
        """
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        wire_length = length if payload is None else len(payload)
        if payload is not None and self.mode is Mode.EXTENDED and not exact_flags:
            flags |= CmdFlag.PAYLOAD_LEN
        if payload is not None and command == Cmd.WRITE:
            length = len(payload)
        if self.mode is Mode.EXTENDED:
            number = EXTENDED_REQUEST_MAGIC if magic is None else magic
            header = struct.pack(">IHHQQQ", number, flags, command, cookie, offset, wire_length)
        else:
            number = REQUEST_MAGIC if magic is None else magic
            header = struct.pack(">IHHQQI", number, flags, command, cookie, offset, wire_length)
        self._pending[cookie] = Reply(command, flags, offset, length, asked)
        words = f"{name_of(Cmd, command, 'NBD_CMD_')} offset {offset} length {wire_length}"
        if flags:
            words += f" flags {name_flags(CmdFlag, flags)}"
        if magic is not None:
            words += f" magic {magic:#x}"
        words += f" ({self.mode.value} replies)"
        self.connection.send(header + (payload or b""), words, reading=reading)
        return cookie

    def receive(self, cookie: int) -> Reply:
        """Read until the reply with this cookie is complete."""
        for _ in range(_MOST_CHUNKS):
            if cookie in self._answered:
                return self._answered.pop(cookie)
            self._read_message()
        raise Violation("a reply that ends", f"{_MOST_CHUNKS} chunks")

    def call(self, command: int, offset: int = 0, length: int = 0, **more: object) -> Reply:
        """Send a request and read its reply; the arguments are those of ``send``."""
        return self.receive(self.send(command, offset, length, **more))  # type: ignore[arg-type]

    def succeed(self, command: int, offset: int = 0, length: int = 0, **more: object) -> Reply:
        """A request that must succeed."""
        reply = self.call(command, offset, length, **more)
        if reply.error:
            raise Violation(f"{name_of(Cmd, command, 'NBD_CMD_')} to succeed", str(reply))
        return reply

    def refuse(
        self, errors: tuple[Errno, ...], command: int, offset: int = 0, length: int = 0,
        **more: object,
    ) -> Reply:  # fmt: skip
        """A request that must fail with one of these errors, and leave the connection in step."""
        reply = self.call(command, offset, length, **more)
        if reply.error not in errors:
            raise Violation(name_errors(errors), str(reply))
        self.check_in_step()
        return reply

    def check_in_step(self) -> None:
        """The next request must be understood: a READ of one block at 0 (or none, if empty)."""
        length = min(65536, self.export.size)
        reply = self.call(Cmd.READ, 0, length)
        if reply.error:
            raise Violation(
                "the next request to be understood: a READ of the first block", str(reply)
            )

    def _read_message(self) -> None:
        waiting = ", ".join(
            sorted({name_of(Cmd, reply.command, "NBD_CMD_") for reply in self._pending.values()})
        )
        expected = f"a reply to {waiting or 'nothing'}"
        start = self.connection.receive(4, expected)
        (magic,) = struct.unpack(">I", start)
        if magic == SIMPLE_REPLY_MAGIC and self.mode is not Mode.EXTENDED:
            self._read_simple(expected)
        elif magic == STRUCTURED_REPLY_MAGIC and self.mode is Mode.STRUCTURED:
            rest = struct.Struct(">HHQI")
            flags, kind, cookie, length = rest.unpack(self.connection.receive(rest.size, expected))
            self._read_chunk(flags, kind, cookie, None, length)
        elif magic == EXTENDED_REPLY_MAGIC and self.mode is Mode.EXTENDED:
            wide = struct.Struct(">HHQQQ")
            flags, kind, cookie, offset, length = wide.unpack(
                self.connection.receive(wide.size, expected)
            )
            self._read_chunk(flags, kind, cookie, offset, length)
        else:
            raise Violation(
                f"{expected} as negotiated: {self.mode.value}",
                f"the magic {magic:#010x}",
                Level.MUST,
                "the simple reply message MUST be sent unless something else was negotiated; "
                "with extended headers all server replies MUST use an extended reply",
            )

    def _find(self, cookie: int, sentence: str) -> Reply:
        reply = self._pending.get(cookie)
        if reply is None:
            raise Violation(
                "the cookie of a request that waits for its reply",
                f"the cookie {cookie:#x}",
                Level.MUST,
                f"{sentence}: the cookie MUST match the request",
            )
        return reply

    def _finish(self, cookie: int) -> None:
        reply = self._pending.pop(cookie)
        reply.done = True
        _check_error_value(reply)
        if not reply.error and not reply.simple:
            self._check_complete(reply)
        self._answered[cookie] = reply

    def _read_simple(self, expected: str) -> None:
        layout = struct.Struct(">IQ")
        error, cookie = layout.unpack(self.connection.receive(layout.size, expected))
        reply = self._find(cookie, "Simple reply message")
        if self.mode is Mode.STRUCTURED and reply.command == Cmd.READ:
            raise Violation(
                "a structured reply to NBD_CMD_READ",
                f"a simple one with error {error}",
                Level.MUST,
                "Structured reply chunk message: the server MUST NOT use a simple reply for "
                "NBD_CMD_READ",
            )
        if self.mode is Mode.STRUCTURED and reply.command == Cmd.BLOCK_STATUS and not error:
            raise Violation(
                "a structured reply to NBD_CMD_BLOCK_STATUS",
                "a simple one",
                Level.MUST,
                "Metadata querying: the reply MUST be sent via reply chunks",
            )
        reply.simple = True
        reply.error = error
        if reply.command == Cmd.READ and not error and reply.length:
            if reply.length > _LARGEST_REPLY:
                raise Violation("an error", f"success for a READ of {reply.length} bytes")
            reply.data = self.connection.receive(
                reply.length, f"the {reply.length} bytes of data of NBD_CMD_READ"
            )
            reply.pieces.append((reply.offset, reply.length, reply.data))
        self._finish(cookie)

    def _read_chunk(
        self, flags: int, kind: int, cookie: int, offset: int | None, length: int
    ) -> None:
        reply = self._find(cookie, "Structured reply chunk message")
        if offset is not None and offset != reply.offset:
            _fail("the offset of the request in the header of its reply", str(offset))
        if flags & ~REPLY_FLAG_DONE:
            _fail("no reply flag but NBD_REPLY_FLAG_DONE", f"the reply flags {flags:#x}")
        name = name_of(Chunk, kind, "NBD_REPLY_TYPE_")
        if length > _LARGEST_REPLY:
            _fail(f"{name} of a length that was asked for", f"{length} bytes")
        if kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT) and length > _LARGEST_STATUS:
            raise Violation(
                "2^20 descriptors or fewer in a chunk",
                f"{length} bytes of them",
                Level.SHOULD,
                "Servers SHOULD NOT send more than 2^20 extents in a single reply chunk",
            )
        payload = self.connection.receive(length, f"the {length} bytes of {name}")
        if kind == Chunk.NONE:
            _require(not payload, "NBD_REPLY_TYPE_NONE without payload", shown(payload))
            _require(
                bool(flags & REPLY_FLAG_DONE), "NBD_REPLY_FLAG_DONE on NBD_REPLY_TYPE_NONE", "none"
            )
        elif kind in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE):
            self._take_content(reply, kind, payload)
        elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
            self._take_status(reply, kind, payload)
        elif kind & CHUNK_ERROR_BIT:
            _take_error(reply, kind, payload)
        else:
            _fail("a chunk type of the specification", f"type {kind}", Level.RULE)
        if flags & REPLY_FLAG_DONE:
            self._finish(cookie)

    def _take_content(self, reply: Reply, kind: int, payload: bytes) -> None:
        name = name_of(Chunk, kind, "NBD_REPLY_TYPE_")
        _require(reply.command == Cmd.READ, f"{name} for NBD_CMD_READ only", "it")
        data: bytes | None = None
        if kind == Chunk.OFFSET_DATA:
            _require(len(payload) >= 9, f"{name} of 9 bytes or more", f"{len(payload)} bytes")
            (offset,) = struct.unpack_from(">Q", payload)
            data = payload[8:]
            length = len(data)
            _require(
                self._max_payload is None or length <= self._max_payload,
                f"chunks no larger than the advertised maximum payload, {self._max_payload}",
                f"{length} bytes",
            )
        else:
            _require(len(payload) == 12, f"{name} of 12 bytes", f"{len(payload)} bytes")
            offset, length = struct.unpack(">QI", payload)
            _require(length > 0, f"{name} of nonzero size", "size 0")
        _require(
            reply.offset <= offset and offset + length <= reply.offset + reply.length,
            f"content within {reply.length} bytes at {reply.offset}",
            f"{length} bytes at {offset}",
        )
        _require(
            all(offset + length <= at or at + size <= offset for at, size, _ in reply.pieces),
            "content chunks that do not overlap",
            f"a second one for bytes at {offset}",
        )
        _require(
            not (reply.flags & CmdFlag.DF and reply.pieces),
            "one content chunk, as NBD_CMD_FLAG_DF asks",
            "a second one",
        )
        reply.pieces.append((offset, length, data))

    def _take_status(self, reply: Reply, kind: int, payload: bytes) -> None:
        name = name_of(Chunk, kind, "NBD_REPLY_TYPE_")
        _require(reply.command == Cmd.BLOCK_STATUS, f"{name} for NBD_CMD_BLOCK_STATUS only", "it")
        extended = self.mode is Mode.EXTENDED
        _require(
            (kind == Chunk.BLOCK_STATUS_EXT) == extended,
            "NBD_REPLY_TYPE_BLOCK_STATUS_EXT with extended headers, and only then",
            name,
        )
        start, layout = (8, struct.Struct(">QQ")) if extended else (4, struct.Struct(">II"))
        _require(
            len(payload) > start and (len(payload) - start) % layout.size == 0,
            f"{name} of {start} bytes and one or more times {layout.size}",
            f"{len(payload)} bytes",
        )
        (context,) = struct.unpack_from(">I", payload)
        runs = list(layout.iter_unpack(payload[start:]))
        if extended:
            (count,) = struct.unpack_from(">I", payload, 4)
            _require(count == len(runs), f"the descriptor count {len(runs)}", str(count))
        wanted = self.contexts if reply.asked is None else reply.asked
        _require(
            context in wanted and context not in reply.statuses,
            f"one chunk for each of the context IDs {sorted(wanted)}",
            f"one for {context}" + (" once more" if context in reply.statuses else ""),
            _STATUS_CHUNKS,
        )
        _require(all(length for length, _ in runs), "descriptors of nonzero length", "length 0")
        reply.statuses[context] = runs

    def _check_complete(self, reply: Reply) -> None:
        """A reply without an error must hold all that was asked for."""
        if reply.command == Cmd.READ:
            covered = sum(length for _, length, _ in reply.pieces)
            _require(
                covered == reply.length,
                f"content that covers all {reply.length} bytes of the request",
                f"{covered} bytes",
                "NBD_CMD_READ: the server MUST send enough data chunks to cover the entire region",
            )
            reply.data = b"".join(
                bytes(length) if data is None else data
                for _, length, data in sorted(reply.pieces, key=lambda piece: piece[0])
            )
        if reply.command == Cmd.BLOCK_STATUS:
            wanted = set(self.contexts if reply.asked is None else reply.asked)
            _require(
                set(reply.statuses) == wanted,
                f"a chunk for each of the context IDs {sorted(wanted)}",
                f"chunks for {sorted(reply.statuses)}",
                _STATUS_CHUNKS,
            )


def _take_error(reply: Reply, kind: int, payload: bytes) -> None:
    least = 14 if kind == Chunk.ERROR_OFFSET else 6
    name = name_of(Chunk, kind, "NBD_REPLY_TYPE_")
    _require(len(payload) >= least, f"{name} of {least} bytes or more", f"{len(payload)} bytes")
    error, length = struct.unpack_from(">IH", payload)
    _require(error != 0, f"a nonzero error in {name}", "0")
    _require(
        length <= len(payload) - least,
        f"a message of {len(payload) - least} bytes or less in {name} of {len(payload)}",
        f"a message length of {length}",
    )
    text = decode(payload[6 : 6 + length], f"message in {name}")
    if kind == Chunk.ERROR_OFFSET:
        (offset,) = struct.unpack_from(">Q", payload, 6 + length)
        _require(
            reply.offset <= offset <= reply.offset + reply.length,
            f"an offset within {reply.length} bytes at {reply.offset}",
            str(offset),
        )
    if not reply.error:
        reply.error, reply.text = error, text


def _check_error_value(reply: Reply) -> None:
    if reply.error and reply.error not in {int(error) for error in Errno}:
        raise Violation(
            "an error value of the specification",
            str(reply.error),
            Level.RULE,
            "Error values: the allowed values have been restricted to a set of possibilities",
        )


def _require(true: bool, expected: str, came: str, sentence: str = _FORMAT) -> None:
    if not true:
        raise Violation(expected, came, Level.MUST, sentence)


def _fail(expected: str, came: str, level: Level = Level.MUST) -> None:
    raise Violation(expected, came, level, _FORMAT)
