"""The server that is checked: connections to it in every state that a check may want."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence

from .connection import Connection
from .constants import Cmd, Flag, Info, Option, Rep
from .facts import Facts, TlsMode
from .handshake import Answer, Export, Handshake, encode_info, encode_queries
from .tls import Tls
from .transmission import Mode, Transmission
from .uri import Uri
from .verdicts import Closed, Refused, Silent, Unavailable, Unreachable, Violation

FIXED = 1 << 0
NO_ZEROES = 1 << 1
UNLIKELY_NAME = "nbd-conformance: no export has this name"
CONNECTIONS = 3
CHECK_SECONDS = 90.0
"""Longest time that one check may take, whatever the server does."""
WITNESS_SECONDS = 15.0
"""Longest time that a server may be too busy for others, through what one client asks for."""


class Target:
    """A server, as one check after the other sees it."""

    def __init__(self, uri: Uri, tls: Tls, timeout: float) -> None:
        self.uri = uri
        self.tls = tls
        self.timeout = timeout
        self.facts = Facts()
        self.journal: list[str] = []
        """What was sent on behalf of the present check, in words."""
        self._connections: list[Connection] = []
        self._tls_contexts: dict[ssl.TLSVersion | None, ssl.SSLContext] = {}
        self._deadline = 0.0
        self.begin()

    def begin(self) -> None:
        """A new check: its own journal, its own deadline, no connection yet."""
        self.journal = []
        self._deadline = time.monotonic() + CHECK_SECONDS

    def finish(self) -> None:
        """Close all connections of the present check."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    # Connections, from the first byte on

    def connect(self) -> Connection:
        """A connection on which nothing has happened; raises Unreachable.

        A check has CONNECTIONS of them at a time: the oldest one makes room. Some servers allow
        few, and make others wait.
        """
        self._connections = [one for one in self._connections if one.is_open]
        while len(self._connections) >= CONNECTIONS:
            self._connections.pop(0).close()
        connection = Connection(self._connect(), self.timeout, self._deadline, self.journal)
        self._connections.append(connection)
        return connection

    def _connect(self) -> socket.socket:
        try:
            return self._open_socket()
        except OSError as error:
            raise Unreachable(f"{self.uri}: {error.strerror or error}") from None

    def greet(self, client_flags: int | None = None) -> Handshake:
        """A handshake ready for options, not encrypted whatever the URI says."""
        return self._greet(self.connect(), client_flags)

    def _greet(self, connection: Connection, client_flags: int | None = None) -> Handshake:
        handshake = Handshake(connection)
        if client_flags is None:
            client_flags = (FIXED | NO_ZEROES) & handshake.flags
        handshake.send_client_flags(client_flags)
        return handshake

    def haggle(self, client_flags: int | None = None) -> Handshake:
        """A handshake ready for options, encrypted if the URI says so."""
        return self._haggle(self.connect(), client_flags)

    def _haggle(self, connection: Connection, client_flags: int | None = None) -> Handshake:
        if self.facts.tls is TlsMode.FORCED and not self.uri.tls:
            raise Unavailable("the server insists on TLS: use an nbds:// URI")
        handshake = self._greet(connection, client_flags)
        if self.uri.tls:
            self.upgrade(handshake)
        return handshake

    def upgrade(self, handshake: Handshake, highest: ssl.TLSVersion | None = None) -> None:
        """Begin TLS."""
        answer = handshake.ask(Option.STARTTLS)
        if not answer.accepted:
            raise Unavailable(f"the server does not start TLS: {answer}")
        self.start_tls(handshake, highest)

    def start_tls(self, handshake: Handshake, highest: ssl.TLSVersion | None = None) -> None:
        """The TLS handshake, once NBD_OPT_STARTTLS has been acknowledged."""
        if highest not in self._tls_contexts:  # making one takes longer than a connection
            self._tls_contexts[highest] = self.tls.context(highest)
        context = self._tls_contexts[highest]
        handshake.connection.start_tls(context, self.tls.server_name or None)

    def enter(
        self,
        mode: Mode = Mode.SIMPLE,
        contexts: Sequence[str] = (),
        information: Sequence[int] = (Info.BLOCK_SIZE,),
    ) -> Transmission:
        """The transmission phase of the export, by NBD_OPT_GO where there is one."""
        return self._enter(self.connect(), mode, contexts, information)

    def enter_for_good(self) -> Transmission:
        """The same with simple replies, and not bound to a check: neither its end nor its limits.

        It waits longer: what a check has the server do may keep it busy for a while.
        """
        connection = Connection(
            self._connect(), max(self.timeout, WITNESS_SECONDS), float("inf"), []
        )
        try:
            return self._enter(connection, Mode.SIMPLE, (), (Info.BLOCK_SIZE,))
        except BaseException:
            connection.close()
            raise

    def _enter(
        self,
        connection: Connection,
        mode: Mode,
        contexts: Sequence[str],
        information: Sequence[int],
    ) -> Transmission:
        if self.facts.refusal:
            raise Unavailable(self.facts.refusal)
        handshake = self._haggle(connection)
        self.negotiate(handshake, mode)
        chosen = self.choose_contexts(handshake, contexts) if contexts else {}
        return self.go(handshake, mode, chosen, information)

    def negotiate(self, handshake: Handshake, mode: Mode) -> None:
        """Ask for structured or extended replies; raises Unavailable."""
        if mode is Mode.SIMPLE:
            return
        if mode is Mode.EXTENDED:
            self.need(self.facts.extended, "extended headers are not offered")
            answer = handshake.ask(Option.EXTENDED_HEADERS)
        else:
            self.need(self.facts.structured, "structured replies are not offered")
            answer = handshake.ask(Option.STRUCTURED_REPLY)
        if not answer.accepted:
            raise Violation("NBD_REP_ACK, as before", str(answer))

    def choose_contexts(self, handshake: Handshake, names: Sequence[str]) -> dict[int, str]:
        """Select metadata contexts; returns their names by ID."""
        queries = encode_queries(self.name, [name.encode() for name in names])
        answer = handshake.ask(Option.SET_META_CONTEXT, queries, f"{', '.join(names)}")
        if not answer.accepted or len(answer.contexts) != len(set(names)):
            raise Violation(f"{len(set(names))} contexts and NBD_REP_ACK", str(answer))
        return dict(answer.contexts)

    def go(
        self,
        handshake: Handshake,
        mode: Mode,
        contexts: dict[int, str] | None = None,
        information: Sequence[int] = (Info.BLOCK_SIZE,),
    ) -> Transmission:
        """End the handshake of one's own making with this export."""
        if self.facts.info:
            answer = handshake.ask(Option.GO, encode_info(self.name, information))
            if not answer.accepted:
                raise Violation("NBD_REP_ACK to NBD_OPT_GO", str(answer))
            export = answer.export()
        else:
            handshake.send_option(Option.EXPORT_NAME, self.name)
            export = handshake.read_export()
            handshake.read_reserved()
        return self.transmit(handshake, mode, export, contexts or {})

    def transmit(
        self, handshake: Handshake, mode: Mode, export: Export, contexts: dict[int, str]
    ) -> Transmission:
        """The transmission phase, on a connection that has got there already."""
        largest = self.facts.max_payload if self.facts.block_size_said else None
        return Transmission(handshake.connection, mode, export, contexts, largest)

    # What the server offers

    @property
    def name(self) -> bytes:
        """The export's name as it is sent."""
        return self.uri.export.encode()

    @property
    def modes(self) -> list[Mode]:
        """The kinds of replies that are offered."""
        modes = [Mode.SIMPLE]
        modes += [Mode.STRUCTURED] if self.facts.structured else []
        modes += [Mode.EXTENDED] if self.facts.extended else []
        return modes

    @property
    def block(self) -> int:
        """Bytes that every request may have and be aligned to."""
        return max(self.facts.minimum_block, 512)

    @property
    def end(self) -> int:
        """Where the export ends for requests in whole blocks."""
        return self.facts.size - self.facts.size % self.block

    def need(self, available: bool, why_not: str) -> None:
        """Skip the check unless something is available."""
        if not available:
            raise Unavailable(why_not)

    def need_flag(self, flag: Flag) -> None:
        """Skip the check unless the export has a transmission flag."""
        if not self.facts.flags & flag:
            raise Unavailable(f"NBD_FLAG_{flag.name} is not advertised")

    def need_size(self, size: int) -> None:
        """Skip the check when the export is smaller than ``size`` bytes."""
        if self.facts.refusal:
            raise Unavailable(self.facts.refusal)
        if self.end < size:
            raise Unavailable(f"the export is smaller than {size} bytes")

    def need_writable(self) -> None:
        """Skip the check on a read-only export."""
        self.need(not self.facts.flags & Flag.READ_ONLY, "the export is read-only")

    def need_context(self) -> str:
        """Skip the check unless there are metadata contexts; returns the name of one."""
        self.need(bool(self.facts.contexts), "metadata contexts are not offered")
        return self.facts.contexts[0]

    def need_refused_names(self) -> None:
        """Skip the check on a server that has an export under any name."""
        self.need(not self.facts.serves_any_name, "the server has an export under every name")

    # Finding out

    def explore(self) -> None:
        """Find out what the server offers; raises Unreachable or Refused."""
        facts = self.facts
        try:
            self._explore_handshake()
            if self.uri.tls:
                self._explore_tls()
            self._explore_export()
        except Unavailable as unavailable:
            facts.refusal = str(unavailable)
        except Violation as violation:
            facts.refusal = f"the export cannot be opened: {violation}"
            facts.broken = True
        finally:
            self.finish()
        if facts.refusal:
            return
        for explore in (self._explore_replies, self._explore_contexts, self._explore_names):
            self.begin()
            try:
                explore()
            except (Violation, Unavailable) as problem:
                facts.notes.append(f"while finding out what the server offers: {problem}")
            finally:
                self.finish()

    def _explore_tls(self) -> None:
        """What is wrong with certificates is wrong with all checks: better said once."""
        if self.facts.tls is TlsMode.NOTLS:
            raise Refused("the server does not offer TLS: use an nbd:// URI")
        try:
            self.haggle()
        except Violation as violation:
            raise Refused(f"TLS: {violation}") from None

    def _explore_handshake(self) -> None:
        facts = self.facts
        facts.handshake_flags = self.greet().flags
        facts.newstyle = True
        if not facts.handshake_flags & FIXED:
            return
        try:
            if self.greet().ask(Option.STARTTLS).accepted:
                facts.tls = TlsMode.SELECTIVE
                refusal = self.greet().ask(Option.LIST)
                if refusal.final == Rep.ERR_TLS_REQD:
                    facts.tls = TlsMode.FORCED
        except Violation as violation:
            facts.notes.append(f"NBD_OPT_STARTTLS: {violation}")

    def _explore_export(self) -> None:
        facts = self.facts
        self._explore_info()
        # What is said when the export is opened counts: INFO may be wrong, and its checks find out.
        handshake = self.haggle()
        export = self.go(handshake, Mode.SIMPLE).export
        facts.size = export.size
        facts.flags = facts.plain_flags = Flag(export.flags)

    def _explore_info(self) -> None:
        facts = self.facts
        if not facts.handshake_flags & FIXED:
            return
        handshake = self.haggle()
        answer = handshake.ask(Option.INFO, encode_info(self.name, (Info.BLOCK_SIZE,)))
        if not answer.accepted:
            if answer.final == Rep.ERR_UNSUP:
                return
            listed = ", ".join(repr(name) for name, _ in self.haggle().ask(Option.LIST).exports)
            raise Refused(
                f"the server refuses the export {self.uri.export!r}: {answer}"
                + (f"; it lists {listed}" if listed else "")
            )
        facts.info = True
        blocks = answer.block_size()
        if blocks is not None:
            facts.block_size_said = True
            facts.minimum_block, facts.preferred_block, facts.max_payload = blocks
            # What is not possible is for the check of it to find; here it would only do harm.
            if not 0 < facts.minimum_block <= 1 << 16:
                facts.minimum_block = 1

    def _explore_replies(self) -> None:
        facts = self.facts
        if not facts.handshake_flags & FIXED:
            return
        facts.structured = self.haggle().ask(Option.STRUCTURED_REPLY).accepted
        facts.extended = self.haggle().ask(Option.EXTENDED_HEADERS).accepted

    def _explore_contexts(self) -> None:
        facts = self.facts
        if not (facts.structured or facts.extended):
            return
        handshake = self.haggle()
        self.negotiate(handshake, self.modes[-1])
        if facts.info:
            facts.flags = Flag(self._read_info(handshake).export().flags)
        answer = handshake.ask(Option.LIST_META_CONTEXT, encode_queries(self.name))
        names = [name for _, name in answer.contexts if not name.endswith(":")]
        if answer.accepted and names:
            queries = encode_queries(self.name, [name.encode() for name in names])
            chosen = handshake.ask(Option.SET_META_CONTEXT, queries)
            facts.contexts = tuple(name for _, name in chosen.contexts)
            if facts.info:
                facts.flags = Flag(self._read_info(handshake).export().flags)

    def _explore_names(self) -> None:
        facts = self.facts
        if not facts.info:
            return
        data = encode_info(UNLIKELY_NAME.encode())
        try:
            facts.serves_any_name = self.haggle().ask(Option.INFO, data).accepted
        except (Closed, Silent):
            facts.serves_any_name = False
        listed = self.haggle().ask(Option.LIST)
        facts.exports = tuple(name for name, _ in listed.exports)

    def _read_info(self, handshake: Handshake) -> Answer:
        return handshake.ask(Option.INFO, encode_info(self.name, (Info.BLOCK_SIZE,)))

    def _open_socket(self) -> socket.socket:
        if self.uri.path:
            return self._open_unix_socket()
        sock = socket.create_connection((self.uri.host, self.uri.port), self.timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _open_unix_socket(self) -> socket.socket:
        limit = time.monotonic() + self.timeout
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(self.timeout)
            try:
                sock.connect(self.uri.path)
                return sock
            except BlockingIOError:  # more than the server takes in at once: no waiting in connect
                sock.close()
                if time.monotonic() > limit:
                    raise
                time.sleep(0.01)
            except OSError:
                sock.close()
                raise


def is_alive(witness: Transmission) -> bool:
    """Whether a connection that nobody has harmed still answers: a READ of one byte or block."""
    length = min(65536, witness.export.size)
    try:
        return not witness.call(Cmd.READ, 0, length).error
    except Violation:
        return False
