"""nbd-conformance finds what is wrong: servers that break a rule each, and one that breaks none."""

import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.conformance.catalogue import CHECKS
from scripts.conformance.runner import Runner
from scripts.conformance.target import Target
from scripts.conformance.tls import Tls
from scripts.conformance.uri import parse_uri
from scripts.conformance.verdicts import Level, Result, Unreachable, Verdict
from tests.scripts.scripted_server import (
    ACK,
    BLOCK,
    EINVAL,
    ENOSPC,
    INFO,
    READ,
    SIZE,
    UNSUP,
    WRITE,
    WRITE_ZEROES,
    Ended,
    Server,
    Session,
    serving,
)


@contextmanager
def started(session: type[Session] = Session) -> Iterator[Server]:
    """A server in a directory whose path is short enough for a Unix socket."""
    with (
        tempfile.TemporaryDirectory(prefix="nbd-conformance-test-") as directory,
        serving(Path(directory), session) as server,
    ):
        yield server


def run_checks(
    server: Server, *patterns: str, write: bool = True, timeout: float = 0.3
) -> list[Result]:
    """Run the checks whose names hold one of the patterns."""
    target = Target(parse_uri(server.uri), Tls(), timeout)
    target.explore()
    checks = [
        check
        for check in CHECKS
        if not patterns or any(pattern in check.name for pattern in patterns)
    ]
    assert checks, patterns
    return list(Runner(target, write=write, patience=0.5).run(checks))


def failed(results: list[Result]) -> dict[str, Level]:
    errors = [result for result in results if result.verdict is Verdict.ERROR]
    assert not errors, errors
    return {result.check: result.level for result in results if result.verdict is Verdict.FAIL}


def test_a_correct_server_has_no_findings() -> None:
    with started() as server:
        results = run_checks(server, timeout=3)
    assert failed(results) == {}
    passed = [result for result in results if result.verdict is Verdict.PASS]
    assert len(passed) > 120


# Handshake


class KeepsUnknownFlags(Session):
    def greet(self) -> None:
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        (self.client_flags,) = struct.unpack(">I", self.receive(4))


class MoreHandshakeFlags(Session):
    def greet(self) -> None:
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 0x13))
        self.receive(4)


class NoAnswerToAbort(Session):
    def on_abort(self) -> None:
        raise Ended


class HangsOnMalformedData(Session):
    def on_malformed(self, option: int) -> None:
        self.receive(4)


class AcceptsMalformedData(Session):
    def on_malformed(self, option: int) -> None:
        self.reply(option, ACK)


class ClosesOnUnknownOption(Session):
    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        if kind == UNSUP:
            raise Ended
        super().reply(option, kind, data)


class RepliesToAnotherOption(Session):
    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        super().reply(4 if option == 3 else option, kind, data)


class PadsAfterGo(Session):
    def on_info(self, option: int, data: bytes) -> bool:
        entered = super().on_info(option, data)
        if entered and not self.client_flags & 2:
            self.send(bytes(124))
        return entered


class SaysSizeZero(Session):
    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        if option == 6 and kind == INFO and data[:2] == b"\0\0":
            data = struct.pack(">HQH", 0, 0, self.flags())
        super().reply(option, kind, data)


class OddBlockSizes(Session):
    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        if kind == INFO and data[:2] == b"\0\3":
            data = struct.pack(">HIII", 3, 3, 768, 512)
        super().reply(option, kind, data)


class FlagsWithoutHasFlags(Session):
    def flags(self) -> int:
        return super().flags() & ~1


class DfWithoutStructuredReplies(Session):
    def flags(self) -> int:
        return super().flags() | 1 << 7


class FastZeroWithoutWriteZeroes(Session):
    def flags(self) -> int:
        return super().flags() & ~(1 << 6) | 1 << 11


class KeepsContexts(Session):
    def on_context(self, option: int, data: bytes) -> None:
        before = self.context
        super().on_context(option, data)
        self.context = before or self.context


class WildcardSelects(Session):
    def on_context(self, option: int, data: bytes) -> None:
        super().on_context(option, data.replace(b"\0\0\0\5base:", b"\0\0\0\x0fbase:allocation"))


class EndlessList(Session):
    def on_option(self, option: int, data: bytes) -> bool:
        while option == 3:
            self.reply(3, 2, struct.pack(">I", 4) + b"disk" + b"d" * 4000)
        return super().on_option(option, data)


# Transmission


class ForgetsCookies(Session):
    def finish(self, cookie: int) -> None:
        super().finish(cookie & 0xFFFFFFFF)

    def on_read(self, cookie: int, flags: int, offset: int, length: int) -> None:
        super().on_read(cookie & 0xFFFFFFFF, flags, offset, length)


class SimpleErrorsOfReads(Session):
    def fail(self, cookie: int, command: int, error: int) -> None:
        self.send(struct.pack(">IIQ", 0x67446698, error, cookie))


class PayloadBehindAnError(Session):
    def fail(self, cookie: int, command: int, error: int) -> None:
        super().fail(cookie, command, error)
        if command == READ and not self.structured:
            self.send(bytes(512))


class LongErrorText(Session):
    def fail(self, cookie: int, command: int, error: int) -> None:
        if self.structured:
            self.chunk(cookie, 1 << 15 | 1, struct.pack(">IH", error, 9) + b"no")
        else:
            super().fail(cookie, command, error)


class UnknownErrorValue(Session):
    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        return 200 if super().judge(flags, command, offset, length) else 0


class OverlappingChunks(Session):
    def read_in_chunks(self, cookie: int, flags: int, offset: int, data: bytes) -> None:
        self.chunk(cookie, 1, struct.pack(">Q", offset) + data, done=False)
        self.chunk(cookie, 1, struct.pack(">Q", offset) + data)


class MissingChunk(Session):
    def read_in_chunks(self, cookie: int, flags: int, offset: int, data: bytes) -> None:
        self.chunk(cookie, 1, struct.pack(">Q", offset) + data[:-512])


class ContentOutside(Session):
    def read_in_chunks(self, cookie: int, flags: int, offset: int, data: bytes) -> None:
        self.chunk(cookie, 1, struct.pack(">Q", offset + 512) + data)


class NeverDone(Session):
    def chunk(self, cookie: int, kind: int, payload: bytes = b"", done: bool = True) -> None:
        super().chunk(cookie, kind, payload, False)


class FragmentsInSpiteOfDf(Session):
    def read_in_chunks(self, cookie: int, flags: int, offset: int, data: bytes) -> None:
        super().read_in_chunks(cookie, 0, offset, data)


class WrongErrorBeyondTheEnd(Session):
    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        error = super().judge(flags, command, offset, length)
        return EINVAL if error == ENOSPC else error


class CutsOffsetsTo63Bits(Session):
    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        return super().judge(flags, command, offset & (1 << 63) - 1, length)


class TakesAllFlags(Session):
    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        return super().judge(0, command, offset, length)


class RefusesFua(Session):
    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        return EINVAL if flags & 1 else super().judge(flags, command, offset, length)


class TakesRefusedPayloadForRequests(Session):
    def serve_request(self) -> None:
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        error = self.judge(flags, command, offset, length)
        if command == WRITE and error:
            self.fail(cookie, command, error)
            (magic,) = struct.unpack(">I", self.receive(4))
            while True:  # out of step: it goes on with whatever comes
                self.fail(cookie, command, EINVAL)
                self.receive(28)
        if magic != 0x25609513 or command == 2:
            raise Ended
        if command == READ:
            self.on_read(cookie, flags, offset, length)
        else:
            self.change(command, offset, length, self.receive(length) if command == WRITE else b"")
            self.finish(cookie)


class AnswersWrongMagic(Session):
    def receive(self, length: int) -> bytes:
        data = super().receive(length)
        return struct.pack(">I", 0x25609513) + data[4:] if length == 28 else data


class LosesWrites(Session):
    def change(self, command: int, offset: int, length: int, payload: bytes) -> None:
        if command != WRITE:
            super().change(command, offset, length, payload)


class ZeroesTooMuch(Session):
    def change(self, command: int, offset: int, length: int, payload: bytes) -> None:
        if command == WRITE_ZEROES:
            length += 512
        super().change(command, offset, length, payload)


class OwnCopyForEachConnection(Session):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.server = Server.__new__(Server)
        self.server.content = bytearray(SIZE)


class SaysZeroForData(Session):
    def runs(self, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        return [(length, 3)]


class SeveralForReqOne(Session):
    def runs(self, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        runs = super().runs(offset, length, one)
        return [(512, 0), (512, 1)] if one else runs


class BeyondTheRequest(Session):
    def runs(self, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        return [(length, 0), (BLOCK, 3)]


class EmptyDescriptor(Session):
    def runs(self, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        return [(0, 0)]


class LosesRepliesOnDisconnect(Session):
    """Looks ahead, and ends when a disconnect is in sight."""

    def finish(self, cookie: int) -> None:
        self.sock.settimeout(0.05)
        try:
            ahead = self.sock.recv(1 << 22, 2)  # MSG_PEEK
        except TimeoutError:
            ahead = b""
        self.sock.settimeout(None)
        if ahead[-28:].startswith(b"\x25\x60\x95\x13\0\0\0\2"):
            raise Ended
        super().finish(cookie)


class StaysAfterDisconnect(Session):
    def serve_request(self) -> None:
        header = self.receive(28)
        if header[6:8] == b"\0\2":
            self.receive(1)
        flags, command, cookie, offset, length = struct.unpack(">HHQQI", header[4:])
        error = self.judge(flags, command, offset, length)
        if error:
            self.fail(cookie, command, error)
        else:
            self.on_read(cookie, flags, offset, length)


class CrashesOnUnknownFlags(Session):
    """Everybody's connection is gone then."""

    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        if flags & 1 << 15:
            self.server.disconnect_all()
            raise Ended
        return super().judge(flags, command, offset, length)


@pytest.mark.parametrize(
    ("session", "check", "level"),
    [
        (KeepsUnknownFlags, "client-flags/unknown", "MUST"),
        (MoreHandshakeFlags, "handshake-flags/no-others", "MUST"),
        (NoAnswerToAbort, "NBD_OPT_ABORT/acknowledged", "MUST"),
        (HangsOnMalformedData, "NBD_OPT_INFO-and-NBD_OPT_GO/malformed-info", "MUST"),
        (AcceptsMalformedData, "NBD_OPT_INFO-and-NBD_OPT_GO/malformed-info-is-invalid", "RULE"),
        (ClosesOnUnknownOption, "baseline/unknown-option", "MUST"),
        (RepliesToAnotherOption, "baseline/list-exports", "MUST"),
        (PadsAfterGo, "NBD_OPT_INFO-and-NBD_OPT_GO/no-padding", "MUST"),
        (SaysSizeZero, "NBD_OPT_INFO-and-NBD_OPT_GO/info-then-go", "MUST"),
        (OddBlockSizes, "size-constraints/minimum-block", "MUST"),
        (OddBlockSizes, "size-constraints/preferred-block", "MUST"),
        (OddBlockSizes, "size-constraints/maximum-payload", "MUST"),
        (FlagsWithoutHasFlags, "transmission-flags/has-flags", "MUST"),
        (DfWithoutStructuredReplies, "transmission-flags/df-without-structured-replies", "MUST"),
        (FastZeroWithoutWriteZeroes, "transmission-flags/fast-zero-without-write-zeroes", "MUST"),
        (KeepsContexts, "NBD_OPT_SET_META_CONTEXT/cleared-by-a-failure", "MUST"),
        (KeepsContexts, "NBD_OPT_SET_META_CONTEXT/replaced-by-a-later-one", "MUST"),
        (WildcardSelects, "the-base-metadata-namespace/wildcard-in-set", "MUST"),
        (ForgetsCookies, "transmission/cookies", "MUST"),
        (SimpleErrorsOfReads, "structured-reply-chunk-message/error-of-a-read", "MUST"),
        (SimpleErrorsOfReads, "structured-reply-chunk-message/errors-are-structured", "SHOULD"),
        (PayloadBehindAnError, "NBD_CMD_READ/no-payload-with-an-error", "MUST"),
        (LongErrorText, "structured-reply-chunk-message/errors-have-a-text", "MUST"),
        (UnknownErrorValue, "error-values/unknown-command", "RULE"),
        (OverlappingChunks, "NBD_CMD_READ/chunks-cover-the-request", "MUST"),
        (MissingChunk, "NBD_CMD_READ/chunks-cover-the-request", "MUST"),
        (ContentOutside, "NBD_CMD_READ/chunks-cover-the-request", "MUST"),
        (NeverDone, "NBD_CMD_READ/chunks-cover-the-request", "MUST"),
        (FragmentsInSpiteOfDf, "NBD_CMD_READ/df-of-64-kib", "MUST"),
        (WrongErrorBeyondTheEnd, "error-values/write-beyond", "SHOULD"),
        (CutsOffsetsTo63Bits, "error-values/read-overflow", "SHOULD"),
        (TakesAllFlags, "error-values/unknown-flag", "SHOULD"),
        (TakesAllFlags, "error-values/flag-of-another-command", "SHOULD"),
        (TakesAllFlags, "NBD_CMD_CACHE/unknown-flags", "MUST"),
        (RefusesFua, "command-flags/fua", "MUST"),
        (TakesRefusedPayloadForRequests, "NBD_CMD_WRITE/payload-is-read-past", "MUST"),
        (AnswersWrongMagic, "request-message/wrong-magic", "RULE"),
        (LosesWrites, "NBD_CMD_WRITE/reads-back", "MUST"),
        (ZeroesTooMuch, "NBD_CMD_WRITE_ZEROES/reads-back-as-zero", "MUST"),
        (OwnCopyForEachConnection, "NBD_FLAG_CAN_MULTI_CONN/visible-to-others", "MUST"),
        (SaysZeroForData, "base-allocation-metadata-context/data-is-data", "RULE"),
        (SeveralForReqOne, "NBD_CMD_BLOCK_STATUS/req-one", "MUST"),
        (
            BeyondTheRequest,
            "NBD_REPLY_TYPE_BLOCK_STATUS/all-but-the-last-within-the-request",
            "MUST",
        ),
        (EmptyDescriptor, "NBD_CMD_BLOCK_STATUS/progress-to-the-end", "MUST"),
        (LosesRepliesOnDisconnect, "NBD_CMD_DISC/outstanding-writes-are-answered", "MUST"),
        (StaysAfterDisconnect, "NBD_CMD_DISC/closes", "MUST"),
        (CrashesOnUnknownFlags, "error-values/unknown-flag", "MUST"),
    ],
)
def test_a_broken_rule_is_found(session: type[Session], check: str, level: str) -> None:
    with started(session) as server:
        found = failed(run_checks(server, check))
    assert found.get(check) is Level[level], found


def test_what_a_finding_says() -> None:
    with started(WrongErrorBeyondTheEnd) as server:
        (result,) = [
            result
            for result in run_checks(server, "error-values/write-beyond")
            if result.verdict is Verdict.FAIL
        ]
    assert f"NBD_CMD_WRITE offset {SIZE}" in result.sent
    assert result.expected == "NBD_ENOSPC"
    assert result.came == "NBD_EINVAL"


def test_a_crash_is_a_finding_of_the_check_that_led_to_it() -> None:
    with started(CrashesOnUnknownFlags) as server:
        results = run_checks(server, "error-values/unknown-flag", "NBD_CMD_READ/lengths")
    (crash,) = [result for result in results if result.verdict is Verdict.FAIL]
    assert "another client's connection" in crash.expected
    assert "MUST NOT" in crash.violated


# Whatever a server does, the program goes on to its end


class SaysNothing(Session):
    def greet(self) -> None:
        self.receive(1)
        self.receive(1 << 30)


class Garbage(Session):
    def greet(self) -> None:
        while True:
            self.send(os.urandom(4096))


class GarbageAfterTheGreeting(Session):
    def greet(self) -> None:
        super().greet()
        while True:
            self.send(os.urandom(4096))


class GarbageInTransmission(Session):
    def serve_request(self) -> None:
        self.receive(28)
        self.send(os.urandom(1000))


class OneByteAtATime(Session):
    def serve_request(self) -> None:
        while True:
            self.send(b"\x67")
            time.sleep(0.05)


class ClosesAtOnce(Session):
    def greet(self) -> None:
        raise Ended


class ClosesInTransmission(Session):
    def serve_request(self) -> None:
        raise Ended


class HugeReplies(Session):
    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", 0x3E889045565A9, option, kind, 0xFFFFFFFF))


class HugeChunks(Session):
    def chunk(self, cookie: int, kind: int, payload: bytes = b"", done: bool = True) -> None:
        self.send(struct.pack(">IHHQI", 0x668E33EF, 1, kind, cookie, 0xFFFFFFFF))


class Oldstyle(Session):
    def greet(self) -> None:
        self.send(struct.pack(">8sQQI124x", b"NBDMAGIC", 0x420281861253, SIZE, 1))
        self.receive(1 << 20)


class NotFixed(Session):
    """Knows EXPORT_NAME and nothing else."""

    def greet(self) -> None:
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 0))
        (self.client_flags,) = struct.unpack(">I", self.receive(4))
        if self.client_flags:
            raise Ended

    def on_option(self, option: int, data: bytes) -> bool:
        if option != 1:
            raise Ended
        return super().on_option(option, data)


@pytest.mark.parametrize(
    "session",
    [
        SaysNothing, Garbage, GarbageAfterTheGreeting, GarbageInTransmission, OneByteAtATime,
        ClosesAtOnce, ClosesInTransmission, HugeReplies, HugeChunks, Oldstyle,
    ],
)  # fmt: skip
def test_a_hopeless_server_ends_checks_and_not_the_program(session: type[Session]) -> None:
    patterns = (
        "greeting", "baseline", "NBD_OPT_LIST/", "transmission/pipelined", "NBD_CMD_READ/lengths",
        "base-allocation", "outstanding-reads", "NBD_CMD_READ/chunks-cover",
    )  # fmt: skip
    with started(session) as server:
        results = run_checks(server, *patterns, timeout=0.1)
    assert any(result.verdict in (Verdict.FAIL, Verdict.ERROR) for result in results)
    mistakes = [result for result in results if "a mistake in nbd-conformance" in result.reason]
    assert not mistakes, mistakes


def test_a_server_that_sends_for_ever_ends_with_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneByteChunks(Session):
        def read_in_chunks(self, cookie: int, flags: int, offset: int, data: bytes) -> None:
            if len(data) < 1 << 20:
                super().read_in_chunks(cookie, flags, offset, data)
                return
            for number in range(len(data)):
                self.chunk(cookie, 1, struct.pack(">Q", offset + number) + b"1", done=False)

    monkeypatch.setattr("scripts.conformance.target.CHECK_SECONDS", 0.5)
    with started(OneByteChunks) as server:
        results = run_checks(server, "chunks-cover-the-request", timeout=3)
    (result,) = results
    assert result.verdict is Verdict.FAIL
    assert "no end" in result.came
    assert result.seconds < 10


def test_the_witness_outlives_what_a_check_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.conformance.target.CHECK_SECONDS", 0.2)

    class Slow(Session):
        def judge(self, flags: int, command: int, offset: int, length: int) -> int:
            if length == 0:
                time.sleep(0.15)
            return super().judge(flags, command, offset, length)

    with started(Slow) as server:
        results = run_checks(server, "length-zero", "NBD_OPT_ABORT/", timeout=3)
    assert all(result.sent == "" or "witness" not in result.violated for result in results)
    assert not [result for result in results if "another client" in result.expected]
    assert [result.verdict for result in results if "ABORT" in result.check] == [Verdict.PASS] * 3


def test_a_list_without_end_ends() -> None:
    with started(EndlessList) as server:
        found = failed(run_checks(server, "baseline/list-exports", timeout=3))
    assert found == {"baseline/list-exports": Level.MUST}


def test_an_oldstyle_server_is_called_one() -> None:
    with started(Oldstyle) as server:
        results = run_checks(server)
    assert failed(results) == {"newstyle-negotiation/greeting": Level.MUST}
    (greeting,) = [result for result in results if result.verdict is Verdict.FAIL]
    assert "oldstyle" in greeting.came
    rest = [result for result in results if result is not greeting]
    assert all(result.verdict is Verdict.SKIP for result in rest)


def test_a_server_without_fixed_newstyle_is_checked_as_far_as_it_goes() -> None:
    with started(NotFixed) as server:
        results = run_checks(server, timeout=3)
    verdicts = {result.check: result.verdict for result in results}
    assert failed(results) == {"handshake-flags/fixed-newstyle": Level.MUST}
    assert verdicts["NBD_CMD_WRITE/reads-back"] is Verdict.PASS
    assert verdicts["NBD_OPT_LIST/with-data"] is Verdict.SKIP


def test_without_write_nothing_is_written() -> None:
    class WatchesWrites(Session):
        def serve_request(self) -> None:
            super().serve_request()

        def judge(self, flags: int, command: int, offset: int, length: int) -> int:
            if command in (1, 4, 6):
                wrote.append(command)
            return super().judge(flags, command, offset, length)

    wrote: list[int] = []
    with started(WatchesWrites) as server:
        content = bytes(os.urandom(1 << 16)) * (SIZE >> 16)
        server.content[:] = content
        results = run_checks(server, write=False, timeout=3)
        assert failed(results) == {}
        assert server.content == content
    assert wrote == []
    for result in results:
        check = next(check for check in CHECKS if check.name == result.check)
        if check.writes:
            assert result.verdict is Verdict.SKIP


def test_a_server_that_is_gone() -> None:
    with started() as server:
        target = Target(parse_uri(server.uri), Tls(), 0.3)
        target.explore()
        runner = Runner(target, write=True, patience=0.2)
        results = []
        for result in runner.run(CHECKS[:6]):
            results.append(result)
            if len(results) == 2:
                server.stop()
    assert [result.verdict for result in results[3:]] == [Verdict.ERROR] * 3
    assert runner.server_is_gone
    with pytest.raises(Unreachable):
        Target(parse_uri(server.uri), Tls(), 0.3).explore()
