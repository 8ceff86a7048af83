"""Long changes whose progress is told: lines of ``{"done", "total"}``, then what they came to.

A change goes on when the client leaves. When the process stops, it is cut off, and the next one
that serves the directory takes it up again.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from aiohttp import web

from backends.errors import UnavailableError
from nbdserve.control.state import state_of
from nbdserve.control.streams import stream

Progress = Callable[[int, int], None]


async def follow(
    request: web.Request,
    begin: Callable[[Progress], Coroutine[Any, Any, Mapping[str, object]]],
    cut_off: str,
) -> web.StreamResponse:
    """Do what ``begin`` returns, with the progress that it reports to its argument, in bytes.

    ``cut_off`` is told when the process stops before the end.
    """
    operations = state_of(request).operations
    news: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue(1)

    def tell(update: tuple[int, int] | None) -> None:
        if news.full():  # a slow reader skips what is outdated
            news.get_nowait()
        news.put_nowait(update)

    async def change() -> Mapping[str, object]:
        try:
            return await begin(lambda done, total: tell((done, total)))
        except asyncio.CancelledError:
            raise UnavailableError(cut_off) from None
        finally:
            tell(None)

    changing = operations.start(change(), resumable=True)
    update = await news.get()
    if update is None:
        await asyncio.shield(changing)  # may have been refused: an ordinary error answer
    async with stream(request) as answer:
        while update is not None:
            await answer.send({"done": update[0], "total": update[1]})
            update = await news.get()
        await answer.send(await asyncio.shield(changing))
    return answer.response
