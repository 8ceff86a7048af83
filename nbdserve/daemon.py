"""The daemon: one process that owns a data directory and serves its volumes over NBD.

Start: lock the directory, open the catalogue (which recovers what a crash left), serve the control
socket, listen for NBD. Stop, at the first SIGTERM or SIGINT: no new connections, requests in
flight are answered, claims on the control socket end, everything is flushed, the lock is released.
A second signal ends the process at once, as a crash would. SIGHUP reads the configuration again
(reloading.py).

With more than one worker, volumes are open in processes of their own (see nbdserve/workers); this
one does the handshakes, serves the control socket and owns the catalogue. What lazy volumes lack
is fetched by yet another one (nbdserve/fetcher).
"""

import asyncio
import contextlib
import logging
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.block_device import is_rotational
from backends.errors import InUseError, StorageError, UnavailableError
from backends.local_layers import LocalLayerStore
from nbdserve.configuration.settings import Configuration
from nbdserve.control import address
from nbdserve.control.client import Client, path
from nbdserve.control.server import ControlServer
from nbdserve.control.state import Host, State
from nbdserve.fetcher.process import FetcherProcess
from nbdserve.http.server import HttpServer
from nbdserve.listeners import Listeners, load_certificates
from nbdserve.logs import Logs, write_logs
from nbdserve.measuring import Measuring
from nbdserve.pacing import Pacing
from nbdserve.registry import CatalogueExports
from nbdserve.reloading import Outcome, Reloader, change_of
from nbdserve.server import Server
from nbdserve.server.permissions import ExportRule, Permissions
from nbdserve.signals import Signals
from nbdserve.systemd.notify import Notifier, take_notifier
from nbdserve.systemd.sockets import take_passed_sockets
from nbdserve.systemd.watchdog import Watchdog, take_interval
from nbdserve.workers.host import WorkerHost
from snapshots.catalogue import Catalogue
from snapshots.space import SpacePolicy

log = logging.getLogger(__name__)

LOCK_SECONDS = 15.0
"""How long the daemon waits for a command that works on the directory without a daemon."""


async def run(
    configuration: Configuration,
    announce: Callable[[str], None],
    read_configuration: Callable[[], Configuration],
) -> None:
    """Serve until a signal; ``announce`` is called with each address once all are listened on.

    ``read_configuration`` returns what the configuration is by now, for a reload.

    Raises StorageError when the directory or an address cannot be used, and at the end when
    requests were not answered in time.
    """
    notifier = take_notifier()
    passed = take_passed_sockets()
    interval = take_interval()
    certificates = await load_certificates(configuration)
    store = LocalLayerStore(configuration.data)
    slow = configuration.watching.slow_request_seconds
    measuring = Measuring(slow)
    workers = [
        WorkerHost(
            configuration.data,
            configuration.logs,
            lambda: store.lock_descriptor,
            measuring.retire,
            slow,
        )
        for _ in range(configuration.workers)
        if configuration.workers > 1
    ]
    measuring.processes = workers
    fetcher = FetcherProcess(configuration.data, configuration.logs, lambda: store.lock_descriptor)
    signals = Signals(workers, fetcher)
    _raise_descriptor_limit()
    catalogue = await _open_catalogue(store, workers, fetcher, signals.stop)
    try:
        catalogue.space.policy = configuration.space
        catalogue.hydrate()
        catalogue.set_pace(Pacing(measuring).pause)
        host = Host(configuration.data, daemon=True)
        permissions = Permissions(configuration.exports)
        state = State(catalogue, store, host, measuring=measuring, rules=permissions)
        control = ControlServer(state)
        exports = CatalogueExports(catalogue, is_rotational(store.path))
        timeout = configuration.handshake_timeout
        server = Server(exports, permissions, timeout, measuring.meters, state.limiting.of_key)
        listeners = Listeners(server, passed)

        def change_exports(rules: Sequence[ExportRule]) -> None:
            permissions.change(rules)
            state.limiting.change_rules(permissions)

        def change_logs(logs: Logs) -> None:
            write_logs(logs)
            for worker in workers:
                worker.change_logs(logs)
            fetcher.change_logs(logs)

        def change_space(policy: SpacePolicy) -> None:
            catalogue.space.policy = policy

        def change_timeout(seconds: float) -> None:
            server.handshake_timeout = seconds

        reloader = Reloader(configuration, read_configuration, notifier)
        reloader.add(listeners.prepare)
        reloader.add(change_of("exports", lambda c: c.exports, change_exports, show=None))
        reloader.add(change_of("handshake_timeout", lambda c: c.handshake_timeout, change_timeout))
        reloader.add(change_of("drain_seconds", lambda c: c.drain_seconds, lambda _: None))
        reloader.add(change_of("space", lambda c: c.space, change_space, show=None))
        reloader.add(change_of("logs", lambda c: c.logs, change_logs, show=Logs.describe))

        async def reload() -> Outcome:
            outcome = await reloader.reload()
            host.listening[:] = server.addresses
            return outcome

        state.reload = reload
        tasks = [asyncio.create_task(signals.reload_at_hangup(reload))]
        if interval is not None:
            tasks.append(asyncio.create_task(Watchdog(notifier, workers, interval).run()))
        http: HttpServer | None = None
        try:
            await listeners.start(configuration, certificates)
            host.listening.extend(server.addresses)
            http = await _serve_http(configuration, state)
            await control.start()
            for listening in (*server.addresses, *host.http):
                announce(listening)
            notifier.ready("Serving")
            signals.started.set()
            await signals.stop.wait()
            reloader.close()
            await _drain(server, notifier, reloader.configuration.drain_seconds)
        finally:
            for task in tasks:
                task.cancel()
            await server.drain(0)
            await control.stop()
            if http is not None:
                await http.stop()
    finally:
        await catalogue.close()


async def _drain(server: Server, notifier: Notifier, seconds: float) -> None:
    count = server.connections
    notifier.stopping(f"Stopping: {count} connections are answered what they have asked")
    log.info("stopping: requests in flight are answered and data is flushed")
    if not await server.drain(seconds):
        raise UnavailableError(
            f"stopped, but some requests were not answered within {seconds:g} seconds"
        )
    log.info("all requests that had come were answered; connections ended: %d", count)


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


async def _serve_http(configuration: Configuration, state: State) -> HttpServer | None:
    watching = configuration.watching
    if watching.http is None:
        return None
    http = HttpServer(state, watching.http, watching.http_hosts, page=watching.web)
    await http.start()
    state.host.http.extend(http.listening)
    if watching.is_open:
        log.warning(
            "%s is open to the network: whoever reaches it can read /metrics%s",
            watching.http,
            " and the page" if watching.web else "",
        )
    return http


def _raise_descriptor_limit() -> None:
    """A volume with many layers and a daemon with many clients need many descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
