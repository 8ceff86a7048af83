"""validate_request against the specification's tables."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    MAX_PAYLOAD,
    ErrorCode,
    ReplyStyle,
)
from nbdserve.protocol.replies import error_code
from nbdserve.protocol.requests import (
    Refusal,
    Request,
    Terms,
    parse_status_payload,
    payload_length,
    validate_request,
)

SIZE = 1 << 30
RANGED = [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS]
EXTENDED = ReplyStyle.EXTENDED


def judge(command, offset=0, length=0, flags=0, **terms):
    terms = {
        "size": SIZE,
        "read_only": False,
        "style": ReplyStyle.STRUCTURED,
        "contexts": frozenset({1}),
        **terms,
    }
    refusal = validate_request(Request(flags, command, 1, offset, length), Terms(**terms))
    if refusal is None:
        return None
    assert refusal.message.isprintable()
    return refusal.error


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 4096), (SIZE - 1, 1), (513, 7)])
def test_ranges_within(command, offset, length):
    assert judge(command, offset, length) is None


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 1), (2**64 - 1, 2**32 - 1)]
)
def test_ranges_beyond_the_end(command, offset, length):
    growing = command in (CMD_WRITE, CMD_WRITE_ZEROES)
    assert judge(command, offset, length) == (ErrorCode.ENOSPC if growing else ErrorCode.EINVAL)


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_read_only(command):
    assert judge(command, 0, 512, read_only=True) == ErrorCode.EPERM


@pytest.mark.parametrize("command", [CMD_READ, CMD_CACHE, CMD_BLOCK_STATUS])
def test_read_only_allows_reading(command):
    assert judge(command, 0, 512, read_only=True) is None
    assert judge(CMD_FLUSH, read_only=True) is None


@pytest.mark.parametrize("command", [8, 9, 100, 0xFFFF])
def test_unknown_commands(command):
    assert judge(command) == ErrorCode.EINVAL


@pytest.mark.parametrize("command", [*RANGED, CMD_FLUSH])
@pytest.mark.parametrize(
    "flag",
    [
        CMD_FLAG_NO_HOLE,
        CMD_FLAG_DF,
        CMD_FLAG_REQ_ONE,
        CMD_FLAG_FAST_ZERO,
        CMD_FLAG_PAYLOAD_LEN,
        1 << 6,
        1 << 15,
    ],
)
def test_flags(command, flag):
    taken = {
        (CMD_READ, CMD_FLAG_DF),
        (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE),
        (CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO),
        (CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE),
    }
    length = 0 if command == CMD_FLUSH else 512
    expected = None if (command, flag) in taken else ErrorCode.EINVAL
    assert judge(command, 0, length, flag) == expected
    assert judge(command, 0, length, CMD_FLAG_FUA) is None


def test_df_needs_structured_replies():
    assert judge(CMD_READ, 0, 512, CMD_FLAG_DF, style=ReplyStyle.SIMPLE) == ErrorCode.EINVAL


def test_allocated_zeroes_are_not_fast():
    flags = CMD_FLAG_FAST_ZERO | CMD_FLAG_NO_HOLE
    assert judge(CMD_WRITE_ZEROES, 0, 512, flags) == ErrorCode.ENOTSUP
    assert judge(CMD_WRITE_ZEROES, SIZE, 512, flags) == ErrorCode.ENOSPC
    assert judge(CMD_WRITE_ZEROES, 0, 512, CMD_FLAG_NO_HOLE) is None


@pytest.mark.parametrize("flags", [CMD_FLAG_PAYLOAD_LEN, 0, CMD_FLAG_FUA])
def test_extended_write_has_a_payload_whatever_it_says(flags):
    assert judge(CMD_WRITE, 0, 512, flags, style=EXTENDED) is None


@pytest.mark.parametrize("command", [CMD_READ, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_FLUSH])
def test_other_commands_take_no_payload(command):
    assert judge(command, 0, 512, CMD_FLAG_PAYLOAD_LEN, style=EXTENDED) == ErrorCode.EINVAL


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS])
def test_extended_lengths(command):
    size = 1 << 60
    assert judge(command, 4096, size - 4096, style=EXTENDED, size=size) is None
    beyond = ErrorCode.ENOSPC if command == CMD_WRITE_ZEROES else ErrorCode.EINVAL
    assert judge(command, 4097, size - 4096, style=EXTENDED, size=size) == beyond
    assert judge(command, 2**64 - 1, 2**64 - 1, style=EXTENDED, size=size) == beyond


@pytest.mark.parametrize(
    ("style", "flags", "command", "expected"),
    [
        (ReplyStyle.SIMPLE, 0, CMD_WRITE, 77),
        (ReplyStyle.STRUCTURED, CMD_FLAG_FUA, CMD_WRITE, 77),
        (ReplyStyle.STRUCTURED, CMD_FLAG_PAYLOAD_LEN, CMD_READ, 0),
        (ReplyStyle.EXTENDED, 0, CMD_WRITE, 77),
        (ReplyStyle.EXTENDED, 0, CMD_WRITE_ZEROES, 0),
        (ReplyStyle.EXTENDED, CMD_FLAG_PAYLOAD_LEN, CMD_WRITE, 77),
        (ReplyStyle.EXTENDED, CMD_FLAG_PAYLOAD_LEN, CMD_READ, 77),
        (ReplyStyle.EXTENDED, CMD_FLAG_PAYLOAD_LEN, 999, 77),
    ],
)
def test_payload_length(style, flags, command, expected):
    assert payload_length(Request(flags, command, 1, 0, 77), style) == expected


@pytest.mark.parametrize(
    ("length", "contexts", "taken"),
    [(12, 1, True), (16, 2, True), (8, 1, False), (16, 1, False), (11, 2, False), (0, 2, False)],
)
def test_status_payload_sizes(length, contexts, taken):
    error = judge(
        CMD_BLOCK_STATUS,
        SIZE,
        length,
        CMD_FLAG_PAYLOAD_LEN,
        style=EXTENDED,
        contexts=frozenset(range(contexts)),
    )
    assert error == (None if taken else ErrorCode.EINVAL)


def test_status_payload_needs_a_context():
    flags = CMD_FLAG_PAYLOAD_LEN
    error = judge(CMD_BLOCK_STATUS, 0, 12, flags, style=EXTENDED, contexts=frozenset())
    assert error == ErrorCode.EINVAL


@pytest.mark.parametrize(
    ("wanted", "taken"), [([1], True), ([3, 1], True), ([2], False), ([1, 1], False)]
)
def test_status_payload(wanted, taken):
    flags = CMD_FLAG_PAYLOAD_LEN | CMD_FLAG_REQ_ONE
    payload = struct.pack(f">Q{len(wanted)}I", 1 << 40, *wanted)
    request = Request(flags, CMD_BLOCK_STATUS, 7, 4096, len(payload))
    parsed = parse_status_payload(request, payload, frozenset({1, 3}))
    if taken:
        plain = Request(CMD_FLAG_REQ_ONE, CMD_BLOCK_STATUS, 7, 4096, 1 << 40)
        assert parsed == (plain, frozenset(wanted))
    else:
        assert isinstance(parsed, Refusal)
        assert parsed.error == ErrorCode.EINVAL


def test_flush_takes_no_range():
    assert judge(CMD_FLUSH) is None
    assert judge(CMD_FLUSH, 1, 0) == ErrorCode.EINVAL
    assert judge(CMD_FLUSH, 0, 1) == ErrorCode.EINVAL


def test_largest_payload():
    assert judge(CMD_READ, 0, MAX_PAYLOAD) is None
    assert judge(CMD_WRITE, 0, MAX_PAYLOAD) is None
    assert judge(CMD_READ, 0, MAX_PAYLOAD + 1) == ErrorCode.EOVERFLOW
    assert judge(CMD_READ, 0, MAX_PAYLOAD + 1, style=ReplyStyle.SIMPLE) == ErrorCode.EINVAL
    assert judge(CMD_WRITE, 0, MAX_PAYLOAD + 1) == ErrorCode.EINVAL
    for command in (CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS):
        assert judge(command, 0, SIZE) is None


def test_block_status_needs_a_context_and_a_length():
    assert judge(CMD_BLOCK_STATUS, 0, 512, contexts=frozenset()) == ErrorCode.EINVAL
    assert judge(CMD_BLOCK_STATUS, 0, 0) == ErrorCode.EINVAL


@given(st.integers(0, 0xFFFF), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_disc_is_never_refused(flags, offset, length):
    assert judge(CMD_DISC, offset, length, flags) is None


@given(
    st.integers(0, 10),
    st.integers(0, 2**64 - 1) | st.integers(0, SIZE + 10),
    st.integers(0, 2**32 - 1),
    st.integers(0, 0xFFFF) | st.integers(0, 15),
    st.booleans(),
    st.sampled_from(ReplyStyle),
)
def test_nothing_beyond_the_end_or_written_to_a_snapshot_passes(
    command, offset, length, flags, read_only, style
):
    error = judge(command, offset, length, flags, read_only=read_only, style=style)
    if error is None and command in RANGED and not flags & CMD_FLAG_PAYLOAD_LEN:
        assert offset + length <= SIZE
        assert not (read_only and command in (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EROFS, 1),
        (errno.EACCES, 1),
        (errno.EIO, 5),
        (errno.ESHUTDOWN, 108),
        (errno.EBADF, 5),
        (errno.ENOTSUP, 5),
    ],
)
def test_error_codes(number, code):
    assert error_code(OSError(number, "why")) == code


def test_error_without_a_number():
    assert error_code(OSError("why")) == ErrorCode.EIO
