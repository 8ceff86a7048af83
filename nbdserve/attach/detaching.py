"""Taking a device away from the kernel, unless somebody uses it."""

import os
import time
from typing import Final

from backends.errors import InUseError, NotFoundError, UnavailableError
from nbdserve.attach import device, records
from nbdserve.attach.netlink import Netlink

_PASSING: Final = 2.0
"""Seconds that somebody may have the device open in passing, as udev has."""

_DETACHING: Final = 15.0


def detach(kernel: Netlink, index: int) -> None:
    """Write what is to be written, end the keeper, detach. Raises InUseError with who uses it."""
    if not device.is_attached(index):
        raise NotFoundError(f"{device.name_of(index)} is not attached")
    claim = _claim(index)
    try:
        os.fsync(claim)
        for record in records.list_records():
            if record.index == index:
                records.stop_keeper(record)
        kernel.disconnect(index)
    except OSError as error:
        raise UnavailableError(
            f"{device.name_of(index)}: what was written cannot be saved: {error.strerror}"
        ) from None
    finally:
        os.close(claim)
    _await_end(index)
    device.set_request_timeout(index, device.KERNEL_REQUEST_TIMEOUT)
    for record in records.list_records():
        if record.index == index:
            _forget(record)


def _claim(index: int) -> int:
    """The device, open for us alone and closed for all others."""
    deadline = time.monotonic() + _PASSING
    while True:
        users = []
        try:
            descriptor = device.claim(index)
        except BlockingIOError:
            users = device.describe_users(index)
        else:
            users = device.describe_users(index)
            if not users:
                return descriptor
            os.close(descriptor)
        if time.monotonic() > deadline:
            known = "; ".join(users) or "something has it open that cannot be told from here"
            raise InUseError(f"{device.name_of(index)} is busy: {known}")
        time.sleep(0.1)


def _await_end(index: int) -> None:
    deadline = time.monotonic() + _DETACHING
    while device.is_attached(index):
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{device.name_of(index)} is disconnected, but something still has it open"
            )
        time.sleep(0.02)


def _forget(record: records.Record) -> None:
    claim = records.Claim.take(record.uri)
    if claim is not None:  # else somebody has just attached it again
        claim.remove()
        claim.close()
