"""Sealing heads: the gate of a snapshot and its commit, for one volume or a group at one instant.

1. Create the next heads, write the next manifests under temporary names, and sync what is pending
   so that the gate has little to capture. All that needs space is done then.
2. The gate: swap every volume's head. On one host that is one step of its event loop (volume.py).
   On several, writes are first frozen everywhere, so that none that begins after one swap is on
   this side of another; reads never wait.
3. Make the old heads durable, commit the manifests in one commit; FLUSHes wait until then.
4. Later, turn each sealed layer's journal into its index.

When step 3 fails, writes have gone into the new heads already, which a reopened volume would not
know: the volumes refuse writes and flushes until then, so nothing is taken for durable. When it
fails because a host was lost, the volumes of other hosts had no part in that: they keep their new
heads, committed under no snapshot's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from backends.errors import StorageError, UnavailableError, one_line
from backends.layers import LayerStore
from snapshots.gates import move_down
from snapshots.host import HostLostError, ViewHost
from snapshots.manifest import Manifest, Snapshot
from snapshots.manifest_store import ManifestStore, StagedCommit
from snapshots.merging import Merging
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenView, OpenViews

_log = logging.getLogger(__name__)

_FREEZE_SECONDS = 2.0
"""How long several hosts may take until all have frozen; then the snapshot is given up."""

_SWAP_SECONDS = 10.0
"""How long one of several hosts may take for the gate itself; then it is ended. Writes wait."""


@dataclass(frozen=True)
class _Prepared:
    """A volume whose next head is open beside the old one."""

    manifest: Manifest
    view: OpenView
    head: str


class Sealing:
    """See the module's text; the caller holds the catalogue's commits."""

    def __init__(
        self, store: LayerStore, manifests: ManifestStore, views: OpenViews, merging: Merging
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._merging = merging

    async def seal(self, manifests: list[Manifest], snapshots: Sequence[Snapshot | None]) -> None:
        """Give each volume a new head, and its old one the name of a snapshot or none."""
        prepared: list[_Prepared] = []
        acquired: list[OpenView] = []
        try:
            try:
                for manifest in manifests:
                    view = await self._views.acquire_volume(manifest)
                    acquired.append(view)
                    head = secrets.token_hex(8)
                    await self._views.add_head(view, head)
                    prepared.append(_Prepared(manifest, view, head))
                staged = await self._manifests.stage(
                    [
                        _sealed(each.manifest, each.head, snapshot)
                        for each, snapshot in zip(prepared, snapshots, strict=True)
                    ]
                )
                try:
                    for each in prepared:
                        await each.view.host.settle(each.view.key)
                    hosts = _by_host(prepared)
                    if len(hosts) > 1:
                        await _freeze(hosts)
                except BaseException:
                    await staged.record.discard()
                    raise
            except BaseException:
                for each in prepared:
                    await self._views.remove_head(each.view, each.head)
                raise
            await self._swap_and_commit(prepared, hosts, staged)
        finally:
            for view in acquired:
                await self._views.release(view)

    async def _swap_and_commit(
        self, prepared: list[_Prepared], hosts: dict[ViewHost, list[str]], staged: StagedCommit
    ) -> None:
        try:
            try:
                await _swap(hosts)
                for each in prepared:
                    await each.view.host.finish_seal(each.view.key)
            except BaseException as error:
                await staged.record.discard()
                if not any(each.view.lost for each in prepared):
                    await _fail(prepared, f"the commit of a snapshot failed: {error}")
                    raise
                await self._keep_the_rest(prepared)
                raise UnavailableError(f"no snapshot was taken: {error}") from error
            try:
                await self._manifests.finish(staged)
            except BaseException as error:
                await _fail(prepared, f"the commit of a snapshot failed: {error}")
                raise
            for each in prepared:
                self._merging.index(each.manifest.head)
        finally:
            await _each(prepared, lambda view: view.host.end_commit(view.key))

    async def _move_down(self, lost: _Prepared) -> None:
        """Of a volume whose host was lost, keep what was answered behind the gate (gates.py)."""
        manifest = lost.manifest
        try:
            await self._store.drop_cache(manifest.head)
            await move_down(self._store, lost.head, manifest.head, manifest.size >> BLOCK_SHIFT)
        except (OSError, StorageError) as error:
            _log.error(
                "volume %s: what was written since the snapshot began is lost, or in part: %s",
                manifest.name,
                one_line(error),
            )

    async def _keep_the_rest(self, prepared: list[_Prepared]) -> None:
        """A host was lost behind the gate: its volumes have their old heads, the others the new."""
        rest: list[_Prepared] = []
        for each in prepared:
            try:
                if not each.view.lost:
                    await each.view.host.finish_seal(each.view.key)
                    rest.append(each)
            except (OSError, StorageError) as error:
                await _fail([each], f"the commit of a snapshot failed: {error}")
        for each in prepared:
            if each.view.lost:
                await self._move_down(each)
                await self._views.remove_head(each.view, each.head)
        rest = [each for each in rest if not each.view.lost]
        if not rest:
            return
        try:
            await self._manifests.commit([_sealed(each.manifest, each.head, None) for each in rest])
        except BaseException as error:
            await _fail(rest, f"the commit of a new head failed: {error}")
            raise
        for each in rest:
            self._merging.index(each.manifest.head)


def _sealed(manifest: Manifest, head: str, snapshot: Snapshot | None) -> Manifest:
    """The next generation, with a new head on top of the old one."""
    taken = manifest.snapshots if snapshot is None else (*manifest.snapshots, snapshot)
    parents = {**manifest.parents, head: manifest.head}
    return manifest.changed(head=head, parents=parents, snapshots=taken)


def _by_host(prepared: Sequence[_Prepared]) -> dict[ViewHost, list[str]]:
    """The keys of the volumes on each host."""
    hosts: dict[ViewHost, list[str]] = {}
    for each in prepared:
        hosts.setdefault(each.view.host, []).append(each.view.key)
    return hosts


async def _freeze(hosts: dict[ViewHost, list[str]]) -> None:
    """Let new writes wait on all hosts, or on none."""
    try:
        async with asyncio.timeout(_FREEZE_SECONDS):
            await _together(host.freeze(keys) for host, keys in hosts.items())
    except BaseException as error:
        # A host that answers late gets this behind the freeze; one that was lost needs nothing.
        thawing = [asyncio.ensure_future(host.thaw(keys)) for host, keys in hosts.items()]
        await asyncio.wait(thawing, timeout=_FREEZE_SECONDS)
        for thaw in thawing:
            thaw.add_done_callback(_seen)
        if isinstance(error, TimeoutError):
            raise UnavailableError(
                f"no snapshot was taken: a worker did not answer within {_FREEZE_SECONDS:g} s"
            ) from None
        raise


async def _swap(hosts: dict[ViewHost, list[str]]) -> None:
    """The gate itself. A host of several that does not answer is ended: then it is known where it
    stands, and the others go on."""
    if len(hosts) == 1:
        ((host, keys),) = hosts.items()
        await host.swap_heads(keys)
        return

    async def swap(host: ViewHost, keys: list[str]) -> None:
        swapping = asyncio.ensure_future(host.swap_heads(keys))
        done, _ = await asyncio.wait([swapping], timeout=_SWAP_SECONDS)
        if not done:
            host.kill()
        await swapping

    await _together(swap(host, keys) for host, keys in hosts.items())


async def _together(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all calls, then raise the first error."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _seen(task: asyncio.Future[None]) -> None:
    if not task.cancelled():
        task.exception()


async def _fail(prepared: Sequence[_Prepared], why: str) -> None:
    await _each(prepared, lambda view: view.host.fail(view.key, why))


async def _each(prepared: Sequence[_Prepared], call: Callable[[OpenView], Awaitable[None]]) -> None:
    """Call for every volume whose host is there."""
    for each in prepared:
        if not each.view.lost:
            with contextlib.suppress(HostLostError):
                await call(each.view)
