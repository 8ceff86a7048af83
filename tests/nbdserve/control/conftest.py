"""A control server on a real data directory, and a client of it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from nbdserve.control import address
from nbdserve.control.client import Client
from nbdserve.control.offline import OfflineServer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def server(data: Path) -> Iterator[OfflineServer]:
    served = OfflineServer(data)
    yield served
    served.stop(at_once=True)


@pytest.fixture
def client(server: OfflineServer, data: Path) -> Client:
    return Client(partial(address.connect, data))
