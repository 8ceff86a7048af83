"""The page at ``/`` of the HTTP listener: what the daemon has and does, to be looked at.

Its files are in ``page/`` beside this module, as they are sent: HTML, one style sheet and a few
JavaScript modules. They ask for the JSON documents below ``/api/``, which are those of the control
socket. All of it is GET and changes nothing.

Nobody proves who he is, so what this may cost the daemon is bounded. Few questions are answered at
a time, some wait, and the rest is refused. What is the same for everybody is looked up once for all
who ask at about the same time, and seldom where that takes long.

A browser is told to load nothing but these files, and to show them in no frame.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Final

from aiohttp import web

from backends.errors import UnavailableError
from nbdserve.control import measurements, snapshots, volumes
from nbdserve.control.server import answer_errors

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

AT_A_TIME: Final = 4
"""Questions that are answered at a time."""

MOST_WAITING: Final = 20
"""Questions that may wait for that."""

LEAST_SECONDS: Final = 0.5
"""For so long at least, everybody gets the same answer."""

_SHARE: Final = 4  # for so many times as long as it took, too

_API: Final[dict[str, Handler]] = {
    "status": volumes.status,
    "measurements": measurements.measurements,
    "volumes": volumes.list_volumes,
    "volumes/{volume}": volumes.show_volume,
    "volumes/{volume}/map": volumes.map_,
    "volumes/{volume}/snapshots": snapshots.list_of_volume,
}
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(application: web.Application) -> None:
    """Let the HTTP listener's application serve the page."""
    for file in resources.files(__package__).joinpath("page").iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        if suffix in _TYPES:
            where = "/" if file.name == "index.html" else f"/page/{file.name}"
            application.router.add_get(where, _file_handler(file.read_bytes(), _TYPES[suffix]))
    limit = _Limit()
    for path, handler in _API.items():
        same_for_all = "{" not in path
        answer = _Shared(handler) if same_for_all else handler
        application.router.add_get(f"/api/{path}", limit.wrap(answer))


def _file_handler(content: bytes, content_type: str) -> Handler:
    tag = hashlib.sha256(content).hexdigest()[:32]
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}

    async def answer(request: web.Request) -> web.Response:
        if any(known.value == tag for known in request.if_none_match or ()):
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(
                body=content, content_type=content_type, charset="utf-8", headers=headers
            )
        response.etag = tag
        return response

    return answer


class _Shared:
    """A handler whose answer everybody gets for a while."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._looking = asyncio.Lock()
        self._body: bytes | None = None
        self._outdated = 0.0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        async with self._looking:
            begun = time.monotonic()
            if self._body is None or begun >= self._outdated:
                response = await self._handler(request)
                assert isinstance(response, web.Response)
                assert isinstance(response.body, bytes)
                self._body = response.body
                ended = time.monotonic()
                self._outdated = ended + max(LEAST_SECONDS, _SHARE * (ended - begun))
            return web.Response(body=self._body, content_type="application/json")


class _Limit:
    """See the module's text."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._waiting = 0

    def wrap(self, handler: Handler) -> Handler:
        """``handler`` within the limit, every error a JSON object with one line."""

        async def in_turn(request: web.Request) -> web.StreamResponse:
            if self._waiting >= MOST_WAITING:
                raise UnavailableError("too many questions at a time; try again")
            self._waiting += 1
            try:
                await self._turns.acquire()
            finally:
                self._waiting -= 1
            # Its work goes on to its end when the client leaves, and so does its turn.
            work = asyncio.ensure_future(handler(request))
            work.add_done_callback(lambda _: self._turns.release())
            return await asyncio.shield(work)

        async def answer(request: web.Request) -> web.StreamResponse:
            return await answer_errors(request, in_turn)

        return answer
