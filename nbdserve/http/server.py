"""The HTTP listener: what it serves, and what it refuses.

- GET and HEAD only; whatever else is asked is answered 405.
- Over TCP, the Host header has to be an IP address, ``localhost``, this machine's name or a name of
  the configuration: a page in somebody's browser whose name was made to resolve to this address
  (DNS rebinding) cannot read what is here.
- At most MAX_CONNECTIONS; when there are more, the oldest is closed, so that clients which say
  nothing keep nobody out.
- Nothing may be kept in caches or shown in frames; what a page may load is its own business, by
  default nothing.
"""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from aiohttp import web

from backends.errors import StorageError, one_line
from nbdserve.addresses import Address, TcpAddress, UnixAddress
from nbdserve.control.state import STATE, State
from nbdserve.http import health, metrics
from nbdserve.http.page import add_page
from nbdserve.http.survey import SURVEY, Survey
from nbdserve.server.listening import bind_tcp, bind_unix

MAX_CONNECTIONS: Final = 64

_KEEP_ALIVE_SECONDS: Final = 75.0
_BACKLOG: Final = 64
_MAX_BODY: Final = 1024
_HOST: Final = re.compile(r"\[(?P<ipv6>[^\]]*)\](:[0-9]*)?|(?P<name>[^:]*)(:[0-9]*)?")
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)
_http_log = logging.getLogger(f"{__name__}.http")
_http_log.setLevel(logging.CRITICAL)  # bytes that are no HTTP are the client's mistake


class HttpServer:
    """Serves ``state`` at ``address``; ``names`` are those that clients may know it by.

    ``page``: the page for browsers as well.
    """

    def __init__(
        self, state: State, address: Address, names: Iterable[str] = (), *, page: bool = False
    ) -> None:
        self._address = address
        allowed = None
        if isinstance(address, TcpAddress):
            allowed = {"localhost", socket.gethostname().lower(), address.host.lower()}
            allowed.update(name.lower() for name in names)
        self._application = build_application(state, allowed, page=page)
        self._runner = web.AppRunner(
            self._application,
            access_log=None,
            logger=_http_log,
            handler_cancellation=True,
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
            shutdown_timeout=1.0,
        )
        self._servers: list[asyncio.Server] = []
        self.listening: list[str] = []
        """Where it listens, once it does: ``http://HOST:PORT`` or ``unix:PATH``."""

    async def start(self) -> None:
        """Listen. InUseError or InvalidError."""
        loop = asyncio.get_running_loop()
        if isinstance(self._address, UnixAddress):
            sockets = [bind_unix(self._address.path).sock]
            self.listening = [str(self._address)]
        else:
            bound = await bind_tcp(self._address.host, self._address.port)
            sockets = [found.sock for found in bound]
            port = sockets[0].getsockname()[1]
            self.listening = [f"http://{TcpAddress(self._address.host, port)}"]
        await self._runner.setup()
        for sock in sockets:
            self._servers.append(
                await loop.create_server(self._accepted, sock=sock, backlog=_BACKLOG)
                if sock.family != socket.AF_UNIX
                else await loop.create_unix_server(self._accepted, sock=sock, backlog=_BACKLOG)
            )

    async def stop(self) -> None:
        """Close the listeners and all connections."""
        for server in self._servers:
            server.close()
        await self._runner.cleanup()
        if isinstance(self._address, UnixAddress) and self._servers:
            with contextlib.suppress(OSError):
                Path(self._address.path).unlink()

    def _accepted(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        connections = server.connections
        if len(connections) >= MAX_CONNECTIONS:
            connections[0].force_close()
        return server()


def build_application(
    state: State, names: Iterable[str] | None, *, page: bool = False
) -> web.Application:
    """What is served; ``names`` are the host names that are answered to, None: any."""
    allowed = None if names is None else frozenset(names)

    @web.middleware
    async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if allowed is not None and not is_allowed(request.headers.get("Host"), allowed):
            return web.Response(
                status=421,
                text="this host name is not served here; http_hosts in the configuration adds it\n",
            )
        if request.method not in ("GET", "HEAD"):
            return web.Response(
                status=405, text="everything here is read-only\n", headers={"Allow": "GET, HEAD"}
            )
        return await _answer_errors(request, handler)

    application = web.Application(middlewares=[guard], client_max_size=_MAX_BODY)
    application[STATE] = state
    application[SURVEY] = Survey(state.catalogue)
    application.on_response_prepare.append(_set_headers)
    for module in (metrics, health):
        application.add_routes(module.routes)
    if page:
        add_page(application)
    return application


def is_allowed(host: str | None, names: frozenset[str]) -> bool:
    """Whether a Host header is one that no stranger's page can have; None: there is none."""
    if host is None:  # no browser leaves it out
        return True
    found = _HOST.fullmatch(host.strip())
    if found is None:
        return False
    try:
        ip_address(found["ipv6"] or found["name"] or "")
    except ValueError:
        return (found["name"] or "").lower().rstrip(".") in names
    return True


async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every error is one line."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        text = f"{error.reason}\n"
        if error.status == web.HTTPNotFound.status_code:
            text = (
                "there are /metrics, /health, /health/live, /health/ready, and where it is turned"
                " on, the page at /\n"
            )
        return web.Response(status=error.status, text=text)
    except ConnectionError:
        raise  # the client has gone
    except (OSError, StorageError) as error:
        return web.Response(status=503, text=f"{one_line(error)}\n")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return web.Response(status=500, text="internal error; the daemon's log has more\n")


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["Server"] = "nbdserve"
