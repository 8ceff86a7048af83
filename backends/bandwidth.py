"""An object store whose uploads and downloads are held to a number of bytes a second.

Each direction has a *bucket*, shared by all threads: a request takes as many bytes as it moves, may
begin when those before it are paid off, and pays ``bytes / rate`` seconds. An idle bucket saves
nothing up. So in any span of time T at most ``rate * T`` bytes begin, and one request more.

Whole requests are held back, before they are sent, and each then goes as fast as the network lets
it. So no connection stands still within a request, which servers end after seconds: an upload of 16
MiB at 1 MiB/s is one burst every 16 seconds. Nor does a wait use up the deadline of a call,
which begins with the request. What the store sends again after an error is not counted again, and
neither are requests without content (listings, sizes, deletions).

How long an object is that is read whole is known afterwards: it begins when nothing is owed, and is
paid then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from backends.errors import InvalidError, UnavailableError
from backends.locking import Retention, locking
from backends.objects import ObjectStore

LOWEST_RATE = 1024  # bytes a second: a segment takes hours already


class _Bucket:
    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._free = 0.0  # when all that was taken is paid off
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def take(self, size: int) -> bool:
        """Wait until ``size`` bytes may begin; False when it was stopped meanwhile, or before."""
        if self._rate is None:
            return True
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free)
            self._free = begin + size / self._rate
        return begin <= now or not self._stopped.wait(begin - now)

    def pay(self, size: int) -> None:
        """For ``size`` bytes that have been moved already."""
        if self._rate is not None:
            with self._lock:
                self._free = max(time.monotonic(), self._free) + size / self._rate

    def stop(self) -> None:
        self._stopped.set()


class LimitedObjectStore:
    """``inner``, at most ``upload`` and ``download`` bytes a second; None: unlimited.

    See the module's text. After ``stop_retrying`` a call that would have to wait fails.
    """

    def __init__(self, inner: ObjectStore, upload: int | None, download: int | None) -> None:
        self.name = inner.name
        self._inner = inner
        self._upload = _Bucket(upload)
        self._download = _Bucket(download)

    def put(self, key: str, data: bytes | bytearray) -> None:
        self._wait(self._upload, len(data), "write", key)
        self._inner.put(key, data)

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        self._wait(self._upload, len(data), "write", key)
        return self._inner.put_if_absent(key, data)

    def get(self, key: str, limit: int) -> bytes:
        self._wait(self._download, 0, "read", key)
        data = self._inner.get(key, limit)
        self._download.pay(len(data))
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        self._wait(self._download, length, "read", key)
        return self._inner.get_range(key, offset, length)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return self._inner.list(prefix)

    def size(self, key: str) -> int | None:
        return self._inner.size(key)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def stop_retrying(self) -> None:
        self._upload.stop()
        self._download.stop()
        self._inner.stop_retrying()

    def require_lock(self) -> None:
        locking(self._inner).require_lock()

    def hold(self, retention: Retention) -> None:
        locking(self._inner).hold(retention)

    def extend(self, key: str, until: float) -> None:
        locking(self._inner).extend(key, until)

    def _wait(self, bucket: _Bucket, size: int, doing: str, key: str) -> None:
        if not bucket.take(size):
            raise UnavailableError(
                f"cannot {doing} {key} in {self.name}: it was interrupted while it waited for its"
                " share of the bandwidth"
            )


def check_rate(rate: int) -> int:
    """Return ``rate`` (bytes a second) when it may be a limit, else InvalidError."""
    if rate < LOWEST_RATE:
        raise InvalidError(f"{rate} bytes a second are too few: a limit is at least 1K")
    return rate
