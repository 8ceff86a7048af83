"""Requests to read the configuration again."""

import dataclasses

from aiohttp import web

from backends.errors import UnavailableError
from nbdserve.control.bodies import Fields
from nbdserve.control.state import state_of

routes = web.RouteTableDef()


@routes.post("/v1/reload")
async def reload(request: web.Request) -> web.Response:
    """``{}``: what was changed and what needs a restart; an error when nothing was changed."""
    state = state_of(request)
    (await Fields.of(request)).end()
    if state.reload is None:
        raise UnavailableError("no daemon serves this directory")
    outcome = await state.operations.run(state.reload())
    return web.json_response(dataclasses.asdict(outcome))
