"""What opens an encrypted repository: a passphrase, or the content of a key file.

A passphrase is text, in Unicode's normal form C, so that it is the same whichever keyboard or file
it came from. A key file holds 256 random bits as 64 hexadecimal digits: ``openssl rand -hex 32``
makes one, too. A passphrase is stretched with scrypt; a key file needs no stretching, and so must
not be anything that somebody could guess.

Nothing here shows a secret: not in ``repr``, and not in an error.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

from backends.errors import InvalidError

PASSPHRASE = "passphrase"  # noqa: S105
KEY_FILE = "key file"
MAX_PASSPHRASE = 1024  # bytes of UTF-8

_KEY_FILE = re.compile(rb"[0-9A-Fa-f]{64}\Z")


@dataclass(frozen=True)
class Secret:
    """One secret. ``kind`` is PASSPHRASE or KEY_FILE."""

    kind: str
    value: bytes = field(repr=False)


#: A secret that must open the repository, or who is to be asked for one when it is encrypted.
Key = Secret | Callable[[], Secret] | None


def passphrase(text: str, where: str) -> Secret:
    """The secret that ``text`` is; InvalidError names ``where`` it came from."""
    if not text:
        raise InvalidError(f"{where} is empty: a passphrase is needed")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise InvalidError(
            f"{where} has more than one line or control characters: a passphrase is one line"
        )
    try:
        value = unicodedata.normalize("NFC", text).encode()
    except UnicodeEncodeError:
        raise InvalidError(f"{where} is not UTF-8: a passphrase is text") from None
    if len(value) > MAX_PASSPHRASE:
        raise InvalidError(f"{where} has more than {MAX_PASSPHRASE} bytes: use a shorter one")
    return Secret(PASSPHRASE, value)


def passphrase_line(content: bytes, where: str) -> Secret:
    """The passphrase that a file holds or a command prints: one line, its end left out."""
    line = content.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return passphrase(line.decode(), where)
    except UnicodeDecodeError:
        raise InvalidError(f"{where} is not UTF-8: a passphrase is text") from None


def key_file(content: bytes, where: str) -> Secret:
    """The secret that a key file's ``content`` is; InvalidError names ``where``."""
    if not _KEY_FILE.match(content.strip()):
        raise InvalidError(f"{where} is no key file: it must hold 64 hexadecimal digits alone")
    return Secret(KEY_FILE, bytes.fromhex(content.strip().decode()))


def new_key_file() -> bytes:
    """The content of a key file that nobody has."""
    return secrets.token_hex(32).encode() + b"\n"
