"""Requests about volumes, and the status of the process that serves them."""

import dataclasses
import os
from importlib.metadata import version

from aiohttp import web

from backends.errors import InvalidError
from nbdserve.control import documents
from nbdserve.control.bodies import Fields, query_flag, query_number
from nbdserve.control.following import Progress, follow
from nbdserve.control.reports import job_documents
from nbdserve.control.state import state_of
from nbdserve.control.streams import stream
from nbdserve.labels import BACKUP
from snapshots.names import parse_snapshot_name

routes = web.RouteTableDef()

_EXTENTS_A_WRITE = 2000
_CELLS = 1024


@routes.get("/v1/status")
async def status(request: web.Request) -> web.Response:
    state = state_of(request)
    volumes, unreadable = await state.catalogue.survey_volumes()
    snapshots = state.catalogue.list_snapshots()
    room = await state.catalogue.space.measure()
    space = room.space
    return web.json_response(
        {
            "version": version("nbdserve"),
            "data": str(state.host.data),
            "daemon": state.host.daemon,
            "pid": os.getpid(),
            "started": documents.timestamp(state.host.started),
            "listening": state.host.listening,
            "http": state.host.http,
            "workers": [
                {"pid": info.pid, "volumes": info.volumes}
                for info in state.catalogue.list_workers()
                if state.host.daemon
            ],
            "volumes": len(volumes),
            "unreadable": [documents.unreadable(volume) for volume in unreadable],
            "snapshots": len(snapshots),
            "clients": sum(info.clients for info in volumes)
            + sum(info.clients for info in snapshots),
            "backups": sorted(volume for claim in state.backups for volume in claim.volumes),
            "jobs": job_documents(state),
            "history": [dataclasses.asdict(record) for record in state.history.records()],
            "hydrations": [
                {"volume": name, **dataclasses.asdict(info)}
                for name, info in state.catalogue.hydrations().items()
            ],
            "wiping": [documents.wipe(found) for found in state.catalogue.wiping()],
            "free": space.free,
            "total": space.total,
            "used": room.used,
            "reserved": room.reserved,
            "held": room.held,
            "provisioned": room.provisioned,
            "overcommit": room.overcommit,
            "max_overcommit": state.catalogue.space.policy.max_overcommit,
            "inodes_free": space.inodes_free,
            "inodes": space.inodes,
            "warnings": [
                dataclasses.asdict(warning) for warning in state.catalogue.warnings(space)
            ],
        }
    )


@routes.get("/v1/volumes")
async def list_volumes(request: web.Request) -> web.Response:
    catalogue = state_of(request).catalogue
    volumes, unreadable = await catalogue.survey_volumes()
    return web.json_response(
        {
            "volumes": [documents.volume(info) for info in volumes],
            "unreadable": [documents.unreadable(volume) for volume in unreadable],
            "half_restored": [
                {"volume": kept.volume, "size": kept.size, "source": kept.origin.source}
                for kept in catalogue.half_restored()
            ],
        }
    )


@routes.post("/v1/volumes")
async def create_volume(request: web.Request) -> web.Response:
    """``{"name", "size"}``, or ``{"name", "from": "VOL@SNAP"}`` with or without a size.

    ``"force": true`` goes beyond the policy's overcommit; ``"reserve"`` is a size.
    """
    state = state_of(request)
    fields = await Fields.of(request)
    name, source, size = fields.text("name"), fields.optional_text("from"), None
    force, reserve = fields.flag("force"), fields.optional_size("reserve") or 0
    if source is None:
        size = fields.size("size")
        fields.end()
        change = state.catalogue.create_volume(name, size, reserve=reserve, force=force)
    else:
        size = fields.optional_size("size")
        fields.end()
        origin = parse_snapshot_name(source)
        change = state.catalogue.clone_volume(name, *origin, size, reserve=reserve, force=force)
    info = await state.operations.run(change)
    return web.json_response(documents.volume(info), status=201)


@routes.get("/v1/volumes/{volume}")
async def show_volume(request: web.Request) -> web.Response:
    info = await state_of(request).catalogue.show_volume(request.match_info["volume"])
    return web.json_response(documents.volume(info))


@routes.delete("/v1/volumes/{volume}")
async def delete_volume(request: web.Request) -> web.StreamResponse:
    """``?with_snapshots=true``. With ``?wipe=true``, lines of ``{"done", "total"}`` in bytes come
    before ``{"deleted", "wiped", "shared", "others"}``.
    """
    state = state_of(request)
    name = request.match_info["volume"]
    with_snapshots = query_flag(request, "with_snapshots")
    if query_flag(request, "wipe"):

        async def wipe(progress: Progress) -> documents.Document:
            deleted = await state.catalogue.delete_volume(
                name, with_snapshots, wipe=True, progress=progress
            )
            return documents.deleted(deleted)

        cut_off = (
            f"volume {name} is deleted; the daemon stops before all of it is wiped, and goes on"
            " when it runs again"
        )
        return await follow(request, wipe, cut_off)
    await state.operations.run(state.catalogue.delete_volume(name, with_snapshots))
    return web.json_response({"deleted": name})


@routes.post("/v1/volumes/{volume}/resize")
async def resize_volume(request: web.Request) -> web.Response:
    state = state_of(request)
    fields = await Fields.of(request)
    size, force = fields.size("size"), fields.flag("force")
    fields.end()
    info = await state.operations.run(
        state.catalogue.resize_volume(request.match_info["volume"], size, force=force)
    )
    return web.json_response(documents.volume(info))


@routes.post("/v1/volumes/{volume}/reserve")
async def reserve_space(request: web.Request) -> web.Response:
    """``{"reserve"}``: a size; null or 0 for none."""
    state = state_of(request)
    fields = await Fields.of(request)
    reserve = fields.optional_size("reserve") or 0
    fields.end()
    info = await state.operations.run(
        state.catalogue.reserve_space(request.match_info["volume"], reserve)
    )
    return web.json_response(documents.volume(info))


@routes.post("/v1/volumes/{volume}/rename")
async def rename_volume(request: web.Request) -> web.Response:
    state = state_of(request)
    fields = await Fields.of(request)
    name = fields.text("name")
    fields.end()
    info = await state.operations.run(
        state.catalogue.rename_volume(request.match_info["volume"], name)
    )
    return web.json_response(documents.volume(info))


@routes.post("/v1/volumes/{volume}/rollback")
async def rollback(request: web.Request) -> web.Response:
    """``{"snapshot", "force"}``: force disconnects the clients that have the volume open."""
    state = state_of(request)
    fields = await Fields.of(request)
    snapshot, force = fields.text("snapshot"), fields.flag("force")
    fields.end()
    info = await state.operations.run(
        state.catalogue.rollback(request.match_info["volume"], snapshot, force)
    )
    return web.json_response(documents.volume(info))


@routes.get("/v1/volumes/{volume}/diff")
async def diff(request: web.Request) -> web.StreamResponse:
    """First line: what is compared; then an extent a line, ``{"offset", "length", "zero"}``."""
    older, newer = request.query.get("from"), request.query.get("to")
    if older is None:
        raise InvalidError("the query lacks 'from', the name of a snapshot")
    found = await state_of(request).catalogue.diff(request.match_info["volume"], older, newer)
    extents = found.extents
    async with stream(request) as answer:
        await answer.send(documents.comparison(found))
        for start in range(0, len(extents), _EXTENTS_A_WRITE):
            await answer.send_all(
                {"offset": extent.offset, "length": extent.length, "zero": extent.zero}
                for extent in extents[start : start + _EXTENTS_A_WRITE]
            )
    return answer.response


@routes.get("/v1/volumes/{volume}/map")
async def map_(request: web.Request) -> web.Response:
    """Which layer holds which part, in at most ``cells`` parts, and what no backup has yet."""
    name, cells = request.match_info["volume"], query_number(request, "cells", _CELLS)
    found = await state_of(request).catalogue.map_volume(name, cells, BACKUP)
    return web.json_response(documents.volume_map(found))
