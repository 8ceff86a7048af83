"""Requests about volumes that are restored lazily."""

import asyncio
import contextlib

from aiohttp import web

from backends.errors import UnavailableError
from nbdserve.control import documents
from nbdserve.control.bodies import Fields
from nbdserve.control.state import state_of
from nbdserve.control.streams import stream
from snapshots.hydration import HydrationInfo
from snapshots.names import parse_snapshot_name

routes = web.RouteTableDef()

_SECONDS = 0.5


@routes.post("/v1/restores")
async def restore(request: web.Request) -> web.Response:
    """``{"volume", "url", "snapshot": "VOL@SNAP", "rate"}``: rate a second, null or absent: any.

    ``"force": true`` goes beyond the policy's overcommit.
    """
    state = state_of(request)
    fields = await Fields.of(request)
    name, url = fields.text("volume"), fields.text("url")
    source, rate = parse_snapshot_name(fields.text("snapshot")), fields.optional_size("rate")
    force = fields.flag("force")
    fields.end()
    info = await state.operations.run(
        state.catalogue.restore_lazily(name, url, *source, rate, force=force)
    )
    return web.json_response(documents.volume(info), status=201)


@routes.post("/v1/volumes/{volume}/hydration")
async def set_rate(request: web.Request) -> web.Response:
    """``{"rate"}``: bytes a second, 0 to stand still, null for no bound."""
    state = state_of(request)
    fields = await Fields.of(request)
    rate = fields.optional_size("rate")
    fields.end()
    info = await state.operations.run(
        state.catalogue.set_hydration_rate(request.match_info["volume"], rate)
    )
    return web.json_response(documents.volume(info))


@routes.get("/v1/volumes/{volume}/hydration")
async def follow(request: web.Request) -> web.StreamResponse:
    """A line ``{"done", "total", "problem"}`` now and then, until the volume is whole.

    Without a daemon it is fetched for as long as this process serves.
    """
    state = state_of(request)
    volume = request.match_info["volume"]
    info = state.catalogue.hydration(volume)
    if info is not None and not state.host.daemon:
        state.catalogue.hydrate()
    async with stream(request) as answer:
        told: HydrationInfo | None = None
        while info is not None:
            if info != told:
                told = info
                await answer.send(
                    {"done": info.fetched, "total": info.total, "problem": info.problem}
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(state.stopping.wait(), _SECONDS)
                raise UnavailableError("the daemon stops; it goes on fetching at its next start")
            info = state.catalogue.hydration(volume)
        await answer.send({"whole": True})
    return answer.response
