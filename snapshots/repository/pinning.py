"""Pins: an intent that keeps a snapshot alive for somebody who reads it bit by bit.

A parent that an intent without outcome names stays live (push.py), whoever deletes it meanwhile. So
who needs a snapshot for long puts an intent that will never be committed, and ABORTED as its
outcome when nothing is needed any more.

A collector gives up on intents that are old. So a pin is **renewed**: a new intent is put before
the old one gets its outcome, so that at each moment one of the two is without.
"""

from __future__ import annotations

import time

from backends.errors import NotFoundError, UnavailableError
from backends.objects import ObjectStore
from snapshots.repository.layout import intent_key, new_push_id, outcome_key, tombstone_key
from snapshots.repository.records import Config, Intent, Outcome, Summary

_WHAT = "read bit by bit by a volume that was restored lazily"


def pin_snapshot(store: ObjectStore, config: Config, summary: Summary) -> str:
    """Keep a snapshot alive until ``unpin``; NotFoundError when it was deleted before.

    Returns the pin, '' when the store lets us read only.
    """
    pin = _put_intent(store, config, summary)
    if pin and store.size(tombstone_key(summary.push)) is not None:
        unpin(store, config, pin)
        raise NotFoundError(f"{summary.label} in {store.name} was deleted")
    return pin


def renew_pin(store: ObjectStore, config: Config, summary: Summary, old: str) -> str:
    """Put a new pin in the place of an old one; the old one's outcome is the caller's to put."""
    return _put_intent(store, config, summary) or old


def unpin(store: ObjectStore, config: Config, pin: str) -> None:
    """Let a snapshot go."""
    record = Outcome(pin, None, "nothing more is read").encode()
    if config.conditional_put:
        store.put_if_absent(outcome_key(pin), record)
    elif store.size(outcome_key(pin)) is None:
        store.put(outcome_key(pin), record)


def _put_intent(store: ObjectStore, config: Config, summary: Summary) -> str:
    pin = new_push_id()
    intent = Intent(pin, (summary.push,), summary.volume, summary.snapshot, _WHAT, time.time())
    put = store.put_if_absent if config.conditional_put else store.put
    try:
        put(intent_key(pin), intent.encode())
    except UnavailableError:
        if store.size(intent_key(pin)) is None:
            return ""  # no right to write, it seems: it answers, and refused
    return pin
