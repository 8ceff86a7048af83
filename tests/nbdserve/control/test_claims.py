"""Pins, imports and backups are held as long as their connection, and no longer."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from backends.errors import (
    ExistsError,
    InUseError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.local_layers import LocalLayerStore
from nbdserve.control import address
from nbdserve.control.client import Client, path
from nbdserve.control.offline import OfflineServer
from snapshots.sink import open_sink
from snapshots.transfer import SinkDescription

MIB = 1 << 20
PIN = path("volumes", "a", "snapshots", "one", "pin")


@pytest.fixture
def snapshot(client: Client) -> None:
    client.post(path("volumes"), {"name": "a", "size": MIB})
    client.post(path("snapshots"), {"snapshots": ["a@one"]})


def delete(client: Client) -> None:
    with client.stream("DELETE", path("volumes", "a", "snapshots", "one")) as answer:
        list(answer.lines())


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that a closed connection brings about."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("snapshot")
def test_a_pin_holds_until_it_is_closed(client: Client) -> None:
    with client.stream("POST", PIN) as first, client.stream("POST", PIN) as second:
        source = first.first()["source"]
        assert (source["volume"], source["snapshot"], source["size"]) == ("a", "one", MIB)
        assert second.first()["source"] == source
        with pytest.raises(InUseError, match="a@one"):
            delete(client)
        first.check_held()
    delete(client)  # at once: leaving the pin waits until it is gone
    assert client.get(path("snapshots")) == {"snapshots": []}


@pytest.mark.usefixtures("snapshot")
def test_a_pin_ends_with_its_process(client: Client, data: Path) -> None:
    connection = address.connect(data)
    request = f"POST {PIN} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    connection.sendall(request.encode())
    received = b""
    while b'"source"' not in received:
        received += connection.recv(65536)
    with pytest.raises(InUseError):
        delete(client)
    connection.close()  # as the kernel does for a process that was killed

    def deleted() -> bool:
        try:
            delete(client)
        except InUseError:
            return False
        return True

    wait_for(deleted)


def volume_b() -> dict[str, object]:
    return {"volume": "b", "size": MIB}


def layers(data: Path) -> list[str]:
    return sorted(entry.name for entry in (data / "layers").iterdir())


def test_an_import_becomes_a_volume_by_its_commit(client: Client, data: Path) -> None:
    with client.stream("POST", path("imports"), volume_b()) as claim:
        begun = claim.first()
        assert client.get(path("volumes")) == {"volumes": [], "unreadable": [], "half_restored": []}
        with pytest.raises(ExistsError, match="b"):
            client.post(path("volumes"), {"name": "b", "size": MIB})

        async def fill() -> None:
            store = LocalLayerStore(data)
            sink = await open_sink(store, SinkDescription(**begun["sink"]))
            sink.write(4096, b"x" * 4096)
            await sink.finish()
            sink.close()

        asyncio.run(fill())
        commit = path("imports", begun["import"], "commit")
        assert client.post(commit, {})["mapped"] == 4096
        with pytest.raises(NotFoundError):
            client.post(commit, {})
    assert [v["name"] for v in client.get(path("volumes"))["volumes"]] == ["b"]


def test_an_import_that_is_not_committed_leaves_nothing(client: Client, data: Path) -> None:
    with client.stream("POST", path("imports"), volume_b()) as claim:
        begun = claim.first()
        assert len(layers(data)) == 1
    wait_for(lambda: layers(data) == [])
    with pytest.raises(NotFoundError, match="import"):
        client.post(path("imports", begun["import"], "commit"), {})
    client.post(path("volumes"), {"name": "b", "size": MIB})


def test_an_import_that_was_never_filled_cannot_be_committed(client: Client, data: Path) -> None:
    with client.stream("POST", path("imports"), volume_b()) as claim:
        begun = claim.first()
        with pytest.raises(StorageError, match=begun["sink"]["layer"]):
            client.post(path("imports", begun["import"], "commit"), {})
    wait_for(lambda: layers(data) == [])
    assert client.get(path("volumes")) == {"volumes": [], "unreadable": [], "half_restored": []}


@pytest.mark.usefixtures("snapshot")
def test_one_backup_of_a_volume_at_a_time(client: Client) -> None:
    client.post(path("volumes"), {"name": "b", "size": MIB})
    with client.stream("POST", path("backups"), {"volumes": ["a", "a"]}) as claim:
        assert claim.first() == {"volumes": ["a"]}
        assert client.get(path("status"))["backups"] == ["a"]
        with pytest.raises(InUseError, match="volume a is being backed up"):
            client.stream("POST", path("backups"), {"volumes": ["b", "a"]})
        with client.stream("POST", path("backups"), {"volumes": ["b"]}) as other:
            other.first()
    with pytest.raises(NotFoundError, match="nothing"):
        client.stream("POST", path("backups"), {"volumes": ["a", "nothing"]})
    assert client.get(path("status"))["backups"] == []


@pytest.mark.usefixtures("snapshot")
def test_a_server_that_stops_ends_every_claim(
    client: Client, server: OfflineServer, data: Path
) -> None:
    with (
        client.stream("POST", PIN) as pin,
        client.stream("POST", path("imports"), volume_b()) as claim,
    ):
        pin.first()
        claim.first()
        server.stop(at_once=True)
        for answer in (pin, claim):
            with pytest.raises(UnavailableError, match="stopped"):
                answer.check_held()
            with pytest.raises(UnavailableError, match="stops"):
                answer.first()
    assert not (data / "control.sock").exists()
    with OfflineServerOf(data) as again:
        assert len(layers(data)) == 2  # the volume's; the import's is gone
        assert len(again.get(path("snapshots"))["snapshots"]) == 1


class OfflineServerOf:
    """A server for a block, and a client of it."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def __enter__(self) -> Client:
        self._server = OfflineServer(self._data)
        return Client(partial(address.connect, self._data))

    def __exit__(self, *error: object) -> None:
        self._server.stop()


@pytest.mark.usefixtures("snapshot")
def test_a_server_that_leaves_waits_for_who_is_connected(
    client: Client, server: OfflineServer, data: Path
) -> None:
    leaving = threading.Thread(target=server.stop)
    with client.stream("POST", PIN) as pin:
        pin.first()
        leaving.start()
        leaving.join(0.3)
        assert leaving.is_alive()
        # Whoever comes meanwhile is served too.
        assert client.get(path("status"))["snapshots"] == 1
        pin.check_held()
    leaving.join(30)
    assert not leaving.is_alive()
    assert not (data / "control.sock").exists()


def test_one_server_a_directory(client: Client, data: Path) -> None:
    with pytest.raises(InUseError, match="in use"):
        OfflineServer(data)
    assert client.get(path("status"))["volumes"] == 0


def test_what_a_killed_server_left_is_replaced(data: Path) -> None:
    data.mkdir()
    for name in ("control.sock", "control.sock.hidden"):
        (data / name).touch()
    with OfflineServerOf(data) as client:
        assert client.get(path("status"))["volumes"] == 0
    assert not [entry for entry in data.iterdir() if "sock" in entry.name]
