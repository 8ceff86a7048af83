"""The channel: calls, events and sockets over a socket pair, and what is no message."""

import asyncio
import os
import resource
import socket
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import errors
from nbdserve.workers import channel as channel_module
from nbdserve.workers.channel import CALL, ERROR, EVENT, Channel
from nbdserve.workers.errors import pack_error, unpack_error
from snapshots.host import HostLostError
from tests.snapshots.stores import until


class End:
    """A receiver that notes what comes; its calls do what ``answers`` says."""

    def __init__(self):
        self.events = []
        self.sockets = []
        self.ended = asyncio.get_running_loop().create_future()
        self.gate = asyncio.Event()
        self.begun = []

    async def call(self, method, arguments):
        self.begun.append(method)
        if method == "wait":
            await self.gate.wait()
        if method == "fail":
            raise errors.NoSpaceError("no space left")
        if method == "fail in the system":
            raise OSError(5, "Input/output error", "/some/file")
        if method == "fail by a fault":
            raise ZeroDivisionError("x")
        return [method, *arguments]

    def event(self, name, arguments, sock):
        self.events.append((name, arguments))
        if sock is not None:
            self.sockets.append(sock)

    def closed(self, wrong):
        self.ended.set_result(wrong)


def run(scene):
    """Run ``scene(one, other, ends)`` with both ends of a channel."""

    async def main():
        pair = socket.socketpair()
        ends = End(), End()
        one, other = (Channel(sock, end) for sock, end in zip(pair, ends, strict=True))
        try:
            async with asyncio.timeout(20):
                await scene(one, other, ends)
        finally:
            one.close()
            other.close()

    asyncio.run(main())


def test_calls_are_answered_in_any_order_and_begun_in_theirs():
    async def scene(one, other, ends):
        waiting = asyncio.ensure_future(one.call("wait", 1))
        assert await one.call("echo", b"x" * 3_000_000, {"a": [1, None]}) == [
            "echo",
            b"x" * 3_000_000,
            {"a": [1, None]},
        ]
        assert not waiting.done()
        ends[1].gate.set()
        assert await waiting == ["wait", 1]
        answers = await asyncio.gather(*(one.call(str(number)) for number in range(200)))
        assert answers == [[str(number)] for number in range(200)]
        assert ends[1].begun[2:] == [str(number) for number in range(200)]

    run(scene)


def test_what_a_call_raises_is_raised_at_the_other_end(caplog):
    async def scene(one, other, ends):
        with pytest.raises(errors.NoSpaceError, match="no space left"):
            await one.call("fail")
        with pytest.raises(OSError, match="Input/output error") as caught:
            await one.call("fail in the system")
        assert (caught.value.errno, caught.value.filename) == (5, "/some/file")
        assert not caplog.records
        with pytest.raises(errors.StorageError, match="internal error of a worker"):
            await one.call("fail by a fault")
        assert caplog.records[0].exc_info

    run(scene)


@pytest.mark.parametrize(
    "error",
    [
        HostLostError("x"),
        errors.CorruptError("y"),
        errors.InUseError("z"),
        OSError(28, "No space left on device"),
    ],
)
def test_errors_keep_their_class(error):
    again = unpack_error(msgpack.unpackb(msgpack.packb(pack_error(error))))
    assert type(again) is type(error)
    assert again.args == error.args


def test_sockets_come_with_their_events():
    async def scene(one, other, ends):
        pairs = [socket.socketpair() for _ in range(50)]
        for number, (mine, _) in enumerate(pairs):
            one.event("before", b"x" * 30_000)
            one.hand_over(mine, "take", number)
            assert not number or pairs[0][0].fileno() == -1, "it is closed once it is on its way"
        await until(lambda: len(ends[1].sockets) == 50)
        assert [event for event in ends[1].events if event[0] == "take"] == [
            ("take", [number]) for number in range(50)
        ]
        for (_, theirs), received in zip(pairs, ends[1].sockets, strict=True):
            theirs.send(b"hello")
            assert received.recv(10) == b"hello"
            assert not os.get_inheritable(received.fileno())
            received.close()
            theirs.close()

    run(scene)


def test_an_event_whose_socket_found_no_descriptor_comes_without():
    async def scene(one, other, ends):
        mine, theirs = socket.socketpair()
        one.hand_over(mine, "take", 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            await until(lambda: ends[1].events)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert ends[1].events == [("take", [1])]
        assert not ends[1].sockets
        second, _other = socket.socketpair()
        one.hand_over(second, "take", 2)
        await until(lambda: len(ends[1].events) == 2)
        assert len(ends[1].sockets) == 1
        ends[1].sockets[0].close()
        theirs.close()

    run(scene)


def test_a_side_that_is_not_read_delays_nothing_but_itself():
    async def scene(one, other, ends):
        other._loop.remove_reader(other._sock)
        for number in range(100):
            one.event("much", number, b"x" * 100_000)
        mine, theirs = socket.socketpair()
        one.hand_over(mine, "take")
        other._loop.add_reader(other._sock, other._on_readable)
        await until(lambda: ends[1].sockets)
        assert [arguments[0] for name, arguments in ends[1].events[:-1]] == list(range(100))
        ends[1].sockets[0].close()
        theirs.close()

    run(scene)


def test_the_other_side_ends_in_the_middle_of_a_call():
    async def scene(one, other, ends):
        calls = [asyncio.ensure_future(one.call("wait")) for _ in range(3)]
        await one.call("echo")
        other.close()
        assert await ends[0].ended is None
        await asyncio.sleep(0.01)
        assert not any(call.done() for call in calls), "whether it has ended is not known yet"
        one.fail_calls(HostLostError("it has ended"))
        for call in calls:
            with pytest.raises(HostLostError, match="it has ended"):
                await call
        with pytest.raises(HostLostError):
            await one.call("echo")

    run(scene)


def frame(message):
    body = msgpack.packb(message)
    return struct.pack(">I", len(body)) + body


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 8,
        struct.pack(">I", channel_module.MAX_FRAME + 1),
        b"\0\0\0\0",
        struct.pack(">I", 1) + b"\xc1",
        frame(7),
        frame([]),
        frame([99, 1]),
        frame([CALL]),
        frame([CALL, 1, "x"]),
        frame([1, 12345, "an answer to nothing"]),
        frame([EVENT, "x"]),
        frame([4, "no socket came with it", []]),
        frame({"a": 1}),
    ],
)
def test_what_is_no_message_ends_the_channel(garbage):
    async def main():
        ours, theirs = socket.socketpair()
        end = End()
        channel = Channel(theirs, end)
        ours.send(frame([EVENT, "good", []]) + garbage)
        async with asyncio.timeout(20):
            wrong = await end.ended
        assert wrong is not None
        assert end.events == [("good", [])]
        assert not channel.open
        ours.settimeout(10)
        assert ours.recv(1) == b""
        ours.close()

    asyncio.run(main())


@pytest.mark.parametrize("error", [7, [], ["OSError", "x"], [[], "x"]])
def test_an_answer_that_is_no_error_ends_the_channel_and_its_call(error):
    async def main():
        ours, theirs = socket.socketpair()
        end = End()
        channel = Channel(theirs, end)
        call = asyncio.ensure_future(channel.call("x"))
        await asyncio.sleep(0)
        ours.send(frame([ERROR, 1, error]))
        async with asyncio.timeout(20):
            assert await end.ended is not None
            channel.fail_calls(HostLostError("it has ended"))
            with pytest.raises(HostLostError, match="it has ended"):
                await call
        ours.close()

    asyncio.run(main())


@given(st.binary(max_size=200))
def test_random_bytes_never_escape(noise):
    async def main():
        ours, theirs = socket.socketpair()
        end = End()
        channel = Channel(theirs, end)
        ours.send(noise)
        ours.close()
        async with asyncio.timeout(20):
            await end.ended
        assert not channel.open

    asyncio.run(main())
