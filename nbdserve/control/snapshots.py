"""Requests about snapshots."""

import asyncio

from aiohttp import web

from backends.errors import UnavailableError
from nbdserve.control import documents
from nbdserve.control.bodies import Fields
from nbdserve.control.state import state_of
from nbdserve.control.streams import stream

routes = web.RouteTableDef()


@routes.get("/v1/snapshots")
async def list_all(request: web.Request) -> web.Response:
    infos = state_of(request).catalogue.list_snapshots()
    return web.json_response({"snapshots": [documents.snapshot(info) for info in infos]})


@routes.get("/v1/volumes/{volume}/snapshots")
async def list_of_volume(request: web.Request) -> web.Response:
    infos = state_of(request).catalogue.list_snapshots(request.match_info["volume"])
    return web.json_response({"snapshots": [documents.snapshot(info) for info in infos]})


@routes.post("/v1/snapshots")
async def create(request: web.Request) -> web.Response:
    """``{"snapshots": ["VOL@SNAP", …], "labels": {…}}``: all of them hold the same instant."""
    state = state_of(request)
    fields = await Fields.of(request)
    targets, labels = fields.snapshots("snapshots"), fields.labels("labels")
    fields.end()
    infos = await state.operations.run(state.catalogue.create_snapshots(targets, labels))
    return web.json_response(
        {"snapshots": [documents.snapshot(info) for info in infos]}, status=201
    )


@routes.delete("/v1/volumes/{volume}/snapshots/{snapshot}")
async def delete(request: web.Request) -> web.StreamResponse:
    """Lines of ``{"done", "total"}`` in bytes, then ``{"deleted": "VOL@SNAP"}``.

    The deletion goes on when the client leaves. When the process stops, merging its layer is cut
    off; the next one that serves the directory takes it up again.
    """
    state = state_of(request)
    volume, snapshot = request.match_info["volume"], request.match_info["snapshot"]
    news: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue(1)

    def tell(update: tuple[int, int] | None) -> None:
        if news.full():  # a slow reader skips what is outdated
            news.get_nowait()
        news.put_nowait(update)

    async def change() -> None:
        try:
            await state.catalogue.delete_snapshot(
                volume, snapshot, lambda done, total: tell((done, total))
            )
        except asyncio.CancelledError:
            raise UnavailableError(
                f"the daemon stops before all space of {volume}@{snapshot} is given back; "
                "that goes on when it runs again"
            ) from None
        finally:
            tell(None)

    deletion = state.operations.start(change(), resumable=True)
    update = await news.get()
    if update is None:
        await asyncio.shield(deletion)  # may have been refused: an ordinary error answer
    async with stream(request) as answer:
        while update is not None:
            await answer.send({"done": update[0], "total": update[1]})
            update = await news.get()
        await asyncio.shield(deletion)
        await answer.send({"deleted": f"{volume}@{snapshot}"})
    return answer.response
