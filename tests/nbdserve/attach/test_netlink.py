"""Messages to the kernel, as far as a machine without the nbd driver can tell: the rest is in
tests/integration/test_attach.py, under a kernel that has it."""

import errno
import socket
import struct
from pathlib import Path

import pytest

from backends.errors import UnavailableError
from nbdserve.attach import netlink


@pytest.fixture
def no_driver() -> None:
    if Path("/sys/module/nbd").exists():
        pytest.skip("this machine has the nbd driver")


@pytest.mark.usefixtures("no_driver")
def test_no_driver() -> None:
    with pytest.raises(UnavailableError, match="modprobe nbd"):
        netlink.Netlink()


def test_attributes_are_padded_and_nest() -> None:
    encoded = netlink._attribute(2, b"nbd\0x") + netlink._sockets([7, 9])
    found = list(netlink._attributes(encoded))
    assert found[0] == (2, b"nbd\0x")
    kind, nested = found[1]
    items = [dict(netlink._attributes(item)) for _, item in netlink._attributes(nested)]
    assert (kind, items) == (7, [{1: struct.pack("=I", 7)}, {1: struct.pack("=I", 9)}])


@pytest.mark.parametrize("data", [b"", b"\1\0\1\0", bytes(12), b"\xff" * 40, b"\x10\0"])
def test_strange_messages_end(data: bytes) -> None:
    assert len(list(netlink._attributes(data))) < 2
    assert len(list(netlink._messages(data))) < 2


def test_a_listener_hears_only_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = object.__new__(netlink.Listener)
    listener._family, listener._sock = 30, ours
    ours.setblocking(False)

    def say(family: int, command: int, index: int) -> None:
        body = struct.pack("=BBH", command, 1, 0) + netlink._attribute(1, struct.pack("=I", index))
        kernels.send(struct.pack("=IHHII", 16 + len(body), family, 0, 0, 0) + body)

    with ours, kernels:
        assert not listener.read(4)
        say(30, 4, 3)
        say(31, 4, 4)
        say(30, 5, 4)
        assert not listener.read(4)
        say(30, 4, 4)
        assert listener.read(4)
        assert not listener.read(4)


def test_errors_of_the_driver_are_explained() -> None:
    for number, words in {
        errno.EPERM: "needs root",
        errno.EBUSY: "attached already",
        errno.EINVAL: "is there such a device",
        errno.ENODEV: "detach one",
        errno.ENOMEM: "memory",
    }.items():
        error = netlink._explained(OSError(number, "Cannot allocate memory"), "/dev/nbd7")
        assert words in str(error)
        assert "nbd7" in str(error) or number == errno.EPERM
