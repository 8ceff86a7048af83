"""The HTTP listener over a real catalogue: what it tells, to whom, and in which form."""

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from backends.layers import Space
from backends.local_layers import LocalLayerStore
from nbdserve.addresses import TcpAddress, UnixAddress
from nbdserve.control.history import Success
from nbdserve.control.jobs import Job
from nbdserve.control.state import Host, State
from nbdserve.http import exposition
from nbdserve.http.exposition import expose
from nbdserve.http.metrics import without_credentials
from nbdserve.http.server import MAX_CONNECTIONS, HttpServer, is_allowed
from nbdserve.http.survey import Survey
from nbdserve.registry import CatalogueExports
from nbdserve.server import Server
from snapshots.catalogue import Catalogue
from tests.nbdserve.server.nbd_client import DISC, READ, TRIM, WRITE, Client

SIZE = 1 << 20
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


class Daemon:
    """What of a daemon this is about: a catalogue, an NBD socket, the HTTP listener."""

    def __init__(self, catalogue: Catalogue, state: State, server: Server, nbd: str) -> None:
        self.catalogue = catalogue
        self.state = state
        self.nbd = nbd
        self.http = HttpServer(state, TcpAddress("127.0.0.1", 0), ["Storage.example.com"])

    @property
    def url(self) -> str:
        return self.http.listening[0]

    async def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.url + path, headers=headers) as answer,
        ):
            return answer.status, await answer.text(), dict(answer.headers)

    async def samples(self) -> dict[tuple[str, ...], float]:
        """The values of a scrape by name and labels, sorted by the labels' names."""
        status, text, _ = await self.get("/metrics")
        assert status == 200
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in parse_text(text)
            for sample in family.samples
        }


@contextlib.asynccontextmanager
async def daemon() -> AsyncIterator[Daemon]:
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        data.mkdir()
        store = LocalLayerStore(data)
        catalogue = await Catalogue.open(store)
        state = State(catalogue, store, Host(data, daemon=True))
        nbd = Server(CatalogueExports(catalogue), meters=state.measuring.meters)
        await nbd.listen_unix(data / "nbd.sock")
        made = Daemon(catalogue, state, nbd, str(data / "nbd.sock"))
        await made.http.start()
        try:
            yield made
        finally:
            await made.http.stop()
            await nbd.drain(5)
            await catalogue.close()


def run(test: Callable[[Daemon], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), daemon() as made:
            await test(made)

    asyncio.run(main())


def test_requests_are_exposed_by_volume_and_command() -> None:
    async def test(made: Daemon) -> None:
        await made.catalogue.create_volume("web", SIZE)
        client = await Client.connect(made.nbd, "web")
        for _ in range(3):
            await client.call(WRITE, 0, data=b"x" * 4096)
        await client.call(READ, SIZE, 1)
        found = await made.samples()
        assert found["nbdserve_connections", "web"] == 1
        assert found["nbdserve_requests_in_flight", "web"] == 0
        assert found["nbdserve_request_duration_seconds_count", "write", "web"] == 3
        assert found["nbdserve_request_duration_seconds_bucket", "write", "+Inf", "web"] == 3
        assert found["nbdserve_request_duration_seconds_sum", "write", "web"] > 0
        assert found["nbdserve_request_bytes_total", "write", "web"] == 3 * 4096
        assert found["nbdserve_request_errors_total", "read", "EINVAL", "web"] == 1
        assert not any("trim" in key for key in found)
        buckets = [
            value
            for key, value in found.items()
            if key[0] == "nbdserve_request_duration_seconds_bucket" and key[1] == "write"
        ]
        assert buckets == sorted(buckets)
        client.send(DISC)
        client.close()
        for _ in range(100):
            if (found := await made.samples())["nbdserve_connections", "web"] == 0:
                break
        assert found["nbdserve_connections", "web"] == 0
        assert found["nbdserve_request_bytes_total", "write", "web"] == 3 * 4096

        await made.catalogue.create_snapshots([("web", "monday")])
        client = await Client.connect(made.nbd, "web@monday")
        await client.call(READ, 0, 512)
        found = await made.samples()
        assert found["nbdserve_request_bytes_total", "read", "web@monday"] == 512
        client.close()

    run(test)


def test_volumes_backups_and_the_daemon_are_exposed() -> None:
    async def test(made: Daemon) -> None:
        info = await made.catalogue.create_volume("web", SIZE)
        await made.catalogue.create_snapshots([("web", "monday")])
        repository = "s3://backups/web"
        for _ in range(2):  # two jobs of the same kind are one series
            made.state.jobs.begin(Job("push", "web", "monday", repository, 10, 100))
        await made.state.history.succeeded(
            info.id, repository, Success(None, "monday", 1000.0, 77, 5.0)
        )
        found = await made.samples()
        assert found["nbdserve_volume_size_bytes", "web"] == SIZE
        assert found["nbdserve_volume_layers", "web"] == 2
        assert found["nbdserve_volume_snapshots", "web"] == 1
        assert found["nbdserve_volume_mapped_bytes", "web"] == 0
        assert found["nbdserve_volume_read_only", "web"] == 0
        assert found[("nbdserve_volumes",)] == 1
        assert found["nbdserve_job_done_bytes", "push", repository, "web"] == 20
        assert found["nbdserve_job_total_bytes", "push", repository, "web"] == 200
        assert found["nbdserve_backup_last_uploaded_bytes", repository, "web"] == 77
        assert ("nbdserve_backup_last_failure_timestamp_seconds", repository, "web") not in found
        assert found["nbdserve_worker_up", "0"] == 1
        assert found[("nbdserve_worker_restarts_total",)] == 0
        assert found[("nbdserve_data_free_bytes",)] > 0
        assert found[("nbdserve_start_time_seconds",)] == pytest.approx(made.state.host.started)
        assert found[("process_resident_memory_bytes",)] > 0
        assert [key for key in found if key[0] == "nbdserve_build_info"]

    run(test)


def test_both_formats() -> None:
    async def test(made: Daemon) -> None:
        await made.catalogue.create_volume("web", SIZE)
        client = await Client.connect(made.nbd, "web")
        await client.call(TRIM, 0, SIZE)
        _, text, headers = await made.get("/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = {family.name for family in parse_text(text)}
        assert "# EOF" not in text
        _, text, headers = await made.get("/metrics", Accept=OPEN_METRICS)
        assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert text.endswith("# EOF\n")
        assert text.count("# EOF") == 1
        assert {family.name for family in parse_open(text)} == families
        client.close()

    run(test)


@pytest.mark.parametrize("accept", ["text/plain", OPEN_METRICS])
def test_slices_are_the_whole(monkeypatch: pytest.MonkeyPatch, accept: str) -> None:
    def families() -> list[Metric]:
        gauge = GaugeMetricFamily("a_b", "#\n# HELP of a", labels=["name"])
        for number in range(10):
            gauge.add_metric([f"#\n# TYPE {number}"], number)
        count = CounterMetricFamily("c", "C", labels=["name"])
        for number in range(3):
            count.add_metric([f"{number}"], number)
        return [gauge, GaugeMetricFamily("none", "None.", labels=["name"]), count]

    whole = asyncio.run(expose(families(), accept))
    monkeypatch.setattr(exposition, "MOST_SAMPLES", 3)
    assert asyncio.run(expose(families(), accept)) == whole


def test_health_says_why_not() -> None:
    async def test(made: Daemon) -> None:
        for path in ("/health", "/health/ready", "/health/live"):
            status, text, _ = await made.get(path)
            assert (status, json.loads(text)["status"]) == (200, "ok")
        store = made.state.store

        async def full() -> Space:
            return Space(1 << 20, 1 << 30)

        store.space = full  # type: ignore[method-assign]
        made.state.stopping.set()
        status, text, _ = await made.get("/health")
        assert status == 503
        assert json.loads(text) == {
            "status": "failing",
            "reasons": ["the daemon is stopping", "the disk is full: 1M are free"],
        }
        assert (await made.get("/health/live"))[0] == 200

    run(test)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (None, True), ("127.0.0.1:10810", True), ("10.1.2.3", True), ("[::1]:10810", True),
        ("localhost:1", True), ("LOCALHOST", True), ("storage.example.com:10810", True),
        ("storage.example.com.", True), ("evil.example", False), ("evil.example:10810", False),
        ("127.0.0.1.evil.example", False), ("", False), ("a:b:c", False), ("[evil]", False),
        ("localhost@evil", False),
    ],
)  # fmt: skip
def test_hosts(host: str | None, allowed: bool) -> None:
    assert is_allowed(host, frozenset({"localhost", "storage.example.com"})) is allowed


def test_strangers_names_other_methods_and_other_paths_are_refused() -> None:
    async def test(made: Daemon) -> None:
        assert (await made.get("/metrics", Host="storage.example.com:80"))[0] == 200
        for path in ("/metrics", "/health", "/nowhere"):
            status, text, _ = await made.get(path, Host="evil.example")
            assert status == 421
            assert "http_hosts" in text
        status, text, headers = await made.get("/nowhere")
        assert (status, text.count("\n")) == (404, 1)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Server"] == "nbdserve"
        async with aiohttp.ClientSession() as session:
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
                async with session.request(method, made.url + "/metrics", data=b"x") as answer:
                    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
            async with session.head(made.url + "/metrics") as answer:
                assert (answer.status, await answer.read()) == (200, b"")

    run(test)


def test_connections_that_say_nothing_keep_nobody_out() -> None:
    async def test(made: Daemon) -> None:
        host, port = made.url.removeprefix("http://").rsplit(":", 1)
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
        assert (await made.get("/health"))[0] == 200
        assert await silent[0][0].read() == b""  # the oldest made room
        _, writer = silent[-1]
        writer.write(b"\x00\xff not HTTP\r\n\r\n")
        assert (await silent[-1][0].read()).startswith(b"HTTP/1.")
        for _, writer in silent:
            writer.close()

    run(test)


def test_a_unix_socket_is_the_owners_and_goes_with_the_daemon() -> None:
    async def test(made: Daemon) -> None:
        path = made.state.host.data / "http.sock"
        http = HttpServer(made.state, UnixAddress(path))
        await http.start()
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, str(path))
            await loop.sock_sendall(client, b"GET /health HTTP/1.0\r\nHost: any.name\r\n\r\n")
            assert (await loop.sock_recv(client, 1000)).startswith(b"HTTP/1.0 200")
        await http.stop()
        assert not path.exists()

    run(test)


def test_volumes_are_looked_at_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: Daemon) -> None:
        looks = 0
        gate = asyncio.Event()
        real = made.catalogue.survey_volumes

        async def survey_volumes() -> object:
            nonlocal looks
            looks += 1
            await gate.wait()
            return await real()

        monkeypatch.setattr(made.catalogue, "survey_volumes", survey_volumes)
        monkeypatch.setattr("nbdserve.http.survey.PATIENCE", 0.05)
        await made.catalogue.create_volume("web", SIZE)
        survey = Survey(made.catalogue)
        assert await asyncio.gather(*(survey.look() for _ in range(10))) == [None] * 10
        gate.set()
        seen = await survey.look()
        assert seen is not None
        assert [info.name for info in seen.volumes] == ["web"]
        assert await survey.look() is seen
        assert looks == 1

    run(test)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("file:///srv/backups", "file:///srv/backups"),
        ("s3://key:secret@bucket/a?token=1#x", "s3://bucket/a"),
        ("s3://[::bad", "?"),
    ],
)
def test_repositories_are_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
