"""Runs a server with in-memory exports for one test."""

import asyncio
import contextlib
import tempfile
from pathlib import Path

from nbdserve.server import Server
from nbdserve.server.connection import HANDSHAKE_TIMEOUT
from nbdserve.server.permissions import Permissions

from .memory_export import MemoryExport, MemoryRegistry
from .nbd_client import Client

TIMEOUT = 20


class Harness:
    """A server on a Unix socket, its registry, and clients of it."""

    def __init__(self, exports, rules, handshake_timeout):
        self.registry = MemoryRegistry(*exports)
        self.export = exports[0]
        self.server = Server(self.registry, Permissions(rules), handshake_timeout)
        self.directory = tempfile.TemporaryDirectory()
        self.path = str(Path(self.directory.name) / "nbd.sock")
        self.clients = []

    async def connect(self, name="disk", **options):
        client = await Client.connect(self.path, name, **options)
        self.clients.append(client)
        return client

    async def raw(self):
        client = await Client.raw(self.path)
        self.clients.append(client)
        return client

    async def no_connections(self):
        """Wait until the server has none left."""
        while self.server.connections:  # noqa: ASYNC110 - tests look from outside
            await asyncio.sleep(0.005)


async def settle(condition=lambda: False):
    """Let the loop turn until the condition holds, or long enough for all that can happen."""
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.001)


def serve(test, *exports, rules=(), handshake_timeout=HANDSHAKE_TIMEOUT, **listener):
    """Run the coroutine function ``test(harness)``; all it opened must be closed after it.

    ``listener`` goes to ``Server.listen_unix``.
    """

    async def main():
        harness = Harness(exports or [MemoryExport()], rules, handshake_timeout)
        with harness.directory:
            await harness.server.listen_unix(harness.path, **listener)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await test(harness)
            finally:
                for export in harness.registry.exports.values():
                    if export.gate is not None:
                        export.gate.set()
                for client in harness.clients:
                    client.close()
                await harness.server.drain(5)
            assert harness.server.connections == 0
            assert harness.registry.opened == harness.registry.closed
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                    await asyncio.wait_for(task, 1)

    asyncio.run(main())
