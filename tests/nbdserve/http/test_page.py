"""The page's files and its questions, as a browser and as somebody hostile sees them."""

import asyncio
import re
import tomllib
from collections.abc import Callable, Coroutine
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout
from aiohttp.test_utils import TestServer

from backends.local_layers import LocalLayerStore
from nbdserve.control.server import build_application
from nbdserve.control.state import Host, State
from nbdserve.http import page
from nbdserve.http.page import AT_A_TIME, MOST_WAITING
from nbdserve.http.server import build_application as build_http_application
from snapshots.catalogue import Catalogue

PROJECT = Path(__file__).resolve().parents[3]
FILES = sorted(file.name for file in resources.files("nbdserve.http").joinpath("page").iterdir())
MIB = 1 << 20
POLICY = "default-src 'none'; frame-ancestors 'none'"

Scene = Callable[[Catalogue, ClientSession, ClientSession], Coroutine[Any, Any, None]]


def serve(tmp_path: Path, scene: Scene) -> None:
    """Run ``scene(catalogue, page, control)`` with clients of both applications."""

    async def main() -> None:
        store = LocalLayerStore(tmp_path / "data")
        catalogue = await Catalogue.open(store)
        state = State(catalogue, store, Host(tmp_path / "data", daemon=True))
        application = build_http_application(state, {"storage.example.com"}, page=True)
        timeout = ClientTimeout(60)
        try:
            async with (
                TestServer(application) as one,
                TestServer(build_application(state)) as other,
                ClientSession(one.make_url("/"), timeout=timeout) as client,
                ClientSession(other.make_url("/"), timeout=timeout) as control,
            ):
                await scene(catalogue, client, control)
        finally:
            await catalogue.close()

    asyncio.run(main())


def test_every_file_is_served_and_nothing_else(tmp_path: Path) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        for name in FILES:
            where = "/" if name == "index.html" else f"/page/{name}"
            async with client.get(where) as answer:
                content = await answer.read()
                assert (answer.status, answer.content_type) == (200, types[Path(name).suffix])
                source = resources.files("nbdserve.http").joinpath("page", name)
                assert content == source.read_bytes()
                policy = answer.headers["Content-Security-Policy"].split("; ")
                assert policy[0] == "default-src 'none'"
                assert {"script-src 'self'", "frame-ancestors 'none'"} < set(policy)
                assert not any("unsafe" in rule or "*" in rule for rule in policy)
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Cache-Control"] == "no-cache"
                tag = answer.headers["ETag"]
            async with client.get(where, headers={"If-None-Match": tag}) as answer:
                assert (answer.status, await answer.read()) == (304, b"")
            async with client.get(where, headers={"If-None-Match": '"other"'}) as answer:
                assert answer.status == 200
            async with client.post(where) as answer:
                assert answer.status == 405
        for where in ("/page/", "/page/index.html", "/page/..%2fpage.py", "/page/../page.py", "/x"):
            async with client.get(where) as answer:
                assert answer.status == 404

    serve(tmp_path, scene)


def test_the_files_name_each_other_and_nobody_else() -> None:
    for name in FILES:
        text = resources.files("nbdserve.http").joinpath("page", name).read_text()
        assert "http://www.w3.org/2000/svg" in text or "://" not in text, name
        found = re.findall(r'(?:src|href)="([^"#]+)"|from "([^"]+)"|import "([^"]+)"', text)
        for where in (Path("".join(groups)) for groups in found):
            if not str(where).startswith("data:"):
                assert where.name in FILES, (name, where)
        # What users chose gets into the document as text alone.
        risky = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|srcdoc"
        assert not re.search(risky, text), name


def test_the_distribution_has_every_file() -> None:
    configuration = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    patterns = configuration["tool"]["setuptools"]["package-data"]["nbdserve.http"]
    for name in FILES:
        assert any(fnmatch(f"page/{name}", pattern) for pattern in patterns), name


def test_the_documents_are_those_of_the_control_socket(tmp_path: Path) -> None:
    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        await catalogue.create_volume("__proto__", 16 * MIB)
        await catalogue.create_volume("b", MIB)
        labels = {"backup": "r", "<b>": "\"'><script>alert(1)</script>"}
        await catalogue.create_snapshots([("b", "s")], labels)
        for path in (
            "volumes",
            "volumes/b",
            "volumes/__proto__",
            "volumes/b/map?cells=7",
            "volumes/b/snapshots",
            "status",
            "measurements",
        ):
            async with client.get(f"/api/{path}") as one, control.get(f"/v1/{path}") as other:
                assert one.status == other.status == 200, path
                assert settled(await one.json()) == settled(await other.json())
                assert one.headers["Cache-Control"] == "no-store"
                assert one.headers["Content-Security-Policy"] == POLICY
                assert one.headers["X-Content-Type-Options"] == "nosniff"
                assert "Access-Control-Allow-Origin" not in one.headers

    serve(tmp_path, scene)


def settled(document: Any) -> Any:
    """A document without what changes by itself: time, and space that is given back."""
    if isinstance(document, dict):
        return {
            key: settled(value)
            for key, value in document.items()
            if key not in {"uptime", "disk", "own", "shared", "free", "used"}
        }
    return [settled(value) for value in document] if isinstance(document, list) else document


def test_nothing_can_be_changed(tmp_path: Path) -> None:
    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        await catalogue.create_volume("a", MIB)
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("status", "volumes", "volumes/a", "volumes/a/map", "volumes/a/snapshots"):
                async with client.request(method, f"/api/{path}", json={}) as answer:
                    assert answer.status == 405
        assert catalogue.volume_names() == ["a"]
        for path in ("check", "backups", "imports", "volumes/a/resize", "volumes/a/rollback"):
            async with client.post(f"/api/{path}", json={}) as answer:
                assert answer.status == 405
            async with client.get(f"/api/{path}") as answer:
                assert answer.status == 404

    serve(tmp_path, scene)


def test_a_page_of_a_stranger_reads_nothing(tmp_path: Path) -> None:
    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        for host, status in (("Storage.example.com:80", 200), ("evil.example", 421)):
            for path in ("/", "/page/main.js", "/api/status"):
                async with client.get(path, headers={"Host": host}) as answer:
                    assert answer.status == status
                    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"

    serve(tmp_path, scene)


def test_it_is_not_there_unless_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalLayerStore(tmp_path / "data")
        catalogue = await Catalogue.open(store)
        state = State(catalogue, store, Host(tmp_path / "data", daemon=True))
        async with (
            TestServer(build_http_application(state, None)) as server,
            ClientSession(server.make_url("/")) as client,
        ):
            for path in ("/", "/page/main.js", "/api/status"):
                async with client.get(path) as answer:
                    assert answer.status == 404
        await catalogue.close()

    asyncio.run(main())


def test_refusals_are_one_line(tmp_path: Path) -> None:
    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        await catalogue.create_volume("a", MIB)
        for path, status, line in (
            ("volumes/b", 404, "volume b does not exist"),
            ("volumes/b/map", 404, "volume b does not exist"),
            ("volumes/a/map?cells=0", 400, "a map has 1 to 4096 cells, not 0"),
            ("volumes/a/map?cells=1e3", 400, "'cells' must be a whole number"),
        ):
            async with client.get(f"/api/{path}") as answer:
                assert (answer.status, (await answer.json())["error"]) == (status, line)

    serve(tmp_path, scene)


def test_what_is_asked_at_a_time_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        await catalogue.create_volume("a", MIB)
        going_on = asyncio.Event()
        mapping, begun = catalogue.map_volume, []

        async def held(*arguments: Any) -> Any:
            begun.append(arguments)
            await going_on.wait()
            return await mapping(*arguments)

        monkeypatch.setattr(catalogue, "map_volume", held)

        async def ask() -> int:
            async with client.get("/api/volumes/a/map") as answer:
                await answer.read()
                return answer.status

        asked = [asyncio.ensure_future(ask()) for _ in range(AT_A_TIME + MOST_WAITING)]
        while len(begun) < AT_A_TIME:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            while await ask_status(client) != 503:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # Whoever leaves does not make room for more work while his own goes on.
        asked[0].cancel()
        await asyncio.sleep(0.1)
        assert len(begun) == AT_A_TIME
        going_on.set()
        done = await asyncio.gather(*asked[1:])
        assert set(done) == {200}
        assert await ask_status(client) == 200

    serve(tmp_path, scene)


def test_many_who_look_cost_as_much_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LEAST_SECONDS", 0.2)

    async def scene(catalogue: Catalogue, client: ClientSession, control: ClientSession) -> None:
        surveyed, survey = [], catalogue.survey_volumes

        async def counted() -> Any:
            surveyed.append(1)
            await asyncio.sleep(0.01)
            return await survey()

        monkeypatch.setattr(catalogue, "survey_volumes", counted)

        async def names() -> list[str]:
            async with client.get("/api/volumes") as answer:
                assert answer.status == 200
                return [found["name"] for found in (await answer.json())["volumes"]]

        assert await asyncio.gather(*(names() for _ in range(15))) == [[]] * 15
        assert len(surveyed) == 1
        await catalogue.create_volume("a", MIB)
        async with asyncio.timeout(30):
            while await names() != ["a"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(surveyed) == 2

    serve(tmp_path, scene)


async def ask_status(client: ClientSession) -> int:
    """The status of an answer that comes at once, 0 when it has to be waited for."""
    try:
        async with asyncio.timeout(0.5), client.get("/api/volumes/a") as answer:
            return answer.status
    except TimeoutError:
        return 0
