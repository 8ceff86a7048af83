"""Short reads that the page cache did not have at the first try."""

import asyncio
import errno
import os

import pytest

from nbdserve.server.transmission import MAX_REQUESTS

from .harness import serve, settle
from .memory_export import MemoryExport
from .nbd_client import DISC, READ, SIMPLE, STYLES, request

SIZE = 1 << 20
both_replies = pytest.mark.parametrize("style", STYLES)


class Cold(MemoryExport):
    """Each place is refused ``misses`` times, then ``after`` is raised or the read is done."""

    def __init__(self, misses=1, after=None):
        super().__init__(size=SIZE)
        self.content[:] = os.urandom(SIZE)
        self.held.update(range(SIZE // 4096))
        self.misses = misses
        self.after = after
        self.tries = {}

    def try_read(self, offset, buffer):
        self.tries[offset] = self.tries.get(offset, 0) + 1
        if self.tries[offset] <= self.misses:
            buffer[:] = b"?" * len(buffer)
            return False
        if self.after is not None:
            raise self.after
        return super().try_read(offset, buffer)

    def reads(self):
        return [call for call in self.calls if call[0] == "read"]


@both_replies
@pytest.mark.parametrize("size", [1, 4096, 65536])
def test_the_second_try_needs_no_task(style, size):
    async def test(harness):
        client = await harness.connect(style=style)
        for offset in (0, 5, 4096):
            assert (await client.call(READ, offset, size)).data == (
                harness.export.content[offset : offset + size]
            )
        assert not harness.export.reads()

    serve(test, Cold())


@both_replies
@pytest.mark.parametrize(("misses", "size"), [(2, 4096), (1, 65537)])
def test_what_is_refused_twice_or_long_becomes_a_task(style, misses, size):
    async def test(harness):
        client = await harness.connect(style=style)
        assert (await client.call(READ, 7, size)).data == harness.export.content[7 : 7 + size]
        assert harness.export.reads() == [("read", 7, size)]

    serve(test, Cold(misses))


@both_replies
def test_an_error_at_the_second_try_is_answered(style):
    async def test(harness):
        client = await harness.connect(style=style)
        assert (await client.call(READ, 7, 4096)).error == errno.EIO
        harness.export.after = None
        assert (await client.call(READ, 7, 4096)).error == 0

    serve(test, Cold(after=OSError(errno.EIO, "the disk")))


@pytest.mark.parametrize("misses", [1, 2])
def test_many_at_once_are_all_answered_and_few_are_under_way(misses):
    async def test(harness):
        client = await harness.connect(style=SIMPLE)
        count = 3 * MAX_REQUESTS
        client.writer.write(
            b"".join(request(READ, 512 * i, 512, cookie=i) for i in range(count))
            + request(DISC, cookie=1)
        )
        seen = set()
        for _ in range(count):
            cookie = int.from_bytes((await client.reader.readexactly(16))[8:], "big")
            seen.add(cookie)
            assert (
                await client.reader.readexactly(512)
                == (harness.export.content[512 * cookie : 512 * cookie + 512])
            )
        assert len(seen) == count
        assert await client.at_end() == b""
        assert harness.export.most_waiting <= MAX_REQUESTS

    serve(test, Cold(misses))


def test_a_client_that_vanishes_in_between():
    async def test(harness):
        client = await harness.connect()
        client.writer.write(b"".join(request(READ, 512 * i, 512) for i in range(200)))
        await settle(lambda: harness.export.tries)
        client.close()
        await harness.no_connections()
        await asyncio.sleep(0)

    serve(test, Cold(misses=5))


def test_the_end_of_the_server_lets_them_be_answered():
    async def test(harness):
        client = await harness.connect(style=SIMPLE)
        client.writer.write(request(READ, 0, 512))
        while not harness.export.tries:  # noqa: ASYNC110 - from outside
            await asyncio.sleep(0)
        assert await harness.server.drain(5)
        assert (await client.at_end())[16:] == harness.export.content[:512]

    serve(test, Cold())
