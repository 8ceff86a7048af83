"""The kernel's nbd driver, through its generic netlink family.

A message is ``nlmsghdr``, ``genlmsghdr``, attributes; an attribute is length, type, data, padded to
4 bytes, and may nest others. Every request asks for an ACK, which is NLMSG_ERROR with 0 in it or
an errno. All numbers are the machine's own byte order. The family's number is looked up by name
once; it is there when the module is loaded.

Sources: include/uapi/linux/nbd-netlink.h, netlink.h and genetlink.h of Linux, drivers/block/nbd.c.
This is done here, not by a library, since a keeper stays for as long as its device does, locked in
memory: pyroute2, the one that is well kept, would make it half as large again and take longer to
import than all the rest, for five messages.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final, Self

from backends.errors import InUseError, InvalidError, UnavailableError

_HEADER: Final = Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC: Final = Struct("=BBH")  # command, version, reserved
_ATTRIBUTE: Final = Struct("=HH")  # length, type
_U16: Final = Struct("=H")
_U32: Final = Struct("=I")
_U64: Final = Struct("=Q")
_ERRNO: Final = Struct("=i")

_NETLINK_GENERIC: Final = 16
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NLM_F_REQUEST: Final = 1
_NLM_F_ACK: Final = 4
_NLMSG_ERROR: Final = 2
_TYPE_MASK: Final = 0x3FFF  # the rest are flags
_RECEIVE_SIZE: Final = 64 << 10

_GENL_ID_CTRL: Final = 16
_CTRL_CMD_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID: Final = 1
_CTRL_ATTR_FAMILY_NAME: Final = 2
_CTRL_ATTR_MCAST_GROUPS: Final = 7
_CTRL_ATTR_MCAST_GRP_NAME: Final = 1
_CTRL_ATTR_MCAST_GRP_ID: Final = 2

_NBD_FAMILY: Final = b"nbd\0"
_NBD_GROUP: Final = b"nbd_mc_group\0"
_NBD_VERSION: Final = 1

_CMD_CONNECT: Final = 1
_CMD_DISCONNECT: Final = 2
_CMD_RECONFIGURE: Final = 3
_CMD_LINK_DEAD: Final = 4

_ATTR_INDEX: Final = 1
_ATTR_SIZE_BYTES: Final = 2
_ATTR_BLOCK_SIZE_BYTES: Final = 3
_ATTR_TIMEOUT: Final = 4
_ATTR_SERVER_FLAGS: Final = 5
_ATTR_SOCKETS: Final = 7
_ATTR_DEAD_CONN_TIMEOUT: Final = 8
_ATTR_BACKEND_IDENTIFIER: Final = 10
_SOCK_ITEM: Final = 1
_SOCK_FD: Final = 1


@dataclass(frozen=True)
class Disk:
    """What the kernel is to make of a device: sizes in bytes, times in seconds.

    ``timeout`` 0: no request takes too long. ``identifier`` is kept by the kernel while the device
    is attached, and has to be named again by who reconfigures it.
    """

    size: int
    block_size: int
    flags: int
    timeout: int
    dead_timeout: int
    identifier: str


class Netlink:
    """A socket for requests to the driver; each returns when the kernel has done it."""

    def __init__(self) -> None:
        """Raises UnavailableError when the nbd module is not loaded."""
        self._sock = _open_socket()
        self._sequence = 0
        self._family = 0
        self._group = 0
        try:
            self._look_up_family()
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def connect(self, index: int | None, disk: Disk, sockets: Iterable[int]) -> int:
        """Attach a device, any free one for None, to sockets (file descriptors); return its index.

        InUseError when it is attached already.
        """
        attributes = [
            _attribute(_ATTR_SIZE_BYTES, _U64.pack(disk.size)),
            _attribute(_ATTR_BLOCK_SIZE_BYTES, _U64.pack(disk.block_size)),
            _attribute(_ATTR_TIMEOUT, _U64.pack(disk.timeout)),
            _attribute(_ATTR_DEAD_CONN_TIMEOUT, _U64.pack(disk.dead_timeout)),
            _attribute(_ATTR_SERVER_FLAGS, _U64.pack(disk.flags)),
            _attribute(_ATTR_BACKEND_IDENTIFIER, disk.identifier.encode() + b"\0"),
            _sockets(sockets),
        ]
        if index is not None:
            attributes.append(_attribute(_ATTR_INDEX, _U32.pack(index)))
        device = "a free nbd device" if index is None else f"/dev/nbd{index}"
        try:
            replies = self._request(_CMD_CONNECT, attributes)
        except OSError as error:
            raise _explained(error, device) from None
        for reply in replies:
            for kind, data in _attributes(reply[_GENERIC.size :]):
                if kind == _ATTR_INDEX:
                    return int(_U32.unpack(data)[0])
        raise UnavailableError("the kernel did not say which device it has attached")

    def reconfigure(
        self, index: int, identifier: str, *, sockets: Iterable[int] = (), size: int | None = None
    ) -> None:
        """Give an attached device new sockets for its dead ones, or a new size in bytes.

        Sockets beyond the number of dead ones are left alone. NotAttachedError when it is not
        attached, or is attached to something else.
        """
        attributes = [
            _attribute(_ATTR_INDEX, _U32.pack(index)),
            _attribute(_ATTR_BACKEND_IDENTIFIER, identifier.encode() + b"\0"),
        ]
        if size is not None:
            attributes.append(_attribute(_ATTR_SIZE_BYTES, _U64.pack(size)))
        given = list(sockets)
        if given:
            attributes.append(_sockets(given))
        try:
            self._request(_CMD_RECONFIGURE, attributes)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENXIO, errno.ENODEV):
                raise NotAttachedError(f"/dev/nbd{index} is not attached to {identifier}") from None
            raise _explained(error, f"/dev/nbd{index}") from None

    def disconnect(self, index: int) -> None:
        """Detach a device, whoever uses it. One that is not attached is left as it is."""
        try:
            self._request(_CMD_DISCONNECT, [_attribute(_ATTR_INDEX, _U32.pack(index))])
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENXIO):
                raise _explained(error, f"/dev/nbd{index}") from None

    def listen(self) -> "Listener":
        """Hear of connections that die, from now on."""
        return Listener(self._family, self._group)

    def _look_up_family(self) -> None:
        name = _attribute(_CTRL_ATTR_FAMILY_NAME, _NBD_FAMILY)
        try:
            replies = self._request(_CTRL_CMD_GETFAMILY, [name], _GENL_ID_CTRL)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            raise UnavailableError(
                "the kernel has no nbd driver loaded: run 'modprobe nbd' as root"
            ) from None
        for reply in replies:
            for kind, data in _attributes(reply[_GENERIC.size :]):
                if kind == _CTRL_ATTR_FAMILY_ID:
                    (self._family,) = _U16.unpack(data)
                elif kind == _CTRL_ATTR_MCAST_GROUPS:
                    groups = [dict(_attributes(group)) for _, group in _attributes(data)]
                    for group in groups:
                        if group[_CTRL_ATTR_MCAST_GRP_NAME] == _NBD_GROUP:
                            (self._group,) = _U32.unpack(group[_CTRL_ATTR_MCAST_GRP_ID])

    def _request(
        self, command: int, attributes: Iterable[bytes], family: int | None = None
    ) -> list[bytes]:
        """Send a request; return the messages that came before the ACK. Raises OSError."""
        self._sequence += 1
        body = _GENERIC.pack(command, _NBD_VERSION, 0) + b"".join(attributes)
        kind = self._family if family is None else family
        flags = _NLM_F_REQUEST | _NLM_F_ACK
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._sock.send(header + body)
        replies = []
        while True:
            for sequence, kind, data in _messages(self._sock.recv(_RECEIVE_SIZE)):
                if sequence != self._sequence:
                    continue
                if kind != _NLMSG_ERROR:
                    replies.append(data)
                    continue
                code = -_ERRNO.unpack_from(data)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return replies


class NotAttachedError(UnavailableError):
    """The device is not attached any more, or to something else."""


class Listener:
    """A non-blocking socket that hears of connections that died."""

    def __init__(self, family: int, group: int) -> None:
        self._family = family
        self._sock = _open_socket()
        self._sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        self._sock.setblocking(False)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def read(self, index: int) -> bool:
        """Whether a connection of the device has died since the last call, or may have."""
        died = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = self._sock.recv(_RECEIVE_SIZE)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    died = True  # the kernel had to drop some
                    continue
                for _, kind, message in _messages(data):
                    if kind != self._family or message[0] != _CMD_LINK_DEAD:
                        continue
                    found = dict(_attributes(message[_GENERIC.size :]))
                    died = died or found.get(_ATTR_INDEX) == _U32.pack(index)
        return died


def _open_socket() -> socket.socket:
    try:
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC
        )
    except OSError as error:
        raise UnavailableError(f"this system has no netlink: {error.strerror}") from None
    sock.bind((0, 0))
    return sock


def _explained(error: OSError, device: str) -> Exception:
    """What the driver means by its errors."""
    if error.errno == errno.EPERM:
        return UnavailableError("attaching and detaching needs root (CAP_SYS_ADMIN)")
    if error.errno == errno.EBUSY:
        return InUseError(f"{device} is attached already")
    if error.errno == errno.EINVAL:
        return InvalidError(f"the kernel refuses {device}: is there such a device?")
    if error.errno in (errno.ENOSPC, errno.ENODEV):
        return UnavailableError(
            f"the kernel has no {device.removeprefix('a ')}: detach one that is not needed"
        )
    return UnavailableError(f"{device}: the kernel says: {error.strerror}")


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def _sockets(descriptors: Iterable[int]) -> bytes:
    items = (
        _attribute(_SOCK_ITEM, _attribute(_SOCK_FD, _U32.pack(number))) for number in descriptors
    )
    return _attribute(_ATTR_SOCKETS, b"".join(items))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The types and contents of attributes, in order."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The sequence numbers, types and contents of messages, in order."""
    while len(data) >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield sequence, kind, data[_HEADER.size : length]
        data = data[length + -length % 4 :]
