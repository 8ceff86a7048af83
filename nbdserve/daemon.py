"""The daemon: one process that owns a data directory and serves its volumes over NBD.

Start: lock the directory, open the catalogue (which recovers what a crash left), serve the control
socket, listen for NBD. Stop, at the first SIGTERM or SIGINT: no new connections, requests in
flight are answered, claims on the control socket end, everything is flushed, the lock is released.
A second signal ends the process at once, as a crash would.

With more than one worker, volumes are open in processes of their own (see nbdserve/workers); this
one does the handshakes, serves the control socket and owns the catalogue. What lazy volumes lack
is fetched by yet another one (nbdserve/fetcher).
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.block_device import is_rotational
from backends.errors import InUseError, StorageError
from backends.local_layers import LocalLayerStore
from nbdserve.addresses import UnixAddress
from nbdserve.configuration.listeners import ListenerConfiguration
from nbdserve.configuration.settings import Configuration
from nbdserve.configuration.tls import TlsConfiguration
from nbdserve.control import address
from nbdserve.control.client import Client, path
from nbdserve.control.server import ControlServer
from nbdserve.control.state import Host, State
from nbdserve.fetcher.process import FetcherProcess
from nbdserve.registry import CatalogueExports
from nbdserve.server import Server
from nbdserve.server.permissions import Permissions
from nbdserve.server.tls import Tls, load_tls
from nbdserve.workers.host import WorkerHost
from snapshots.catalogue import Catalogue

log = logging.getLogger(__name__)

LOCK_SECONDS = 15.0
"""How long the daemon waits for a command that works on the directory without a daemon."""

DRAIN_SECONDS = 30.0
"""How long requests in flight may take once the daemon stops."""


async def run(configuration: Configuration, announce: Callable[[str], None]) -> None:
    """Serve until a signal; ``announce`` is called with each address once all are listened on.

    Raises StorageError when the directory or an address cannot be used.
    """
    certificates = _load_certificates(configuration)
    store = LocalLayerStore(configuration.data)
    workers = [
        WorkerHost(configuration.data, configuration.log_level, lambda: store.lock_descriptor)
        for _ in range(configuration.workers)
        if configuration.workers > 1
    ]
    fetcher = FetcherProcess(
        configuration.data, configuration.log_level, lambda: store.lock_descriptor
    )
    stop = _stop_signal(workers, fetcher)
    _raise_descriptor_limit()
    catalogue = await _open_catalogue(store, workers, fetcher, stop)
    try:
        catalogue.space.policy = configuration.space
        catalogue.hydrate()
        host = Host(configuration.data, daemon=True)
        control = ControlServer(State(catalogue, store, host))
        permissions = Permissions(configuration.exports)
        timeout = configuration.handshake_timeout
        exports = CatalogueExports(catalogue, is_rotational(store.path))
        server = Server(exports, permissions, timeout)
        await _serve(configuration, certificates, server, control, announce, stop)
    finally:
        await catalogue.close()


def _load_certificates(configuration: Configuration) -> dict[TlsConfiguration, Tls]:
    """Read the files of all listeners, each once."""
    return {
        tls: load_tls(tls.mode, tls.certificate, tls.key, tls.client_ca)
        for tls in dict.fromkeys(listener.tls for listener in configuration.listeners)
        if tls is not None
    }


async def _open_catalogue(
    store: LocalLayerStore,
    workers: Sequence[WorkerHost],
    fetcher: FetcherProcess,
    stop: asyncio.Event,
) -> Catalogue:
    """Open it; a command that happens to have the lock is waited for, another daemon is not."""
    deadline = asyncio.get_running_loop().time() + LOCK_SECONDS
    while True:
        try:
            return await Catalogue.open(store, workers, fetcher)
        except InUseError:
            late = asyncio.get_running_loop().time() > deadline
            if late or stop.is_set() or await asyncio.to_thread(_daemon_serves, store.path):
                raise
        await asyncio.sleep(0.1)


def _daemon_serves(data: Path) -> bool:
    try:
        return bool(Client(lambda: address.connect(data)).get(path("status"))["daemon"])
    except (OSError, StorageError):
        return False  # it may just be starting or ending


async def _serve(
    configuration: Configuration,
    certificates: dict[TlsConfiguration, Tls],
    server: Server,
    control: ControlServer,
    announce: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    try:
        for wanted in configuration.listeners:
            tls = None if wanted.tls is None else certificates[wanted.tls]
            await _listen(server, wanted, tls)
            if wanted.lacks:
                _warn_of(wanted, limited=any(rule.certificates for rule in configuration.exports))
        control.state.host.listening.extend(server.addresses)
        await control.start()
        for listening in server.addresses:
            announce(listening)
        await stop.wait()
        log.info("stopping: requests in flight are answered and data is flushed")
    finally:
        if not await server.drain(DRAIN_SECONDS):
            log.warning("some requests were not answered within %d seconds", DRAIN_SECONDS)
        await control.stop()


async def _listen(server: Server, wanted: ListenerConfiguration, tls: Tls | None) -> None:
    address, access, most = wanted.address, wanted.access, wanted.max_connections
    if isinstance(address, UnixAddress):
        mode, group = wanted.socket_mode, wanted.socket_group
        await server.listen_unix(address.path, tls, access, most, mode, group)
    else:
        await server.listen_tcp(address.host, address.port, tls, access, most)


def _warn_of(listener: ListenerConfiguration, *, limited: bool) -> None:
    log.warning(
        "%s is open to the network without %s: whoever reaches it can read and write every volume"
        "%s",
        listener.address,
        listener.lacks,
        " that no certificate is asked for" if limited else "",
    )


def _raise_descriptor_limit() -> None:
    """A volume with many layers and a daemon with many clients need many descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _stop_signal(workers: Sequence[WorkerHost], fetcher: FetcherProcess) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process and its children."""
    stop = asyncio.Event()

    def receive(number: int) -> None:
        if stop.is_set():
            fetcher.kill()
            for worker in workers:
                worker.kill()
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, receive, number)
    return stop
