"""Requests about the limits of volumes."""

import dataclasses

from aiohttp import web

from backends.errors import InvalidError
from nbdserve.control.bodies import Fields
from nbdserve.control.documents import Document
from nbdserve.control.state import State, state_of
from snapshots.limits import LIMIT_NAMES, NO_LIMITS, Limits

routes = web.RouteTableDef()


@routes.get("/v1/volumes/{volume}/limits")
async def show(request: web.Request) -> web.Response:
    return web.json_response(_document(state_of(request), request.match_info["volume"]))


@routes.post("/v1/volumes/{volume}/limits")
async def change(request: web.Request) -> web.Response:
    """What is given changes, the rest stays; 0 is no limit.

    ``{"none": true}``: no limits, whatever the configuration says; ``{"default": true}``: those of
    the configuration again.
    """
    state = state_of(request)
    volume = request.match_info["volume"]
    fields = await Fields.of(request)
    none, default = fields.flag("none"), fields.flag("default")
    given = {name: fields.optional_size(name) for name in LIMIT_NAMES}
    fields.end()
    changes = {name: value for name, value in given.items() if value is not None}
    if sum((none, default, bool(changes))) != 1:
        raise InvalidError(f"give either 'none', 'default', or some of {', '.join(LIMIT_NAMES)}")
    own: Limits | None = NO_LIMITS
    if default:
        own = None
    elif changes:
        own = _changed(state.limiting.of_volume(volume), changes)
    await state.operations.run(state.catalogue.set_limits(volume, own))
    state.limiting.apply(volume)
    return web.json_response(_document(state, volume))


def _changed(limits: Limits, changes: dict[str, int]) -> Limits:
    values = dataclasses.asdict(limits)
    for name, value in changes.items():
        values[name] = value or None
        if not value and not name.endswith("_burst"):
            values[f"{name}_burst"] = None
    return Limits(**values).check()


def _document(state: State, volume: str) -> Document:
    limits = state.limiting.of_volume(volume)
    own = state.catalogue.volume_limits(volume)
    return {
        "volume": volume,
        **dataclasses.asdict(limits),
        "source": "configuration" if own is None else "volume",
    }
