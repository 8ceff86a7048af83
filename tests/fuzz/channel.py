"""Target: the channel between the daemon and a worker, given any bytes by the other side.

Input: a byte of cuts, then what the other side sends. The other side is a program of ours, so the
rule is only that what is no message ends the channel, and neither raises nor leaves anything.
"""

import asyncio
import contextlib
import random
import socket

from nbdserve.workers.channel import Channel

from .wire import check

TERMS = 1


class _End:
    def __init__(self):
        self.ended = []

    async def call(self, method, arguments):
        return [method, arguments]

    def event(self, name, arguments, sock):
        check(sock is None, "a socket out of nothing")

    def closed(self, wrong):
        self.ended.append(wrong)


_loop = None


def run(data):
    """Check one input."""
    global _loop  # noqa: PLW0603 - a loop for each input would take most of the time
    if _loop is None:
        _loop = asyncio.new_event_loop()
    complaints = []
    _loop.set_exception_handler(lambda _, context: complaints.append(context))
    loop, _loop = _loop, None  # what fails leaves things behind in it
    loop.run_until_complete(_play(data[:TERMS], data[TERMS:]))
    _loop = loop
    check(not complaints, f"{complaints}")


async def _play(terms, sent):
    dice = random.Random(terms)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    end = _End()
    channel = Channel(theirs, end)
    waiting = [asyncio.ensure_future(channel.call("call", number)) for number in range(3)]
    await asyncio.sleep(0)
    while sent:
        piece = dice.choice((1, 4, 50, len(sent)))
        with contextlib.suppress(OSError):
            ours.send(sent[:piece])
        sent = sent[piece:]
        await asyncio.sleep(0)
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_WR)
    for _ in range(50):
        await asyncio.sleep(0)
    check(len(end.ended) == 1, f"it ended {len(end.ended)} times")
    check(not channel.open and not channel._tasks, "the channel is open, or works on")
    channel.fail_calls(OSError(5, "the end"))
    await asyncio.gather(*waiting, return_exceptions=True)
    ours.close()
