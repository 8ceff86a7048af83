"""Layers and records in a local directory.

::

    DATA/lock                        held (flock) by the process that owns the directory; says
                                     "clean" once that and its workers ended in an orderly way
    DATA/reserve                     space kept back for metadata when the disk is full
    DATA/reservations/<name>         space that is held, allocated to a file without content
    DATA/<kind>/<name>               records, one file each
    DATA/layers/<layer>/data-00000   a layer's data, a file a TiB (see local_data.py)
    DATA/layers/<layer>/<log>        a layer's logs
    DATA/layers/<layer>/recent-0, -1 scratch files
    DATA/layers/<layer>/claim        flock: shared by readers of other processes, or exclusive
    DATA/lost/<layer>                layers that were set aside: they belonged to no volume

A file that must appear or change whole is written under a name starting with ``.new-``, synced,
renamed, and its directory is synced. Leftovers of that name are removed when the store is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path

import aiofiles
import aiofiles.os

from backends.errors import CorruptError, InUseError, InvalidError, NoSpaceError, NotFoundError
from backends.file_calls import read_boot_id
from backends.layers import Buffer, LayerFiles, Space
from backends.local_data import LocalDataFile, check_there, drop_cache, holds_data

_NEW = ".new-"
_CLEAN = b"clean\n"
_LOGS = ("index", "journal", "merge", "lazy", "fetched", "restore", "recent-0", "recent-1")
_DATA_OR_NEW = re.compile(r"data-[0-9]{5}$|\.new-")
_ZEROES = memoryview(bytes(64 << 10))
# What an empty file system or a killed process may have left.
_HARMLESS = {"lost+found", "control.sock", "control.sock.hidden", "nbd.sock"}
RESERVE_SIZE = 8 << 20
RECORD_KINDS = ("volumes", "transactions", "merges", "deletions")


class LocalLogFile:
    """A log open for appending at ``end``; what lies behind it is reserved space, all zeroes."""

    def __init__(self, path: Path, end: int) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._end = end
        self._durable = 0
        self._failed = False
        try:
            self._reserved = os.fstat(self._descriptor).st_size
        except OSError:
            self.close()
            raise

    def append(self, data: Buffer) -> None:
        if self._end + len(data) >= self._durable:
            self.sync()
        view = memoryview(data)
        position = self._end
        while len(view) > 0:
            written = os.pwrite(self._descriptor, view, position)
            view = view[written:]
            position += written
        self._end = position

    def reserve(self, length: int) -> None:
        if self._end + length > self._reserved:
            begin, end = max(self._reserved, self._end), self._end + length
            os.posix_fallocate(self._descriptor, begin, end - begin)
            # Written, not only allocated: then an append changes no metadata, and its sync need
            # not wait for a commit of the file system's journal.
            for position in range(begin, end, len(_ZEROES)):
                os.pwrite(self._descriptor, _ZEROES[: end - position], position)
            self._reserved = end

    def sync(self) -> None:
        reserved = self._reserved
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self._failed = True
            raise
        check_there(self._descriptor, self._path, reserved)
        self._durable = reserved

    def close(self) -> None:
        if self._failed:  # see local_data.py
            drop_cache(self._descriptor)
        os.close(self._descriptor)
        # Never the number of a file that is opened later.
        self._descriptor = -1


class LocalScratchFile:
    """A scratch file, empty when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.clear()
        except OSError:
            self.close()
            raise

    def write(self, position: int, data: Buffer) -> None:
        view = memoryview(data)
        while len(view) > 0:
            written = os.pwrite(self._descriptor, view, position)
            view = view[written:]
            position += written

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def reserve(self, length: int) -> None:
        os.posix_fallocate(self._descriptor, 0, length)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


class FileClaim:
    """An flock on a file, gone with the process at the latest."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def release(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class LocalStagedRecord:
    """A record under its temporary name."""

    def __init__(self, temporary: Path, path: Path) -> None:
        self._temporary = temporary
        self._path = path

    async def commit(self) -> None:
        await aiofiles.os.replace(self._temporary, self._path)
        await _sync_directory(self._path.parent)

    async def discard(self) -> None:
        with contextlib.suppress(OSError):
            await aiofiles.os.unlink(self._temporary)


class LocalLayerStore:
    """A LayerStore in the directory ``path`` (see the module's text)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machine_run = read_boot_id()
        self.was_orderly = False
        self._lock: FileClaim | None = None

    # Ownership

    async def lock(self) -> None:
        try:
            missing = []
            above = self.path
            while not above.exists():
                missing.append(above)
                above = above.parent
            if missing:
                await _settle_name(above)  # which a killed process may just have made
            for directory in reversed(missing):
                directory.mkdir(mode=0o700 if directory == self.path else 0o777, exist_ok=True)
                # Each by itself: whoever finds one later can rely on those that it is in.
                await _sync_directory(directory.parent)
            # A mistyped path must not end up with a data directory's files among its own.
            found = {path.name for path in self.path.iterdir()} - _HARMLESS
            if found and found.isdisjoint(("lock", "layers", *RECORD_KINDS)):
                raise InvalidError(
                    f"{self.path} is not empty and not a data directory of nbdserve:"
                    " name one, or a directory that is empty or does not exist yet"
                )
            if "layers" in found and "volumes" not in found:
                raise CorruptError(
                    f"{self.path / 'volumes'} is missing although there are layers: nothing is"
                    " touched; restore it from a backup of the data directory"
                )
            for kind in RECORD_KINDS:
                (self.path / kind).mkdir(mode=0o700, exist_ok=True)
            if "layers" not in found:
                # Never there without the others, whatever a power cut leaves.
                await _sync_directory(self.path)
                (self.path / "layers").mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidError(
                f"data directory {self.path} cannot be used: {error.strerror}"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise InUseError(
                f"data directory {self.path} is in use by another nbdserve process"
            ) from None
        self._lock = FileClaim(descriptor)
        try:
            self.was_orderly = os.pread(descriptor, len(_CLEAN), 0) == _CLEAN
            if not self.was_orderly:
                await asyncio.to_thread(self._drop_caches, "layers/*/*")
            os.ftruncate(descriptor, 0)
            await self._remove_leftovers()
            await self._settle_names()
            await self.keep_reserve()
        except BaseException:
            self._lock.release()
            self._lock = None
            raise

    @property
    def lock_descriptor(self) -> int:
        """The locked descriptor: processes that inherit it keep the lock as long as they run."""
        assert self._lock is not None, "the store is locked"
        return self._lock.descriptor

    async def unlock(self, *, orderly: bool = True) -> None:
        if self._lock is not None:
            # Nothing is lost without it: the next owner drops caches for nothing.
            if orderly:
                with contextlib.suppress(OSError):
                    os.pwrite(self._lock.descriptor, _CLEAN, 0)
            self._lock.release()
            self._lock = None

    async def drop_cache(self, layer: str) -> None:
        await asyncio.to_thread(self._drop_caches, f"layers/{layer}/*")

    def _drop_caches(self, pattern: str) -> None:
        """Let files be read from the disk again, for whoever wrote them was killed.

        One whose syncs had failed has left pages that only seem to be on the disk (local_data.py).
        """
        for path in self.path.glob(pattern):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                drop_cache(descriptor)
                os.close(descriptor)

    async def _remove_leftovers(self) -> None:
        def remove() -> None:
            for pattern in (f"*/{_NEW}*", f"layers/*/{_NEW}*"):
                for path in self.path.glob(pattern):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

        await asyncio.to_thread(remove)

    async def _settle_names(self) -> None:
        """Make every name durable that is found: what a killed process did last may not be yet.

        What follows builds on it: a layer is deleted because no manifest lists it any more, say.
        """
        for directory in (*RECORD_KINDS, "layers"):
            await _sync_directory(self.path / directory)
        await _sync_directory(self.path)
        await _settle_name(self.path)

    # Space

    async def space(self) -> Space:
        status = await asyncio.to_thread(os.statvfs, self.path)
        unit = status.f_frsize
        free, total = status.f_bavail * unit, status.f_blocks * unit
        return Space(free, total, status.f_favail, status.f_files)

    async def release_reserve(self) -> bool:
        try:
            await aiofiles.os.unlink(self.path / "reserve")
        except FileNotFoundError:
            return False
        return True

    async def keep_reserve(self) -> None:
        path = self.path / "reserve"
        space = await self.space()
        if space.free < 4 * RESERVE_SIZE or await aiofiles.os.path.exists(path):
            return
        with contextlib.suppress(OSError):
            async with aiofiles.open(path, "xb") as file:
                try:
                    await asyncio.to_thread(os.posix_fallocate, file.fileno(), 0, RESERVE_SIZE)
                except OSError:
                    # An empty one would be taken for the reserve.
                    await aiofiles.os.unlink(path)

    async def list_held(self) -> dict[str, int]:
        def look() -> dict[str, int]:
            with contextlib.suppress(FileNotFoundError), os.scandir(self._held()) as entries:
                return {entry.name: entry.stat().st_blocks * 512 for entry in entries}
            return {}

        return await asyncio.to_thread(look)

    async def hold(self, name: str, length: int) -> int:
        made = length > 0 and not await aiofiles.os.path.exists(self._held() / name)
        held = await asyncio.to_thread(self._hold_now, self._held() / name, length)
        if made:
            await _sync_directory(self._held())
            await _sync_directory(self.path)
        return held

    def _hold_now(self, path: Path, length: int) -> int:
        if length == 0:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return 0
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            held = os.fstat(descriptor).st_blocks * 512
            if os.fstat(descriptor).st_size > length:
                os.ftruncate(descriptor, length)
            elif held < length:
                self._allocate(descriptor, held, length)
                os.fsync(descriptor)
            return min(length, os.fstat(descriptor).st_blocks * 512)
        finally:
            os.close(descriptor)

    def _allocate(self, descriptor: int, held: int, length: int) -> None:
        """Allocate a file up to ``length``, or as far as there is space."""
        status = os.statvfs(self.path)
        room = held + status.f_bavail * status.f_frsize
        length = min(length, room - room % 4096)
        while length > held:
            try:
                os.posix_fallocate(descriptor, 0, length)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            # The file system needs some itself, or somebody else was faster.
            length -= max(1 << 20, (length - held) // 16)

    def spend(self, name: str, length: int) -> int:
        try:
            descriptor = os.open(self._held() / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            size = os.fstat(descriptor).st_size
            left = max(0, size - length) // 4096 * 4096
            os.ftruncate(descriptor, left)
            return size - left
        finally:
            os.close(descriptor)

    def holds_any(self) -> bool:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._held()) as entries:
            return any(entry.stat().st_size for entry in entries)
        return False

    def free_now(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def _held(self) -> Path:
        return self.path / "reservations"

    # Layers

    def _layer(self, layer: str) -> Path:
        return self.path / "layers" / layer

    async def list_layers(self) -> list[str]:
        names = await aiofiles.os.listdir(self.path / "layers")
        return sorted(name for name in names if not name.startswith(_NEW))

    async def list_files(self, layer: str) -> LayerFiles:
        path = self._layer(layer)
        try:
            names = sorted(await aiofiles.os.listdir(path))
        except FileNotFoundError:
            raise NotFoundError(f"layer {path} is missing") from None
        logs = [name for name in names if name in _LOGS]
        known = {*_LOGS, "claim"}
        strange = [name for name in names if name not in known and not _DATA_OR_NEW.match(name)]
        return LayerFiles(logs, [str(path / name) for name in strange])

    async def list_set_aside(self) -> list[str]:
        try:
            return sorted(str(path) for path in (self.path / "lost").iterdir())
        except FileNotFoundError:
            return []

    async def create_layer(self, layer: str) -> None:
        try:
            await aiofiles.os.mkdir(self._layer(layer), 0o700)
        except OSError as error:
            _check_space(error, self.path / "layers")
            raise
        await _sync_directory(self.path / "layers")

    async def delete_layer(self, layer: str) -> None:
        path = self._layer(layer)
        gone = path.with_name(_NEW + layer)
        with contextlib.suppress(FileNotFoundError):
            await aiofiles.os.rename(path, gone)
        # Before anything in it goes: half of a layer must not come back under its name.
        await _sync_directory(self.path / "layers")
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, gone)

    async def holds_data(self, layer: str) -> bool:
        def find() -> bool:
            return any(holds_data(path) for path in self._layer(layer).glob("data-*"))

        return await asyncio.to_thread(find)

    async def set_aside_layer(self, layer: str) -> str:
        lost = self.path / "lost"
        await aiofiles.os.makedirs(lost, 0o700, exist_ok=True)
        await _sync_directory(self.path)
        await aiofiles.os.rename(self._layer(layer), lost / layer)
        await _sync_directory(lost)
        await _sync_directory(self.path / "layers")
        return str(lost / layer)

    async def allocated(self, layer: str) -> int:
        def count() -> int:
            used = 0
            with os.scandir(self._layer(layer)) as entries:
                for entry in entries:
                    # A log may be replaced or removed meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        used += entry.stat().st_blocks * 512
            return used

        return await asyncio.to_thread(count)

    async def open_data(self, layer: str, *, writable: bool) -> LocalDataFile:
        path = self._layer(layer)
        try:
            await aiofiles.os.stat(path)
        except FileNotFoundError:
            raise NotFoundError(f"layer {path} is missing") from None
        return await asyncio.to_thread(LocalDataFile, path, writable=writable)

    async def create_log(self, layer: str, log: str, content: bytes) -> None:
        await _replace(self._layer(layer) / log, content)

    async def open_log(self, layer: str, log: str, end: int) -> LocalLogFile:
        return await asyncio.to_thread(LocalLogFile, self._layer(layer) / log, end)

    async def read_log(self, layer: str, log: str) -> bytes | None:
        try:
            async with aiofiles.open(self._layer(layer) / log, "rb") as file:
                return await file.read()
        except FileNotFoundError:
            return None

    async def has_log(self, layer: str, log: str) -> bool:
        try:
            await aiofiles.os.stat(self._layer(layer) / log)
        except FileNotFoundError:
            return False
        return True

    async def log_size(self, layer: str, log: str) -> int:
        try:
            return (await aiofiles.os.stat(self._layer(layer) / log)).st_size
        except FileNotFoundError:
            return 0

    async def delete_log(self, layer: str, log: str) -> None:
        await _unlink(self._layer(layer) / log)

    def open_scratch(self, layer: str, name: str) -> LocalScratchFile:
        return LocalScratchFile(self._layer(layer) / name)

    async def pin_layer(self, layer: str) -> FileClaim:
        claim = await self._flock(layer, fcntl.LOCK_SH)
        if claim is None:
            raise InUseError(f"layer {self._layer(layer)} is being merged; try again later")
        return claim

    async def claim_layer(self, layer: str) -> FileClaim | None:
        return await self._flock(layer, fcntl.LOCK_EX)

    async def _flock(self, layer: str, operation: int) -> FileClaim | None:
        path = self._layer(layer) / "claim"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise NotFoundError(f"layer {path.parent} is missing") from None
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            return None
        return FileClaim(descriptor)

    # Records

    async def list_records(self, kind: str) -> list[str]:
        names = await aiofiles.os.listdir(self.path / kind)
        return sorted(name for name in names if not name.startswith(_NEW))

    async def read_record(self, kind: str, name: str) -> bytes:
        try:
            async with aiofiles.open(self.path / kind / name, "rb") as file:
                return await file.read()
        except FileNotFoundError:
            raise NotFoundError(f"{self.describe_record(kind, name)} is missing") from None

    async def commit_record(self, kind: str, name: str, content: bytes) -> None:
        await _replace(self.path / kind / name, content)

    async def stage_record(self, kind: str, name: str, content: bytes) -> LocalStagedRecord:
        return await _stage(self.path / kind / name, content)

    async def delete_record(self, kind: str, name: str) -> None:
        await _unlink(self.path / kind / name)

    def describe_layer(self, layer: str) -> str:
        return str(self._layer(layer))

    def describe(self, layer: str, log: str) -> str:
        return str(self._layer(layer) / log)

    def describe_record(self, kind: str, name: str) -> str:
        return str(self.path / kind / name)


async def _replace(path: Path, content: bytes) -> None:
    """Write a file whole: temporary file, fsync, rename, fsync of the directory."""
    staged = await _stage(path, content)
    try:
        await staged.commit()
    except OSError as error:
        await staged.discard()
        _check_space(error, path.parent)
        raise


async def _stage(path: Path, content: bytes) -> LocalStagedRecord:
    temporary = path.with_name(f"{_NEW}{path.name}-{secrets.token_hex(4)}")
    staged = LocalStagedRecord(temporary, path)
    try:
        async with aiofiles.open(temporary, "xb") as file:
            await file.write(content)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
    except OSError as error:
        await staged.discard()
        _check_space(error, path.parent)
        raise
    return staged


def _check_space(error: OSError, directory: Path) -> None:
    """NoSpaceError when that is what the error says."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise NoSpaceError(f"no space left on the file system of {directory}") from error


async def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        await aiofiles.os.unlink(path)
    # Also where it is gone already: a killed process may have removed it, and nobody synced that.
    with contextlib.suppress(FileNotFoundError):
        await _sync_directory(path.parent)


async def _settle_name(directory: Path) -> None:
    """Make the name of a directory durable, but nobody has to let us read what it is in."""
    with contextlib.suppress(PermissionError):
        await _sync_directory(directory.parent)


async def _sync_directory(path: Path) -> None:
    def sync() -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    await asyncio.to_thread(sync)
