"""Requests to check the data directory."""

import asyncio

from aiohttp import web

from nbdserve.control import documents
from nbdserve.control.bodies import Fields
from nbdserve.control.state import state_of
from nbdserve.control.streams import stream

routes = web.RouteTableDef()


@routes.post("/v1/check")
async def check(request: web.Request) -> web.StreamResponse:
    """``{"volume", "repair"}``, both optional: lines of ``{"done", "total"}``, then the report.

    The check ends when the client leaves.
    """
    state = state_of(request)
    fields = await Fields.of(request)
    volume, repair = fields.optional_text("volume"), fields.flag("repair")
    fields.end()
    news: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue(1)

    def tell(update: tuple[int, int] | None) -> None:
        if news.full():  # a slow reader skips what is outdated
            news.get_nowait()
        news.put_nowait(update)

    checking = asyncio.create_task(
        state.catalogue.check_directory(volume, repair, lambda done, total: tell((done, total)))
    )
    checking.add_done_callback(lambda _: tell(None))
    try:
        async with stream(request) as answer:
            while (update := await news.get()) is not None:
                await answer.send({"done": update[0], "total": update[1]})
            await answer.send(documents.check_report(await checking))
        return answer.response
    finally:
        checking.cancel()
