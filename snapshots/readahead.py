"""Reading ahead of sequential streams whose blocks lie in several layers.

The kernel reads ahead in one file; a stream over a volume of several layers jumps from file to
file, and each looks random. So whoever reads a view tells of the reads that missed the page cache,
and is told what to ask the disk for beforehand:

- A miss where the last one ended begins a **stream**, with a window of FIRST bytes.
- A miss near the end of what was asked for goes on with it, with a window twice as large, up to
  LONGEST: what was read ahead was hit meanwhile, and hits are not told.
- Anything else is forgotten when STREAMS others have come.

Nothing of this is done for reads that the page cache has.
"""

from __future__ import annotations

from typing import Final

FIRST: Final = 512 << 10
LONGEST: Final = 8 << 20
STREAMS: Final = 8


class Readahead:
    """The streams of one view; offsets and lengths in bytes."""

    def __init__(self) -> None:
        # The end of what is asked for, and the window that it got; 0 until it is a stream.
        self._streams: list[tuple[int, int]] = []

    def missed(self, offset: int, length: int) -> tuple[int, int] | None:
        """A read missed: what to ask for now, (offset, length); it may lie behind the end."""
        streams = self._streams
        for index, (end, window) in enumerate(streams):
            # Requests of a stream come a little out of order, and late: the window before counts.
            if end - 2 * window <= offset <= end + length:
                del streams[index]
                break
        else:
            streams.append((offset + length, 0))
            del streams[:-STREAMS]
            return None
        begin = max(end, offset + length)
        if window and offset + length < end - window // 2:
            # Late, or evicted: that much is asked for already.
            streams.append((end, window))
            return None
        window = min(2 * window, LONGEST) or FIRST
        streams.append((begin + window, window))
        return begin, window
