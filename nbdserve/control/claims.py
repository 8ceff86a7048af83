"""Claims: streams that hold something for as long as they are open.

The first line says what was claimed; the connection then stays open until the client closes it,
which is how the claim ends, also when the client was killed. When the process that serves the
claim stops, the stream ends with an error line: the claim holds no longer.

* ``pin`` keeps the layers of a snapshot as they are while another process reads them.
* ``imports`` reserves a volume's name while another process fills its layer; a commit, on another
  connection, makes it a volume, anything else discards it, or keeps it to be gone on with.
* ``backups`` keeps a second backup away from a volume, and a second run from a policy.
"""

import asyncio
import dataclasses
import secrets
import socket
import struct
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from backends.errors import InUseError, InvalidError, NotFoundError, UnavailableError
from nbdserve.control import documents
from nbdserve.control.bodies import Fields
from nbdserve.control.state import BackupClaim, State, state_of
from nbdserve.control.streams import stream
from snapshots.listings import VolumeInfo
from snapshots.names import check_name
from snapshots.transfer import Import, Origin, Pin

routes = web.RouteTableDef()

_UCRED: Final = struct.Struct("iII")  # of unix(7): process, user, group


async def hold(request: web.Request, claim: Mapping[str, object]) -> web.StreamResponse:
    """Answer with ``claim`` and return only by the server's stop; a lost client cancels."""
    async with stream(request) as answer:
        await answer.send(claim)
        await state_of(request).stopping.wait()
        raise UnavailableError("the daemon stops, and what was claimed from it is free again")
    return answer.response


@routes.post("/v1/volumes/{volume}/snapshots/{snapshot}/pin")
async def pin(request: web.Request) -> web.StreamResponse:
    """First line: ``{"source": where the layers are}``."""
    state = state_of(request)
    begun = state.operations.start(
        state.catalogue.pin(request.match_info["volume"], request.match_info["snapshot"])
    )
    try:
        pinned = await asyncio.shield(begun)
        return await hold(request, {"source": dataclasses.asdict(pinned.source)})
    finally:
        if begun.done():
            _release(begun)
        else:
            begun.add_done_callback(_release)


def _release(begun: asyncio.Task[Pin]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().release()


@routes.post("/v1/backups")
async def begin_backup(request: web.Request) -> web.StreamResponse:
    """``{"volumes": [name, …], "policy"}``, a policy or none; first line: ``{"volumes": […]}``."""
    state = state_of(request)
    fields = await Fields.of(request)
    volumes = sorted(set(fields.texts("volumes")))
    policy = fields.optional_text("policy")
    fields.end()
    if policy is not None:
        check_name("policy", policy)
    for volume in volumes:
        await state.catalogue.show_volume(volume)
    claim = BackupClaim(volumes, policy, _process(request))
    _check_no_backup(state, claim)  # no await from here to the claim
    state.backups.append(claim)
    try:
        return await hold(request, {"volumes": volumes})
    finally:
        state.backups.remove(claim)


def _check_no_backup(state: State, wanted: BackupClaim) -> None:
    for other in state.backups:
        who = f"by process {other.process} since {documents.timestamp(other.started)}"
        if other.policy is not None:
            if other.policy == wanted.policy:
                raise InUseError(f"policy {other.policy} is being run {who}")
            who += f", for policy {other.policy}"
        for volume in wanted.volumes:
            if volume in other.volumes:
                raise InUseError(f"volume {volume} is being backed up {who}")


def _process(request: web.Request) -> int:
    """The number of the process at the other end of the Unix socket."""
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])


@routes.post("/v1/imports")
async def begin_import(request: web.Request) -> web.StreamResponse:
    """``{"volume", "size", "origin", "force"}``; first line: ``{"import": id, "sink": …}``.

    The sink says where the layer is.
    ``origin`` is ``{"repository", "push", "source"}`` or absent: with one, what is left of an
    earlier import is gone on with, and what is left of this one is kept. ``force`` goes beyond the
    policy's overcommit.
    """
    state = state_of(request)
    fields = await Fields.of(request)
    volume, size = fields.text("volume"), fields.size("size")
    origin, force = _origin(fields.labels("origin")), fields.flag("force")
    fields.end()
    identifier = secrets.token_hex(8)
    begun = state.operations.start(_begin(state, identifier, volume, size, origin, force))
    try:
        imported = await asyncio.shield(begun)
        return await hold(
            request, {"import": identifier, "sink": dataclasses.asdict(imported.sink)}
        )
    finally:
        state.operations.start(_discard(state, identifier, begun))


def _origin(values: dict[str, str]) -> Origin | None:
    if not values:
        return None
    try:
        return Origin(**values)
    except TypeError:
        raise InvalidError("'origin' must have 'repository', 'push' and 'source'") from None


async def _begin(
    state: State, identifier: str, volume: str, size: int, origin: Origin | None, force: bool
) -> Import:
    imported = await state.catalogue.begin_import(volume, size, origin, force=force)
    state.imports[identifier] = imported
    return imported


async def _discard(state: State, identifier: str, begun: asyncio.Task[Import]) -> None:
    """Give up an import, unless it never began or its commit has taken it."""
    await asyncio.wait({begun})
    imported = state.imports.pop(identifier, None)
    if imported is not None:
        await state.catalogue.discard_import(imported)


@routes.post("/v1/imports/{import}/commit")
async def commit_import(request: web.Request) -> web.Response:
    state = state_of(request)
    imported = state.imports.pop(request.match_info["import"], None)
    if imported is None:
        raise NotFoundError("there is no such import, or its connection was closed")
    info = await state.operations.run(_commit(state, imported))
    return web.json_response(documents.volume(info), status=201)


async def _commit(state: State, imported: Import) -> VolumeInfo:
    try:
        return await state.catalogue.commit_import(imported)
    except BaseException:
        await state.catalogue.discard_import(imported)
        raise
