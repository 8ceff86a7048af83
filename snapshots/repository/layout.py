"""Keys of the objects, and the limits of the format.

A push is named by 128 random bits, written as 32 hexadecimal digits. It is also what names the
snapshot that it stores: the same snapshot, deleted and pushed again, is a new one here.
"""

from __future__ import annotations

import re
import secrets

CONFIG_KEY = "config"
INTENTS = "intents/"
SEGMENTS = "segments/"
PAGES = "pages/"
OUTCOMES = "outcomes/"
TOMBSTONES = "tombstones/"
POINTERS = "snapshots/"
PROTECTIONS = "protections/"
ROOTS = "roots/"
PLANS = "plans/"
PROBES = "probes/"
NOTES = "damaged/"
KEYS = "keys/"
REMOVALS = "removals/"

MIN_CHUNK_SIZE = 4 << 10
MAX_CHUNK_SIZE = 4 << 20
DEFAULT_CHUNK_SIZE = 64 << 10
PAGE_ENTRIES = 1024  # chunks that one page describes

SEGMENT_TARGET = 16 << 20  # bytes at which a segment is full
SEGMENT_LIMIT = 64 << 20  # no reader accepts a longer one
PAGES_TARGET = 4 << 20  # bytes at which an object of pages is full
RECORD_LIMIT = 64 << 10  # longest record, other than pages and outcomes
PAGE_LIMIT = 256 << 10  # longest page record
OUTCOME_LIMIT = 320 << 20  # 16 TiB in chunks of 4 KiB is 256 MiB of page references
PLAN_KEYS = 50_000  # most keys in a plan
PLAN_LIMIT = 8 << 20

_PUSH = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9a-f]{8}")
_KEY_ID = re.compile(r"[0-9a-f]{16}")


def new_push_id() -> str:
    return secrets.token_hex(16)


def is_push_id(text: str) -> bool:
    return _PUSH.fullmatch(text) is not None


def intent_key(push: str) -> str:
    return f"{INTENTS}{push}"


def outcome_key(push: str) -> str:
    return f"{OUTCOMES}{push}"


def tombstone_key(push: str) -> str:
    return f"{TOMBSTONES}{push}"


def protection_key(push: str) -> str:
    return f"{PROTECTIONS}{push}"


def segment_key(push: str, number: int) -> str:
    return f"{SEGMENTS}{push}/{number:08x}"


def pages_key(push: str, number: int) -> str:
    return f"{PAGES}{push}/{number:08x}"


def root_key(snapshot: str, generation: int, repack: str) -> str:
    """Of a root that the push ``repack`` put in place of an older one of ``snapshot``, a push."""
    return f"{ROOTS}{snapshot}/{generation:08x}/{repack}"


def parse_root_key(key: str) -> tuple[str, int, str] | None:
    """Return (snapshot's push, generation, repack's push), None when it is no such key."""
    parts = key.removeprefix(ROOTS).split("/")
    if not key.startswith(ROOTS) or len(parts) != 3 or not _NUMBER.fullmatch(parts[1]):
        return None
    if not is_push_id(parts[0]) or not is_push_id(parts[2]):
        return None
    return parts[0], int(parts[1], 16), parts[2]


def plan_key(plan: str) -> str:
    return f"{PLANS}{plan}"


def pointer_key(volume: str, snapshot: str, push: str) -> str:
    return f"{POINTERS}{volume}/{snapshot}/{push}"


def parse_pointer_key(key: str) -> tuple[str, str, str] | None:
    """Return (volume, snapshot, push) of a pointer's key, None when it is no such key."""
    parts = key.removeprefix(POINTERS).split("/")
    if not key.startswith(POINTERS) or len(parts) != 3 or not is_push_id(parts[2]):
        return None
    return parts[0], parts[1], parts[2]


def parse_push_key(prefix: str, key: str) -> str | None:
    """Return the push id of ``prefix`` + push id, None when the key is no such key."""
    push = key.removeprefix(prefix)
    return push if key.startswith(prefix) and is_push_id(push) else None


def parse_data_key(key: str) -> tuple[str, int] | None:
    """Return (push, number) of a segment's or pages object's key, None when it is no such key."""
    parts = key.split("/")
    if len(parts) != 3 or f"{parts[0]}/" not in (SEGMENTS, PAGES):
        return None
    if not is_push_id(parts[1]) or not _NUMBER.fullmatch(parts[2]):
        return None
    return parts[1], int(parts[2], 16)


def is_collectable(key: str) -> bool:
    """Tell whether a collector may ever delete such an object."""
    return (
        parse_data_key(key) is not None
        or parse_root_key(key) is not None
        or parse_pointer_key(key) is not None
        or parse_push_key(INTENTS, key) is not None
        or parse_push_key(OUTCOMES, key) is not None
        or noted_object(key) is not None
    )


def noted_object(key: str) -> str | None:
    """The key of the object that a note is about, None when it is no note's key."""
    noted = key.removeprefix(NOTES)
    return noted if key.startswith(NOTES) and parse_data_key(noted) is not None else None


def parse_numbered_key(key: str) -> int | None:
    """Return the number at the end of a segment's or pages object's key, None without one."""
    number = key.rpartition("/")[2]
    return int(number, 16) if _NUMBER.fullmatch(number) else None


def is_key_id(text: str) -> bool:
    return _KEY_ID.fullmatch(text) is not None


def removal_key(key_id: str) -> str:
    return f"{REMOVALS}{key_id}"
