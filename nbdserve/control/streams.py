"""Answers of many JSON lines (``application/x-ndjson``).

The last line of a stream that failed is ``{"error": …, "kind": …}``: once the status line is sent
there is no other way to say so. A connection carries one stream and is closed behind it.
"""

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

from backends.errors import StorageError, one_line
from nbdserve.control.errors import to_document

CONTENT_TYPE = "application/x-ndjson"


class Stream:
    """An answer that is being written."""

    def __init__(self, response: web.StreamResponse) -> None:
        self.response = response

    async def send(self, *documents: Mapping[str, object]) -> None:
        await self.send_all(documents)

    async def send_all(self, documents: Iterable[Mapping[str, object]]) -> None:
        """Send several lines in one piece; none when there are no documents."""
        lines = b"".join(json.dumps(document).encode() + b"\n" for document in documents)
        if lines:
            await self.response.write(lines)


@asynccontextmanager
async def stream(request: web.Request) -> AsyncIterator[Stream]:
    """A stream in answer to ``request``; what goes wrong inside becomes its last line."""
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
    response.force_close()
    await response.prepare(request)
    answer = Stream(response)
    try:
        yield answer
    except ConnectionError:
        raise
    except (StorageError, OSError) as error:
        line = error if isinstance(error, StorageError) else StorageError(one_line(error))
        await answer.send(to_document(line)[1])
    await response.write_eof()
