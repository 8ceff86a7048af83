"""A client of a view that a worker has open: its requests go over a socket that was handed over."""

import asyncio
import os
import socket

from backends.local_layers import LocalLayerStore
from nbdserve.logs import Logs
from nbdserve.server.exports import Agreement
from nbdserve.workers.host import WorkerHost
from snapshots.catalogue import Catalogue
from tests.nbdserve.server.nbd_client import (
    BLOCK_STATUS,
    DISC,
    FLUSH,
    NO_HOLE,
    READ,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    extents,
    statuses,
)

ALLOCATION = ("base:allocation",)
_ERRNO = {1: 1, 5: 5, 12: 12, 22: 22, 28: 28}


async def open_over_workers(path, count=2, log_level="warning"):
    """A catalogue whose views are open in worker processes."""
    store = LocalLayerStore(path)
    hosts = [WorkerHost(path, Logs(log_level), lambda: store.lock_descriptor) for _ in range(count)]
    return await Catalogue.open(store, hosts)


class RemoteHandle:
    """What ``Handle`` is to a view of this process; any number of requests at a time."""

    def __init__(self, lease, serving, client, contexts):
        self.lease = lease
        self.serving = serving
        self.size = lease.size
        self._contexts = dict(contexts)
        self._client = client
        self._waiting = {}
        self._cookie = 0
        self._reader = asyncio.get_running_loop().create_task(self._read_replies())

    @classmethod
    async def begin(cls, lease, names=ALLOCATION):
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        contexts = tuple(enumerate(names, 1))
        serving = lease.serve(theirs, Agreement(STRUCTURED, contexts, "test", b"", False))
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        return cls(lease, serving, Client(reader, writer, STRUCTURED), contexts)

    async def end(self, catalogue):
        """Disconnect, and give the lease back once the worker says that it is over."""
        self._client.send(DISC)
        await self.serving.transmit()
        await catalogue.close_export(self.lease)
        await self.serving.linger()
        self._reader.cancel()
        self._client.close()

    async def _read_replies(self):
        try:
            while True:
                reply = await self._client.reply()
                self._waiting.pop(reply.cookie).set_result(reply)
        except (ConnectionError, asyncio.IncompleteReadError):
            for waiter in self._waiting.values():
                waiter.set_exception(ConnectionError("the connection is gone"))
            self._waiting.clear()

    async def _call(self, command, offset=0, length=0, **more):
        if self._reader.done():
            raise ConnectionError("the connection is gone")
        self._cookie += 1
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[self._cookie] = waiter
        self._client.send(command, offset, length, cookie=self._cookie, **more)
        reply = await waiter
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error))
        return reply

    def try_read(self, offset, buffer):
        return False

    def try_write(self, offset, data):
        return False

    async def read(self, offset, buffer):
        if len(buffer):
            buffer[:] = (await self._call(READ, offset, len(buffer))).data

    async def write(self, offset, data):
        if len(data):
            await self._call(WRITE, offset, data=bytes(data))

    async def write_zeroes(self, offset, length, *, no_hole):
        if length:
            await self._call(WRITE_ZEROES, offset, length, flags=NO_HOLE if no_hole else 0)

    async def trim(self, offset, length):
        if length:
            await self._call(TRIM, offset, length)

    async def flush(self):
        await self._call(FLUSH)

    async def list_extents(self):
        """(length, holds data) of all of it."""
        reply = await self._call(BLOCK_STATUS, 0, self.size)
        return [(length, not flags & 1) for length, flags in extents(reply)]

    async def list_statuses(self):
        """(length, status) of all of it, for each context by its name."""
        reply = await self._call(BLOCK_STATUS, 0, self.size)
        return {self._contexts[number]: found for number, found in statuses(reply)}
