"""The control application and the socket that it is served on."""

import asyncio
import logging
import select
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from backends.errors import StorageError, one_line
from nbdserve.control import (
    address,
    checks,
    claims,
    hydrations,
    limits,
    measurements,
    reloads,
    reports,
    snapshots,
    volumes,
)
from nbdserve.control.bodies import MAX_BODY
from nbdserve.control.errors import to_document
from nbdserve.control.state import STATE, State

log = logging.getLogger(__name__)

_STEPS_TO_CONNECT = 10
"""Steps of the event loop, at least, from accepting a connection to counting it."""


class _WithoutTraceback(logging.Filter):
    """Bytes that are no HTTP are the client's mistake, not the server's: one line says so."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = "control socket: %s", (one_line(error),)
            record.exc_info = None
        return True


_http_log = logging.getLogger(f"{__name__}.http")
_http_log.addFilter(_WithoutTraceback())

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every error is a JSON object with one line."""
    try:
        return await handler(request)
    except StorageError as error:
        status, document = to_document(error)
        return web.json_response(document, status=status)
    except web.HTTPException as error:
        if error.status == web.HTTPNotFound.status_code:
            document = {"error": f"there is nothing at {request.path}", "kind": "not-found"}
        else:
            document = {"error": f"{error.reason}: {request.path}", "kind": "invalid"}
        return web.json_response(document, status=error.status)
    except ConnectionError:
        raise  # the client has gone: there is nobody to answer
    except OSError as error:
        return web.json_response({"error": one_line(error), "kind": "internal"}, status=500)
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        line = f"internal error: {type(error).__name__}: {one_line(error)}"
        return web.json_response({"error": line, "kind": "internal"}, status=500)


def build_application(state: State) -> web.Application:
    application = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY)
    application[STATE] = state
    for module in (
        volumes,
        snapshots,
        claims,
        checks,
        hydrations,
        reloads,
        reports,
        measurements,
        limits,
    ):
        application.add_routes(module.routes)
    return application


class ControlServer:
    """Serves ``state`` on the control socket of its data directory, whose lock the caller holds."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._runner = web.AppRunner(
            build_application(state),
            handler_cancellation=True,  # claims end with their connection
            access_log=None,
            logger=_http_log,
            shutdown_timeout=5.0,
        )

    async def start(self) -> None:
        await self._runner.setup()
        self._listener = address.bind(self.state.host.data)
        await web.SockSite(self._runner, self._listener).start()

    async def linger(self) -> None:
        """Serve until nobody is connected, then take the socket's name away.

        A process that served the directory only for its own command must not tear the commands
        that found it doing so.
        """
        while True:
            while self._connections():  # noqa: ASYNC110 - aiohttp has no event for it
                await asyncio.sleep(0.05)
            address.hide(self.state.host.data)
            for _ in range(_STEPS_TO_CONNECT):
                await asyncio.sleep(0)
            if not self._connections():
                return
            address.show(self.state.host.data)  # someone came in just before

    def _connections(self) -> bool:
        """Whether anyone is connected or waits to be accepted."""
        server = self._runner.server
        waiting = select.select([self._listener], [], [], 0)[0]
        return bool(waiting) or (server is not None and bool(server.connections))

    async def stop(self) -> None:
        """End every claim and finish every change, then close."""
        address.remove(self.state.host.data)
        self.state.stopping.set()
        self.state.operations.cut_off()
        await self._runner.cleanup()
        await self.state.operations.finish()
