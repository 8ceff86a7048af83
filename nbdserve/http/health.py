"""``/health``: for load balancers, and probes such as those of Kubernetes.

``/health/live`` is answered as long as the daemon answers at all: one that does not should be
started anew. ``/health/ready``, and ``/health``, say whether it serves: 200, or 503 with the
reasons, which starting it anew would not mend.
"""

from aiohttp import web

from nbdserve.control.state import State, state_of
from snapshots.names import format_size

routes = web.RouteTableDef()


@routes.get("/health/live")
async def live(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


@routes.get("/health")
@routes.get("/health/ready")
async def ready(request: web.Request) -> web.Response:
    reasons = await find_reasons(state_of(request))
    document = {"status": "failing" if reasons else "ok", "reasons": reasons}
    return web.json_response(document, status=503 if reasons else 200)


async def find_reasons(state: State) -> list[str]:
    """Why the daemon does not serve as it should, a line each."""
    reasons = []
    if state.stopping.is_set():
        reasons.append("the daemon is stopping")
    await state.measuring.ask()
    for number, process in enumerate(state.measuring.processes):
        if not process.responding:
            reasons.append(f"worker {number} does not answer")
    try:
        space = await state.store.space()
    except OSError as error:
        reasons.append(f"the data directory cannot be examined: {error.strerror}")
    else:
        if space.free < state.catalogue.space.policy.min_free.of(space.total):
            reasons.append(f"the disk is full: {format_size(space.free)} are free")
    return reasons
