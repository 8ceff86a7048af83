"""What the daemon has counted of the requests of NBD clients (see nbdserve/measuring.py)."""

from aiohttp import web

from nbdserve.control.documents import Document
from nbdserve.control.state import State, state_of
from nbdserve.measuring import Measurement
from nbdserve.server.meter import BOUNDS, COMMAND_NAMES, OTHER, CommandNumbers

routes = web.RouteTableDef()

_NAMES = (*COMMAND_NAMES.values(), OTHER)


@routes.get("/v1/measurements")
async def measurements(request: web.Request) -> web.Response:
    return web.json_response(await measure(state_of(request)))


async def measure(state: State) -> Document:
    """Counts and seconds since the daemon started, of each export that was used since then.

    ``bounds`` are the upper ends, in seconds, of ``buckets``, which has one more for the rest.
    """
    found = await state.measuring.read(state.catalogue.names_of)
    return {
        "uptime": state.measuring.uptime,
        "bounds": list(BOUNDS),
        "exports": [_export(one) for one in found],
    }


def _export(one: Measurement) -> Document:
    numbers = one.numbers
    nothing = CommandNumbers()
    return {
        "volume": one.volume,
        "snapshot": one.snapshot,
        "connections": numbers.connections,
        "in_flight": numbers.in_flight,
        "throttled_seconds": numbers.throttled,
        "commands": {name: _command(numbers.commands.get(name, nothing)) for name in _NAMES},
    }


def _command(numbers: CommandNumbers) -> Document:
    return {
        "count": numbers.count,
        "bytes": numbers.bytes,
        "errors": sum(numbers.errors.values()),
        "errors_by_name": dict(numbers.errors),
        "seconds_sum": numbers.seconds,
        "buckets": numbers.buckets,
    }
