"""One client's connection, from the accepted socket to the closed one.

::

    HANDSHAKE --export opened--> TRANSMISSION --DISC, end, finish--> LINGERING --> CLOSED
     |  ^ |                          |                                              ^
     TLS  +-- refused, aborted, -----+---- revoked, wrong magic, socket error ------+
              timed out

- The handshake has HANDSHAKE_TIMEOUT seconds in all, that of TLS included, the registry's answers
  not counted in.
- After STARTTLS a relay (see tls_relay.py) owns the client's socket; everything else goes on
  with the end of a socket pair as if it were that socket.
- Whatever was opened in the registry is closed there, after the last request on it has ended.
- Lingering: a socket that is closed while the client's bytes lie unread is reset, and the reset may
  destroy replies on their way. So when the server ends, it sends its end of stream, and reads
  what comes until the client's, for LINGER_TIMEOUT seconds at most.
- ``finish`` ends when what was received is answered; ``abort`` at once.
"""

import asyncio
import contextlib
import logging
import socket
from typing import Final

from backends.errors import StorageError
from nbdserve.protocol.constants import OptionReply
from nbdserve.protocol.handshake import (
    DescribeExport,
    Ended,
    Event,
    Handshake,
    ListExports,
    OpenExport,
    StartTls,
    TlsMode,
)
from nbdserve.server.exports import Export, ExportDescription, ExportRegistry
from nbdserve.server.readiness import Readiness
from nbdserve.server.tls import Tls, TlsError
from nbdserve.server.tls_relay import Relay
from nbdserve.server.transmission import Transmission

HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds that a client has for the handshake."""

LINGER_TIMEOUT: Final = 1.0
"""Seconds that a client has to end its stream after the server has."""

_RECEIVE_SIZE: Final = 64 << 10

log = logging.getLogger(__name__)


class Connection:
    """Serves one client; ``run`` does it all, the other methods end it from outside."""

    def __init__(
        self, sock: socket.socket, registry: ExportRegistry, peer: str, tls: Tls | None = None
    ) -> None:
        self.peer = peer
        self._sock = sock
        self._registry = registry
        self._readiness = Readiness(sock)
        self._handshake = Handshake(TlsMode.OFF if tls is None else tls.mode)
        self._tls = tls
        self._relay: Relay | None = None
        self._transmission: Transmission | None = None
        self._finishing = False
        self._aborted = False

    async def run(self) -> None:
        """Serve the client until the connection is closed. Never raises for what a client does."""
        try:
            await self._serve()
        except TimeoutError:
            log.info("%s: the handshake took too long", self.peer)
        except OSError as error:
            log.info("%s: connection lost: %s", self.peer, error.strerror or error)
        finally:
            self._sock.close()
            if self._relay is not None:
                await self._relay.finish()

    def finish(self) -> None:
        """Answer what was received, then close. A handshake that waits for its client ends now."""
        self._finishing = True
        if self._transmission is not None:
            self._transmission.finish()
        elif self._readiness.waiting:
            self._readiness.cancel()

    def abort(self) -> None:
        """Close the connection now."""
        self._aborted = True
        if self._transmission is not None:
            self._transmission.abort()
        self._readiness.cancel()
        if self._relay is not None:
            self._relay.abort()

    @property
    def running(self) -> int:
        """Number of requests that are being carried out by tasks."""
        return 0 if self._transmission is None else self._transmission.running

    async def _serve(self) -> None:
        export = await self._negotiate()
        if export is None:
            return
        try:
            log.info("%s: opened %s", self.peer, export.name)
            linger = await self._transmit(export)
        finally:
            await self._registry.close(export)
            log.info("%s: closed %s", self.peer, export.name)
        if linger:
            await self._read_to_end()

    async def _negotiate(self) -> Export | None:
        """Carry out the handshake; returns the opened export, None when the connection is over."""
        handshake = self._handshake
        deadline = asyncio.get_running_loop().time() + HANDSHAKE_TIMEOUT
        while True:
            readiness = self._readiness
            await readiness.send(handshake.data_to_send(), deadline)
            event = handshake.next_event()
            if event is None:
                # All replies are on their way before more is read: output cannot pile up.
                await readiness.send(handshake.data_to_send(), deadline)
                if self._finishing:
                    return None
                data = await readiness.receive(_RECEIVE_SIZE, deadline)
                if not data:
                    return None
                handshake.receive(data)
                continue
            if isinstance(event, Ended):
                log.info("%s: %s", self.peer, event.reason)
                with contextlib.suppress(OSError):  # the client may have closed already
                    await readiness.send(handshake.data_to_send(), deadline)
                return None
            if isinstance(event, StartTls):
                await readiness.send(handshake.data_to_send(), deadline)
                if not await self._start_tls(deadline):
                    return None
                handshake.tls_started()
                continue
            begun = asyncio.get_running_loop().time()
            export = await self._answer(event)
            deadline += asyncio.get_running_loop().time() - begun
            if export is not None:
                try:
                    await readiness.send(handshake.data_to_send(), deadline)
                except BaseException:
                    await self._registry.close(export)
                    raise
                return export

    async def _start_tls(self, deadline: float) -> bool:
        """Let a relay have the socket; False when the connection is over."""
        assert self._tls is not None
        try:
            session = await self._tls.accept(self._readiness, deadline)
        except TlsError as error:
            log.info("%s: TLS handshake failed: %s", self.peer, error)
            await self._read_to_end()  # lest the client never sees the alert
            return False
        self._relay = Relay(self._sock, session, self.peer)
        self._sock = self._relay.inner
        self._readiness = Readiness(self._sock)
        return True

    async def _answer(self, question: Event) -> Export | None:
        """Answer a question of the handshake from the registry."""
        handshake, registry = self._handshake, self._registry
        if self._finishing:
            handshake.refuse("the server is shutting down", OptionReply.ERR_SHUTDOWN)
            return None
        try:
            if isinstance(question, ListExports):
                handshake.answer_list(registry.list_names())
            elif isinstance(question, DescribeExport):
                handshake.answer_describe(await registry.describe(question.name))
            elif isinstance(question, OpenExport):
                described = await registry.describe(question.name)
                export = await registry.open(question.name, self.abort)
                handshake.answer_open(
                    ExportDescription(
                        export.name,
                        export.size,
                        export.read_only,
                        export.block_size,
                        described.description,
                    )
                )
                return export
        except StorageError as error:
            handshake.refuse(str(error))
        except Exception:
            log.exception("%s: the registry failed", self.peer)
            handshake.refuse("internal error of the server")
        return None

    async def _transmit(self, export: Export) -> bool:
        if self._aborted:
            return False
        handshake = self._handshake
        transmission = Transmission(
            self._sock,
            export,
            structured=handshake.structured_replies,
            context=handshake.allocation_context,
            peer=self.peer,
        )
        self._transmission = transmission
        transmission.start(handshake.trailing_data)
        if self._finishing:
            transmission.finish()
        return await transmission.closed

    async def _read_to_end(self) -> None:
        deadline = asyncio.get_running_loop().time() + LINGER_TIMEOUT
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while await self._readiness.receive(_RECEIVE_SIZE, deadline):
                pass
