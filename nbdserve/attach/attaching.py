"""Attaching a volume: who may, and what is there already."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final

from backends.errors import InUseError, NotFoundError, UnavailableError
from nbdserve.attach import background, device, records
from nbdserve.attach.connecting import Connector
from nbdserve.attach.keeper import Keeper, Wishes, describe_other, find_attached
from nbdserve.attach.netlink import Netlink
from nbdserve.attach.residence import stay_resident
from nbdserve.systemd.notify import take_notifier

_PATIENCE: Final = 30.0
"""Seconds to wait for another process that is attaching the same."""

Document = dict[str, Any]

log = logging.getLogger(__name__)


def open_kernel() -> Netlink:
    """The nbd driver. Raises UnavailableError without it, and without the permission to use it."""
    if os.geteuid() != 0:
        raise UnavailableError("attaching and detaching needs root: use sudo")
    return Netlink()


def attach(kernel: Netlink, connector: Connector, wishes: Wishes) -> Document:
    """Attach in the background; return what is attached now, ``new`` or not."""
    claim = _claim(connector, wishes)
    if claim is None:
        return _attached_already(connector, wishes)
    new = find_attached(connector.uri) is None

    def work(ready: Callable[[Document], None]) -> None:
        _keep(kernel, connector, wishes, claim, lambda record: ready(describe(record)))

    try:
        return {**background.start(work), "new": new}
    finally:
        claim.close()


def attach_in_foreground(
    kernel: Netlink, connector: Connector, wishes: Wishes, said: Callable[[Document], None]
) -> None:
    """Attach, say so, and keep the device until it is detached or a signal ends this."""
    claim = _claim(connector, wishes)
    if claim is None:
        raise InUseError(f"{wishes.volume} is attached already, and has its keeper")
    new = find_attached(connector.uri) is None

    def ready(record: records.Record) -> None:
        said({**describe(record), "new": new})
        take_notifier().ready(f"{wishes.volume} is {device.name_of(record.index)}")

    _keep(kernel, connector, wishes, claim, ready)


def describe(record: records.Record) -> Document:
    """What is attached, as ``--json`` says it."""
    index = record.index
    return {
        "device": device.name_of(index),
        "volume": record.volume,
        "size": device.read_size(index),
        "uri": record.uri,
        "read_only": device.is_read_only(index),
        "connections": record.connections,
        "keeper": record.keeper if records.has_keeper(record) else None,
    }


def list_devices() -> list[Document]:
    """All nbd devices of this machine that are attached, by whomever."""
    known = {(record.index, record.uri): record for record in records.list_records()}
    found = []
    for index in device.list_attached():
        identifier = device.read_identifier(index)
        record = known.get((index, identifier or ""))
        if record is not None:
            found.append(describe(record))
        else:
            found.append({
                "device": device.name_of(index), "volume": None, "size": device.read_size(index),
                "uri": identifier, "read_only": device.is_read_only(index), "connections": None,
                "keeper": None,
            })  # fmt: skip
    return found


def find_device(name: str) -> int:
    """The index of the device that is meant by its name, or by that of a volume."""
    if name.startswith("/"):
        return device.parse_device(name)
    found = [record.index for record in records.list_records()
             if record.volume == name and device.is_attached(record.index)
             and device.read_identifier(record.index) in (record.uri, None)]  # fmt: skip
    if not found:
        raise NotFoundError(f"{name} is not attached")
    if len(found) > 1:
        names = ", ".join(device.name_of(index) for index in sorted(found))
        raise InUseError(f"{name} of several servers is attached: name one of {names}")
    return found[0]


def _claim(connector: Connector, wishes: Wishes) -> records.Claim | None:
    """The right to attach; None when it is attached. InUseError when something is in the way."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        claim = records.Claim.take(connector.uri)
        found = find_attached(connector.uri)
        if claim is not None:
            problem = None
            if found is not None and wishes.index not in (None, found):
                problem = f"{wishes.volume} is attached already, as {device.name_of(found)}"
            elif found is None and wishes.index is not None and device.is_attached(wishes.index):
                problem = describe_other(wishes.index)
            if problem is None:
                return claim
            claim.close()
            raise InUseError(problem)
        if found is not None:
            return None
        if time.monotonic() > deadline:
            raise InUseError(f"another process is attaching {wishes.volume}")
        time.sleep(0.1)


def _attached_already(connector: Connector, wishes: Wishes) -> Document:
    for record in records.list_records():
        if record.uri == connector.uri:
            if wishes.index not in (None, record.index):
                where = device.name_of(record.index)
                raise InUseError(f"{wishes.volume} is attached already, as {where}")
            records.tell_keeper(record, signal.SIGHUP)
            return {**describe(record), "new": False}
    raise InUseError(f"another process is attaching {wishes.volume}")


def _keep(
    kernel: Netlink,
    connector: Connector,
    wishes: Wishes,
    claim: records.Claim,
    ready: Callable[[records.Record], None],
) -> None:
    async def work() -> None:
        keeper = Keeper(kernel, connector, wishes, claim, os.getpid())
        record = await keeper.attach()
        for problem in stay_resident():
            log.warning("%s", problem)
        await keeper.keep(lambda: ready(record))

    asyncio.run(work())
