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
- An export of another process gets the socket, or the relay's end; what it does then is the same
  (see session.py for lingering).
- ``finish`` ends when what was received is answered; ``abort`` at once.
"""

import asyncio
import contextlib
import logging
import socket
from dataclasses import replace
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
from nbdserve.server.exports import (
    Agreement,
    Export,
    ExportRegistry,
    RemoteExport,
    Serving,
)
from nbdserve.server.readiness import Readiness
from nbdserve.server.session import Session, read_to_end
from nbdserve.server.tls import Tls, TlsError
from nbdserve.server.tls_relay import Relay

HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds that a client has for the handshake."""

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
        self._serving: Serving | None = None
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
        if self._serving is not None:
            self._serving.finish()
        elif self._readiness.waiting:
            self._readiness.cancel()

    def abort(self) -> None:
        """Close the connection now."""
        self._aborted = True
        if self._serving is not None:
            self._serving.abort()
        self._readiness.cancel()
        if self._relay is not None:
            self._relay.abort()

    async def _serve(self) -> None:
        export = await self._negotiate()
        if export is None:
            return
        try:
            log.info("%s: opened %s", self.peer, export.name)
            if not self._aborted:
                self._serving = self._begin(export)
                await self._serving.transmit()
        finally:
            await self._registry.close(export)
            log.info("%s: closed %s", self.peer, export.name)
        if self._serving is not None:
            await self._serving.linger()

    async def _negotiate(self) -> Export | RemoteExport | None:
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
            await read_to_end(self._sock, self._readiness)  # lest the client never sees the alert
            return False
        self._relay = Relay(self._sock, session, self.peer)
        self._sock = self._relay.inner
        self._readiness = Readiness(self._sock)
        return True

    async def _answer(self, question: Event) -> Export | RemoteExport | None:
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
                contexts = [context for _, context in handshake.contexts]
                export = await registry.open(question.name, contexts, self.abort)
                # Its size may have grown meanwhile.
                handshake.answer_open(replace(described, size=export.size))
                return export
        except StorageError as error:
            handshake.refuse(str(error))
        except Exception:
            log.exception("%s: the registry failed", self.peer)
            handshake.refuse("internal error of the server")
        return None

    def _begin(self, export: Export | RemoteExport) -> Serving:
        handshake = self._handshake
        agreement = Agreement(
            style=handshake.style,
            contexts=handshake.contexts,
            peer=self.peer,
            received=handshake.trailing_data,
            relayed=self._relay is not None,
        )
        serving: Serving
        if isinstance(export, RemoteExport):
            serving = export.serve(self._sock, agreement)
        else:
            serving = Session(self._sock, export, agreement)
        if self._finishing:
            serving.finish()
        return serving
