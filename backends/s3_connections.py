"""Connections to an S3 server that acknowledge what arrives at once.

A server that sends head and body of a reply in two packets, with Nagle's algorithm on, waits with
the second until the first is acknowledged; and Linux puts that off, by 40 ms, on a connection whose
ends speak in turns. radosgw is one: listing a few keys took 47 ms, and takes 5. TCP_QUICKACK
changes that, until the next time that the connection has spoken in turns; so it is set for every
reply.
"""

from __future__ import annotations

import socket
from typing import Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)


def _acknowledge_at_once(connection: Any) -> None:
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class _Connection(AWSHTTPConnection):
    def getresponse(self) -> Any:
        _acknowledge_at_once(self)
        return super().getresponse()


class _SecureConnection(AWSHTTPSConnection):
    def getresponse(self) -> Any:
        _acknowledge_at_once(self)
        return super().getresponse()


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def use_prompt_connections(client: Any) -> None:
    """Let all connections of a client of botocore be such ones, before its first request.

    botocore has no public way to choose their class: where a version of it keeps the classes in
    another place, they stay as they are.
    """
    session = getattr(getattr(client, "_endpoint", None), "http_session", None)
    classes = getattr(session, "_pool_classes_by_scheme", None)
    if isinstance(classes, dict):
        classes.update(http=_Pool, https=_SecurePool)
