"""What was lent to a client stays what it was, whatever happens to the layers meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from backends.errors import UnavailableError
from backends.local_layers import LocalLayerStore
from backends.page_cache import is_cached
from nbdserve.protocol.constants import ReplyStyle
from nbdserve.server.transmission import Transmission
from snapshots import lending
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from tests.nbdserve.server.nbd_client import READ, request

MIB = 1 << 20
SIZE = 16 * MIB
START, END = MIB + 4096, 9 * MIB  # of what the merge moves, 4 MiB at a time
# Around the end of the first 4 MiB; all of it fits into a socket.
MOVED, LOAN = 5 * MIB - (48 << 10), 96 << 10


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "GRACE", 0.05)


def cached_pages_can_be_counted(directory: Path) -> bool:
    path = directory / "probe"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        return is_cached(file.fileno(), 0, 4096)


class Scene:
    """A volume of two layers, ``old`` over ``older``, and the head; a client that reads it."""

    def __init__(self, catalogue: Catalogue, handle: Handle, content: bytes) -> None:
        self.catalogue = catalogue
        self.handle = handle
        self.content = content
        ours, self.client = socket.socketpair()
        ours.setblocking(False)
        self.client.setblocking(False)
        style = ReplyStyle.SIMPLE
        self.transmission = Transmission(ours, handle, style=style, contexts=(), peer="test")
        self.transmission.start(b"")

    @classmethod
    async def make(cls, path: Path) -> Scene:
        catalogue = await Catalogue.open(LocalLayerStore(path))
        await catalogue.create_volume("v", SIZE)
        handle = await catalogue.open_volume("v", lambda: None)
        assert isinstance(handle, Handle)
        content = os.urandom(SIZE)
        await handle.write(0, content)
        await catalogue.create_snapshots([("v", "older")])
        await handle.write(START, content[START:END])
        await catalogue.create_snapshots([("v", "old")])
        # Read in from the disk, the page cache keeps it in large folios that borders cut.
        for data in (path / "layers").glob("*/data-*"):
            with data.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(MIB):
                    pass
        return cls(catalogue, handle, content)

    async def ask(self, offset: int, length: int) -> None:
        """Send a READ and wait until its reply is in the client's socket."""
        before = self.transmission.mark()
        await asyncio.get_running_loop().sock_sendall(self.client, request(READ, offset, length))
        while self.transmission.mark() < before + 16 + length:  # noqa: ASYNC110 - from outside
            await asyncio.sleep(0.001)

    async def take(self, length: int) -> bytes:
        reply = b""
        while len(reply) < 16 + length:
            reply += await asyncio.get_running_loop().sock_recv(
                self.client, 16 + length - len(reply)
            )
        return reply[16:]

    async def close(self) -> None:
        self.client.close()
        await self.transmission.closed
        await self.catalogue.close_export(self.handle)
        await self.catalogue.close()


def test_a_merge_waits_until_the_client_has_what_it_was_lent(tmp_path: Path) -> None:
    if not cached_pages_can_be_counted(tmp_path):
        pytest.skip("this kernel has no cachestat: nothing is lent")

    async def scenario() -> None:
        scene = await Scene.make(tmp_path / "data")
        await scene.ask(MOVED, LOAN)
        assert scene.handle.view._lent
        deletion = asyncio.create_task(scene.catalogue.delete_snapshot("v", "older"))
        await asyncio.sleep(1)
        assert not deletion.done()
        assert await scene.take(LOAN) == scene.content[MOVED : MOVED + LOAN]
        await deletion
        assert len(scene.handle.view.stack) == 2
        await scene.ask(0, SIZE)
        assert await scene.take(SIZE) == scene.content
        await scene.close()

    asyncio.run(scenario())


def test_without_the_wait_the_reply_would_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: this is what it guards against."""
    if not cached_pages_can_be_counted(tmp_path):
        pytest.skip("this kernel has no cachestat: nothing is lent")

    async def at_once(borrowers: object) -> bool:
        return True

    async def scenario() -> None:
        scene = await Scene.make(tmp_path / "data")
        await scene.ask(MOVED, LOAN)
        monkeypatch.setattr("snapshots.view.wait_for_loans", at_once)
        await scene.catalogue.delete_snapshot("v", "older")
        changed = await scene.take(LOAN) != scene.content[MOVED : MOVED + LOAN]
        await scene.ask(0, SIZE)
        assert await scene.take(SIZE) == scene.content
        await scene.close()
        if not changed:
            pytest.skip("this file system does not zero pages in place")

    asyncio.run(scenario())


def test_a_client_that_takes_nothing_puts_merges_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "RECALL", 0.2)

    async def scenario() -> None:
        scene = await Scene.make(tmp_path / "data")
        await scene.ask(MOVED, LOAN)
        if not scene.handle.view._lent:
            pytest.skip("this kernel has no cachestat: nothing is lent")
        with pytest.raises(UnavailableError, match="does not take its replies"):
            await scene.catalogue.delete_snapshot("v", "older")
        assert len(scene.handle.view.stack) == 3
        assert await scene.take(LOAN) == scene.content[MOVED : MOVED + LOAN]
        await scene.catalogue._merging.merge_now()
        assert len(scene.handle.view.stack) == 2
        await scene.ask(0, SIZE)
        assert await scene.take(SIZE) == scene.content
        await scene.close()

    asyncio.run(scenario())


def test_layers_that_are_being_moved_lend_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        scene = await Scene.make(tmp_path / "data")
        view = scene.handle.view
        (_, bottom), (_, upper), _ = view.stack
        assert view.stop_lending(bottom.name) is False  # nothing was lent so far
        assert view.try_lend(0, MIB) is None
        assert view.try_lend(0, 2 * MIB) is None
        lent = view.try_lend(START, 2 * MIB)
        if lent is not None:  # the kernel has cachestat
            assert [length for _, _, length in lent] == [2 * MIB]
            assert view.stop_lending(upper.name) is True
        assert view.try_lend(START, 2 * MIB) is None
        await scene.close()

    asyncio.run(scenario())
