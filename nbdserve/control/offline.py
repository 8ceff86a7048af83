"""Serving a data directory for the lifetime of one command, when no daemon does.

The application runs on an event loop in a thread of its own, so the command in the main thread is
the plain, blocking client that it is with a daemon.
"""

import asyncio
import contextlib
import logging
import threading
from concurrent.futures import Future
from pathlib import Path

from backends.local_layers import LocalLayerStore
from backends.ownership import give_to_owner
from nbdserve.configuration.environment import policy_of
from nbdserve.control.server import ControlServer
from nbdserve.control.state import Host, State
from nbdserve.fetcher.process import FetcherProcess
from nbdserve.logs import Logs
from snapshots.catalogue import Catalogue

log = logging.getLogger(__name__)

_LOGS = Logs("warning")


class OfflineServer:
    """Holds the lock of ``data`` and serves it from construction to :meth:`stop`.

    The constructor raises InUseError when another process holds the lock.
    """

    def __init__(self, data: Path) -> None:
        self._data = data
        self._policy = policy_of(data)
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._leave = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="offline control", daemon=True)
        self._thread.start()
        self._loop = self._ready.result()

    def stop(self, *, at_once: bool = False) -> None:
        """Leave when no other command is connected any more, or ``at_once``.

        A second call does nothing.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has left
            self._loop.call_soon_threadsafe(self._cancel if at_once else self._leave.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                log.exception("closing the data directory failed")
            else:
                self._ready.set_exception(error)

    async def _serve(self) -> None:
        store = LocalLayerStore(self._data)
        # It finds what is to be restored lazily; fetching it is left to the daemon.
        fetcher = FetcherProcess(self._data, _LOGS, lambda: store.lock_descriptor)
        catalogue = await Catalogue.open(store, fetcher=fetcher)
        catalogue.space.policy = self._policy
        try:
            await self._serve_until_left(store, catalogue)
        finally:
            await catalogue.close()
            await asyncio.to_thread(give_to_owner, self._data)

    async def _serve_until_left(self, store: LocalLayerStore, catalogue: Catalogue) -> None:
        server = ControlServer(State(catalogue, store, Host(self._data, daemon=False)))
        await server.start()
        try:
            self._lingering = asyncio.create_task(self._linger(server))
            self._ready.set_result(asyncio.get_running_loop())
            await asyncio.wait({self._lingering})
        finally:
            await server.stop()

    async def _linger(self, server: ControlServer) -> None:
        await self._leave.wait()
        told = asyncio.get_running_loop().call_later(
            1.0, log.warning, "waiting for other commands that use %s through this one", self._data
        )
        try:
            await server.linger()
        finally:
            told.cancel()

    def _cancel(self) -> None:
        self._lingering.cancel()
