"""Clients that are connected and do nothing more, or stopped in the middle of something."""

from __future__ import annotations

import resource
import struct
from types import TracebackType
from typing import Final, Self

from nbdserve.protocol.constants import CMD_READ, CMD_WRITE, REQUEST_MAGIC
from scripts.bench.client import Address, Client
from scripts.bench.scale import BLOCK, MIB

_REQUEST: Final = struct.Struct(">IHHQQI")

STUCK: Final = {
    "half a request's header sent": _REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 1, 0, BLOCK)[:14],
    "a third of a WRITE of 1 MiB sent": _REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, MIB)
    + bytes(MIB // 3),
    "64 READs of 1 MiB sent, no reply read": 64
    * _REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 1, 0, MIB),
}
"""What clients have sent that stopped then, by what that is. The export has 1 MiB at least."""


class Crowd:
    """Connections to one export; a context manager that closes them without a word."""

    def __init__(self, where: Address, export: str, *, tls: bool = False) -> None:
        self._where, self._export, self._tls = where, export, tls
        self._clients: list[Client] = []
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self._clients:
            client.leave()

    def add_idle(self, count: int) -> None:
        """More clients that have read a block and ask for nothing now."""
        for _ in range(count):
            self._add().read(0, BLOCK)

    def add_stuck(self, count: int, sent: bytes) -> None:
        """More clients that have sent that much, one of STUCK."""
        for _ in range(count):
            self._add().send(sent)

    def _add(self) -> Client:
        client = Client(self._where, self._export, tls=self._tls)
        self._clients.append(client)
        return client
