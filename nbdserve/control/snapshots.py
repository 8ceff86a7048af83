"""Requests about snapshots."""

from aiohttp import web

from nbdserve.control import documents
from nbdserve.control.bodies import Fields
from nbdserve.control.following import Progress, follow
from nbdserve.control.state import state_of

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

    The deletion goes on when the client leaves (following.py).
    """
    catalogue = state_of(request).catalogue
    volume, snapshot = request.match_info["volume"], request.match_info["snapshot"]

    async def delete(progress: Progress) -> documents.Document:
        await catalogue.delete_snapshot(volume, snapshot, progress)
        return {"deleted": f"{volume}@{snapshot}"}

    cut_off = (
        f"the daemon stops before all space of {volume}@{snapshot} is given back; that goes on"
        " when it runs again"
    )
    return await follow(request, delete, cut_off)
