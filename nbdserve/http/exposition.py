"""Metric families as text, made a slice at a time.

With a thousand volumes there are many lines, and the event loop that would make them at once may
be the one that serves clients. So a family is given to the library in slices of MOST_SAMPLES, each
of whose texts is a part of the whole: only the header of the first is kept.
"""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder

MOST_SAMPLES: Final = 200
"""Samples of one slice: about a millisecond."""

_END: Final = b"# EOF\n"  # of OpenMetrics


class _Slice:
    """What the library takes for a registry."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


async def expose(families: Iterable[Metric], accept: str) -> tuple[bytes, str]:
    """The text and its content type, in the format that the Accept header asks for."""
    encode, content_type = choose_encoder(accept)
    parts = []
    ended = False
    for family in families:
        for number, piece in enumerate(_slices(family)):
            text = encode(_Slice(piece))
            if text.endswith(_END):
                ended = True
                text = text.removesuffix(_END)
            parts.append(text if number == 0 else _without_header(text))
            await asyncio.sleep(0)
    if ended:
        parts.append(_END)
    return b"".join(parts), content_type


def _slices(family: Metric) -> Iterator[Metric]:
    for start in range(0, max(1, len(family.samples)), MOST_SAMPLES):
        piece = Metric(family.name, family.documentation, family.type, family.unit)
        piece.samples = family.samples[start : start + MOST_SAMPLES]
        yield piece


def _without_header(text: bytes) -> bytes:
    """No sample's line begins like a comment's."""
    lines = text.splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b"#"))
