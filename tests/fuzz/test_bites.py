"""The harnesses bite: each bug that is put in here is found within a few hundred inputs."""

import random
import re
from dataclasses import replace

import pytest

from nbdserve.protocol import handshake, options
from nbdserve.server import transmission
from nbdserve.server.operations import Operations
from nbdserve.workers import channel

from .seeds import TARGETS

MOST = 1500  # inputs until a bug must be found


def bug(target, match):
    """A function that puts a bug in, and what the harness then says."""

    def mark(function):
        BUGS.append(pytest.param(target, function, match, id=function.__name__))
        return function

    return mark


BUGS = []


@bug("handshake", "bytes of input are kept|an option of")
def an_option_of_any_length_is_kept(patch):
    patch.setattr(handshake, "MAX_OPTION", 1 << 40)


@bug("handshake", "were agreed on")
def a_failed_choice_of_contexts_leaves_the_earlier_one(patch):
    def error(self, reply, message):
        chosen = self._context_export
        real(self, reply, message)
        self._context_export = chosen

    real = handshake.Handshake._error
    patch.setattr(handshake.Handshake, "_error", error)


@bug("handshake", "was agreed on|were agreed on|contexts without structured replies")
def what_was_negotiated_before_tls_stays(patch):
    def starttls(self, data):
        before = self.style, self._context_export
        event = real(self, data)
        self.style, self._context_export = before
        return event

    real = handshake.Handshake._on_starttls
    patch.setattr(handshake.Handshake, "_on_starttls", starttls)


@bug("handshake", "before TLS")
def tls_is_not_required(patch):
    patch.setattr(handshake.Handshake, "_check_secure", lambda self: None)


@bug("handshake", "a name|UnicodeDecodeError|codec")
def names_are_not_checked(patch):
    patch.setattr(options, "decode_string", lambda data, what: data.decode())
    patch.setattr(handshake, "decode_string", lambda data, what: data.decode())


@bug("handshake", "instead of|cut at")
def the_last_byte_of_a_piece_is_lost(patch):
    def receive(self, data):
        self._input += data[: len(data) - (len(data) == 9)]

    patch.setattr(handshake.Handshake, "receive", receive)


@bug("transmission", "no reply|to nothing|closed the connection|instead of")
def the_payload_of_a_refused_write_is_not_read_past(patch):
    patch.setattr(transmission, "payload_length", lambda request, style: 0)


@bug("transmission", "FUA")
def fua_does_not_flush(patch):
    async def flush(self, request):
        return self.succeeded(request)

    patch.setattr(Operations, "flush", flush)


@bug("transmission", "to nothing")
def a_reply_is_sent_twice(patch):
    real = Operations.succeeded
    patch.setattr(Operations, "succeeded", lambda self, request: real(self, request) * 2)


@bug("transmission", "tasks")
def tasks_are_not_bounded(patch):
    patch.setattr(transmission, "MAX_REQUESTS", 1 << 20)


@bug("transmission", "other data|differs|error 5|the memory of a write")
def a_deferred_write_keeps_a_view_of_the_receive_buffer(patch):
    def keep(what):
        return what if isinstance(what, memoryview) else bytes(what)

    patch.setattr(transmission, "bytes", keep, raising=False)


@bug("transmission", "zero division|no reply")
def an_exception_reaches_the_event_loop(patch):
    def block_status(self, request, payload):
        raise ZeroDivisionError("zero division")

    patch.setattr(Operations, "block_status", block_status)


@bug("transmission", "a request failed|internal error")
def a_fault_of_ours_is_logged_and_answered(patch):
    async def read(self, request):
        raise ZeroDivisionError

    patch.setattr(Operations, "_read", read)


@bug("transmission", "no reply|does not end|takes nothing")
def a_stalled_connection_does_not_go_on(patch):
    patch.setattr(transmission.Transmission, "_plan_wake", lambda self: None)


@bug("transmission", "status")
def a_status_goes_beyond_the_request(patch):
    def block_status(self, request, payload):
        return real(self, replace(request, length=request.length + 4096), payload)

    real = Operations.block_status
    patch.setattr(Operations, "block_status", block_status)


@bug("transmission", "other data|chunks")
def holes_are_one_sector_too_long(patch):
    def read_runs(self, flags, offset, length):
        runs = real(self, flags, offset, length)
        if len(runs) > 1 and not runs[0][1] and runs[1][1]:
            (first, _), (second, _) = runs[:2]
            if second > 512:
                runs[:2] = [(first + 512, False), (second - 512, True)]
        return runs

    real = Operations._read_runs
    patch.setattr(Operations, "_read_runs", read_runs)


@bug("channel", "ended 0 times|complaints|ValueError|TypeError|LookupError|Error")
def what_is_no_message_is_not_caught(patch):
    real = channel.Channel._take_frames

    def take(self):
        try:
            real(self)
        except ValueError as error:
            raise ZeroDivisionError from error

    patch.setattr(channel.Channel, "_take_frames", take)


@pytest.mark.parametrize(("target", "bug", "match"), BUGS)
def test_bug(target, bug, match, monkeypatch):
    bug(monkeypatch)
    run, make, _ = TARGETS[target]
    for seed in range(MOST):
        try:
            run(make(random.Random(seed)))
        except Exception as error:
            assert re.search(match, f"{error!r}"), f"{seed}: {error!r}"
            return
    pytest.fail(f"it was not found with {MOST} inputs")
