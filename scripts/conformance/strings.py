"""Strings of the protocol, as the specification's section "Conventions" has them."""

from __future__ import annotations

from .constants import MAX_STRING
from .verdicts import Level, Violation

_SENTENCE = (
    "Conventions: a string is UTF-8, MUST NOT contain NUL characters, and MUST be no longer than "
    "4096 bytes"
)


def decode(data: bytes, what: str) -> str:
    """Decode a string that the server sent; ``what`` names it in the Violation."""
    if len(data) > MAX_STRING:
        raise Violation(
            f"a {what} of at most {MAX_STRING} bytes", f"{len(data)} bytes", Level.MUST, _SENTENCE
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Violation(f"a {what} in UTF-8", shown(data), Level.MUST, _SENTENCE) from None
    if "\0" in text:
        raise Violation(f"a {what} without NUL", shown(data), Level.MUST, _SENTENCE)
    return text


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or change its colours."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )


def shown(data: bytes | bytearray) -> str:
    """Bytes fit for one line of a message."""
    return repr(bytes(data[:60])) + (f"... ({len(data)} bytes)" if len(data) > 60 else "")
