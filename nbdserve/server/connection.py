"""One client's connection, from the accepted socket to the closed one.

::

    HANDSHAKE --export opened--> TRANSMISSION --DISC, end, finish--> LINGERING --> CLOSED
     |  ^ |                          |                                              ^
     TLS  +-- refused, aborted, -----+---- revoked, wrong magic, socket error ------+
              timed out

- The handshake has a number of seconds in all, that of TLS included, however many options there
  are; only the opening of the export is not counted in. Others have their turn after each question,
  also when neither this client's options nor our replies ever have to wait.
- A client takes a place of its listener when it comes, and may lose it in its handshake to another
  (see entrance.py).
- What a client may have is asked of the permissions before the registry (see permissions.py).
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
from collections.abc import Callable
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
from nbdserve.server.entrance import Entrance
from nbdserve.server.exports import (
    Agreement,
    Export,
    ExportRegistry,
    RemoteExport,
    Serving,
)
from nbdserve.server.identity import Identity
from nbdserve.server.meter import Meters
from nbdserve.server.permissions import PermissionRefusedError, Permissions
from nbdserve.server.readiness import Readiness
from nbdserve.server.session import Session, read_to_end
from nbdserve.server.tls import Tls, TlsError
from nbdserve.server.tls_relay import Relay
from snapshots.limits import Limits

HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds that a client has for the handshake, where nothing else is configured."""

_RECEIVE_SIZE: Final = 16 << 10

log = logging.getLogger(__name__)


class Connection:
    """Serves one client; ``run`` does it all, the other methods end it from outside."""

    def __init__(
        self,
        sock: socket.socket,
        registry: ExportRegistry,
        identity: Identity,
        entrance: Entrance,
        tls: Tls | None,
        permissions: Permissions,
        handshake_timeout: float,
        meters: Meters,
        limits: Callable[[str], Limits],
    ) -> None:
        self.identity = identity
        self.entrance = entrance
        self._sock = sock
        self._registry = registry
        self._permissions = permissions
        self._meters = meters
        self._limits = limits
        self._entered: str | None = None  # the export whose connections we are counted among
        self._readiness = Readiness(sock)
        self._tls_mode = TlsMode.OFF if tls is None else tls.mode
        self._handshake = Handshake(self._tls_mode)
        self._handshake_timeout = handshake_timeout
        self._tls = tls
        self._relay: Relay | None = None
        self._serving: Serving | None = None
        self._finishing = False
        self._aborted = False

    @property
    def export(self) -> str | None:
        """The name of the export that it has opened, or is about to."""
        return self._entered

    async def run(self) -> None:
        """Serve the client until the connection is closed. Never raises for what a client does."""
        try:
            await self._serve()
        except TimeoutError:
            self.entrance.report(self.identity, "the handshake took too long")
            if self._relay is not None:
                self._relay.abort()
        except OSError as error:
            if not self._aborted:
                self.entrance.report(self.identity, f"connection lost: {error.strerror or error}")
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
        self.entrance.settle(self)
        about = self.identity.about(export.name)
        if self._relay is not None:
            self._relay.about = about
        try:
            log.info("opened", extra=about)
            if not self._aborted:
                self._serving = self._begin(export)
                await self._serving.transmit()
        finally:
            self._leave_export()
            await self._registry.close(export)
            log.info("closed", extra=about)
        if self._serving is not None:
            await self._serving.linger()

    async def _negotiate(self) -> Export | RemoteExport | None:
        """Carry out the handshake; returns the opened export, None when the connection is over."""
        handshake = self._handshake
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._handshake_timeout
        while True:
            readiness = self._readiness
            await readiness.send(handshake.data_to_send(), deadline)
            # What was received may hold many questions, and each is some work.
            await asyncio.sleep(0)
            if loop.time() > deadline:
                raise TimeoutError
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
                self.entrance.report(self.identity, event.reason)
                with contextlib.suppress(OSError):  # the client may have closed already
                    await readiness.send(handshake.data_to_send(), deadline)
                return None
            if isinstance(event, StartTls):
                await readiness.send(handshake.data_to_send(), deadline)
                if not await self._start_tls(deadline):
                    return None
                handshake.tls_started()
                continue
            begun = loop.time()
            export = await self._answer(event)
            if export is not None:
                deadline += loop.time() - begun
                try:
                    await readiness.send(handshake.data_to_send(), deadline)
                except BaseException:
                    self._leave_export()
                    await self._registry.close(export)
                    raise
                return export

    async def _start_tls(self, deadline: float) -> bool:
        """Let a relay have the socket; False when the connection is over."""
        assert self._tls is not None
        try:
            session = await self._tls.accept(self._readiness, deadline)
        except TlsError as error:
            self.entrance.report(self.identity, f"TLS handshake failed: {error}")
            await read_to_end(self._sock, self._readiness)  # lest the client never sees the alert
            return False
        self._relay = Relay(self._sock, session, self.identity.about())
        self._sock = self._relay.inner
        self._readiness = Readiness(self._sock)
        names = session.certificate_names
        self.identity = replace(self.identity, secure=True, certificate_names=names)
        about = self.identity.about()
        log.debug("TLS has begun, the certificate's names are %s", names, extra=about)
        return True

    async def _answer(self, question: Event) -> Export | RemoteExport | None:
        """Answer a question of the handshake from the registry."""
        handshake, registry, permissions = self._handshake, self._registry, self._permissions
        if self._finishing:
            handshake.refuse("the server is shutting down", OptionReply.ERR_SHUTDOWN)
            return None
        try:
            if isinstance(question, ListExports):
                handshake.answer_list(permissions.select(registry.list_names(), self.identity))
            elif isinstance(question, DescribeExport):
                permissions.check(question.name, self.identity, self._tls_mode)
                handshake.answer_describe(await registry.describe(question.name))
            elif isinstance(question, OpenExport):
                permissions.check(question.name, self.identity, self._tls_mode)
                described = await registry.describe(question.name)
                permissions.enter(question.name)
                self._entered = question.name
                contexts = [context for _, context in handshake.contexts]
                try:
                    export = await registry.open(question.name, contexts, self.abort)
                except (OSError, StorageError) as error:
                    # It is there: so this is the operator's business, too.
                    about = self.identity.about(question.name)
                    log.error("the export cannot be opened: %s", error, extra=about)
                    raise
                # Its size may have grown meanwhile.
                handshake.answer_open(replace(described, size=export.size))
                return export
        except PermissionRefusedError as error:
            self.entrance.report(self.identity, str(error))
            handshake.refuse(str(error), error.reply)
        except StorageError as error:
            handshake.refuse(str(error))
        except OSError as error:
            handshake.refuse(error.strerror or str(error))
        except Exception:
            log.exception("the registry failed", extra=self.identity.about())
            handshake.refuse("internal error of the server")
        self._leave_export()
        return None

    def _leave_export(self) -> None:
        if self._entered is not None:
            self._permissions.leave(self._entered)
            self._entered = None

    def _begin(self, export: Export | RemoteExport) -> Serving:
        handshake = self._handshake
        agreement = Agreement(
            style=handshake.style,
            contexts=handshake.contexts,
            peer=self.identity.peer,
            connection=self.identity.connection,
            received=handshake.trailing_data,
            relayed=self._relay is not None,
            limits=self._limits(export.key),
        )
        serving: Serving
        if isinstance(export, RemoteExport):
            serving = export.serve(self._sock, agreement)
        else:
            serving = Session(self._sock, export, agreement, self._meters)
        if self._finishing:
            serving.finish()
        return serving
