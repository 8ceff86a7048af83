"""The page in headless Chromium, over a daemon that has served real clients.

Each test looks at the console: nothing may be refused by the page's own policy, and nothing may be
asked of anybody but the daemon. ``NBDSERVE_SCREENSHOTS`` names a directory that keeps what was
seen.
"""

import asyncio
import base64
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserve.control.client import path

from .browser import Browser, browse
from .parts import GIB, KIB, MIB, Daemon, find_free_port, qemu_io, require

LABEL = "<img src=x onerror=\"document.title='label'\">"
REPOSITORY = "<b>repository<img src=x onerror=document.title='url'>"

# How many colours a picture has, and how much of it is of the most frequent one.
COLOURS = """
(async () => {
  const image = new Image();
  image.src = "data:image/png;base64,%s";
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer);
  const counts = new Map();
  for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
  return [counts.size, Math.max(...counts.values()) / pixels.length, image.width, image.height];
})()
"""

# The colours of the middle of each square of the map.
SQUARES = """
(() => {
  const canvas = document.querySelector(".map canvas");
  const found = new Map();
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] < 255) continue;
    const [red, green, blue] = data.slice(at, at + 3);
    const kind = red > blue + 60 ? "orange" : blue > red + 60 ? "blue" : "grey";
    found.set(kind, (found.get(kind) ?? 0) + 1);
  }
  return Object.fromEntries(found);
})()
"""


class Watched:
    """A daemon with the page, and the browser that looks at it."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.url = f"http://127.0.0.1:{port}/"

    @asynccontextmanager
    async def browse(self, where: str = "") -> AsyncIterator[Browser]:
        async with browse() as browser:
            await browser.resize(1280, 900)
            await browser.open(self.url + where)
            yield browser
            await browser.evaluate("1")  # what was said before this has come
            assert browser.problems == []
            strangers = [
                url for url in browser.requests if not url.startswith((self.url, "data:", "about:"))
            ]
            assert strangers == []


@pytest.fixture
def watched(start_daemon: Callable[..., Daemon], data_directory: Path) -> Watched:
    require("chromium")
    port = find_free_port()
    return Watched(start_daemon(data_directory, "--http", f"127.0.0.1:{port}", "--web"), port)


def fill(daemon: Daemon, directory: Path) -> str:
    """Give the daemon volumes, snapshots and a backup; return the repository's URL."""
    daemon.create("db-primary", GIB)
    daemon.create("__proto__", 64 * MIB)
    daemon.create("empty", 16 << 40)
    control = daemon.control()
    qemu_io(daemon, "db-primary", "write -P 1 0 192M", "write -P 1 300M 40M", "flush")
    daemon.take_snapshot("db-primary@installed")
    qemu_io(daemon, "db-primary", "write -P 2 128M 32M", "write -P 2 600M 8M", "flush")
    labels = {"ticket": LABEL}
    control.post(path("snapshots"), {"snapshots": ["db-primary@before-upgrade"], "labels": labels})
    qemu_io(daemon, "db-primary", "write -P 3 340M 16M", "flush")
    url = f"file://{directory}/{REPOSITORY}"
    daemon.command("repo", "init", url)
    daemon.command("backup", "db-primary", "--repo", url)
    qemu_io(daemon, "db-primary", "write -P 4 64M 6M", "write -P 4 900M 12M", "flush")
    return url


async def see(browser: Browser, name: str, tmp_path: Path) -> None:
    """Take a screenshot, which must not be blank, and keep it where that is asked for."""
    content = await browser.screenshot(tmp_path / f"{name}.png")
    colours, largest, width, height = await browser.evaluate(
        COLOURS % base64.b64encode(content).decode()
    )
    assert colours > 50, f"{name}: {colours} colours"
    assert largest < 0.97, f"{name}: {largest:.0%} is of one colour"
    assert await browser.evaluate("[innerWidth, innerHeight]") == [width, height]
    # Nothing is cut off at the side.
    assert await browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    kept = os.environ.get("NBDSERVE_SCREENSHOTS")
    if kept:
        shutil.copy(tmp_path / f"{name}.png", kept)


def test_a_volume_is_shown_as_it_is(watched: Watched, tmp_path: Path) -> None:
    daemon = watched.daemon
    url = fill(daemon, tmp_path)
    expected = daemon.control().get(path("volumes", "db-primary", "map", cells="1024"))
    assert expected["changed"] == 18 * MIB

    async def scene() -> None:
        async with watched.browse() as browser:
            await all_volumes(browser, url)
            # From here on with the keyboard alone.
            await browser.evaluate(
                "document.querySelector('#volumes tbody tr:nth-child(2) a').focus()"
            )
            await browser.press("Enter")
            await browser.until(
                "document.querySelector('.summary')?.textContent.includes('hold data')"
            )
            await one_volume(browser, expected, url)
            await see(browser, "volume", tmp_path)
            for name, width, height, dark in (
                ("dark", 1280, 900, True),
                ("phone", 390, 844, False),
            ):
                await browser.resize(width, height, dark=dark)
                await see(browser, f"volume-{name}", tmp_path)
            await browser.press("Escape")
            await browser.until("!document.getElementById('overview').hidden")
            focused = await browser.evaluate("document.activeElement.textContent")
            assert focused == "db-primary"
            await see(browser, "overview-phone", tmp_path)
            assert await browser.evaluate("document.title") == "nbdserve"

    asyncio.run(scene())


async def all_volumes(browser: Browser, url: str) -> None:
    """The first view."""
    await browser.until("document.querySelectorAll('#volumes tbody tr').length === 3")
    names = "[...document.querySelectorAll('#volumes tbody tr a')].map((a) => a.textContent)"
    assert await browser.evaluate(names) == ["__proto__", "db-primary", "empty"]
    cells = (
        "[...document.querySelectorAll('#volumes tr:nth-child(2) td')].map((d) => d.textContent)"
    )
    row = await browser.evaluate(cells)
    assert row[:3] == ["db-primary", "1 GiB", "268 MiB"]
    assert row[4:7] == ["4", "3", "0"]
    assert row[-1].endswith("ago")
    assert await browser.evaluate("document.getElementById('state').textContent") == "live"
    await browser.evaluate("filter.value = 'PROT'; filter.dispatchEvent(new Event('input')); null")
    assert await browser.evaluate(names) == ["__proto__"]
    await browser.evaluate("filter.value = 'x'; filter.dispatchEvent(new Event('input')); null")
    assert "No volume" in await browser.evaluate("document.getElementById('none').innerText")
    await browser.evaluate("filter.value = ''; filter.dispatchEvent(new Event('input')); null")
    await browser.evaluate("document.querySelectorAll('#volumes th button')[1].click()")
    assert await browser.evaluate(names) == ["empty", "db-primary", "__proto__"]
    assert await browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


async def one_volume(browser: Browser, expected: dict[str, Any], url: str) -> None:
    """The view of the volume that was filled."""
    text = await browser.evaluate("document.getElementById('volume').innerText")
    assert "268 MiB of 1 GiB hold data" in text
    assert "18 MiB were written since the last backup" in text
    assert expected["since"]["snapshot"] in text
    assert f"ticket={LABEL}" in text
    await browser.until("document.getElementById('volume').innerText.includes('Uploaded')")
    assert url in await browser.evaluate("document.getElementById('volume').innerText")
    # All of that is text: nothing of it has become a part of the page.
    assert await browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert await browser.evaluate("document.title") == "db-primary \u2013 nbdserve"
    layers = await browser.evaluate(
        "[...document.querySelectorAll('.chain > li b')].map((node) => node.textContent)"
    )
    base = expected["since"]["snapshot"]
    assert layers == ["head", f"up to @{base}", "up to @before-upgrade", "up to @installed"]
    kinds = await browser.evaluate(SQUARES)
    assert kinds["blue"] > kinds["orange"] > 500
    assert kinds["grey"] > kinds["blue"]
    # The keys move over the squares, of 1 MiB each.
    await browser.evaluate("document.querySelector('.map canvas').focus()")
    await browser.press("ArrowRight")
    said = "document.querySelector('.said').textContent"
    first = await browser.evaluate(said)
    assert (
        first == "0 B \u2013 1 MiB: 1 MiB of data (100 %), all in the layer of snapshot installed"
    )
    for _ in range(64):
        await browser.press("ArrowRight")
    assert await browser.evaluate(said) == (
        "64 MiB \u2013 65 MiB: 1 MiB of data (100 %), all in the head; 1 MiB since the last backup"
    )
    columns = await browser.evaluate(
        "(() => { const c = document.querySelector('.map canvas'); return c.clientWidth; })()"
    )
    assert columns > 500


def write_until(daemon: Daemon, volume: str, enough: threading.Event) -> None:
    """Be a client that reads, writes and flushes."""
    while not enough.is_set():
        qemu_io(daemon, volume, *("write -q -P 7 1M 64k", "read -q 0 2M", "flush") * 20)


def test_what_goes_on_is_shown(watched: Watched, tmp_path: Path) -> None:
    daemon = watched.daemon
    daemon.create("busy", 64 * MIB)
    job = {"kind": "push", "volume": "busy", "snapshot": "s", "repository": "s3://<i>b</i>/p"}

    async def scene() -> None:
        async with watched.browse("#volume/busy") as browser:
            await browser.until("document.querySelector('h1')?.textContent === 'busy'")
            none = "No client has asked for anything lately."
            await browser.until(f"document.getElementById('volume').innerText.includes('{none}')")
            enough = threading.Event()
            writing = asyncio.create_task(asyncio.to_thread(write_until, daemon, "busy", enough))
            try:
                keys = "document.querySelector('#volume .keys').innerText"
                await browser.until(f"/writes [0-9.]+ [mµ]?s/.test({keys})")
                said = "document.getElementById('volume').innerText"
                await browser.until(f"/IOPS · read .*written .*p99/.test({said})")
            finally:
                enough.set()
                await writing
            claim = daemon.control().stream("POST", path("jobs"), job)
            with claim:
                number = claim.first()["job"]
                daemon.control().post(path("jobs", number), {"done": 30 * KIB, "total": 40 * KIB})
                await browser.until(
                    "document.querySelector('[role=progressbar][aria-valuenow=\"75\"]')"
                )
                text = await browser.evaluate("document.querySelector('#volume .work').innerText")
                assert text.startswith("push busy@s → s3://<i>b</i>/p\n\n30 KiB of 40 KiB, 75 %")
                await browser.evaluate("location.hash = ''")
                await browser.until("document.querySelector('#progress .work')")
                await browser.resize(1280, 1100)
                await see(browser, "overview", tmp_path)
            # The command ended without a word: that is a failed backup.
            await browser.until("document.getElementById('warnings').innerText.includes('busy')")
            await browser.until("document.getElementById('progress').hidden")

    asyncio.run(scene())


def test_a_daemon_that_is_gone_is_missed_and_found_again(watched: Watched) -> None:
    daemon = watched.daemon
    daemon.create("a", MIB)

    async def scene() -> None:
        async with watched.browse() as browser:
            await browser.until("document.getElementById('state').className === 'live'")
            await asyncio.to_thread(daemon.stop)
            text = "document.getElementById('gone').innerText"
            await browser.until(f"{text}.includes('has not answered since')")
            assert (
                await browser.evaluate("document.getElementById('state').innerText") == "no answer"
            )
            # What was seen last is still there.
            assert (
                await browser.evaluate("document.querySelectorAll('#volumes tbody tr').length") == 1
            )
            daemon.start()  # not in a thread, whose end would be its own
            await browser.until("document.getElementById('state').className === 'live'")
            assert await browser.evaluate("document.getElementById('gone').hidden")
            await browser.evaluate("location.hash = '#volume/no-such'")
            await browser.until("document.body.innerText.includes('There is no volume no-such')")
            await browser.evaluate("location.hash = '#volume/%'")
            await browser.until("!document.getElementById('overview').hidden")
            # A refused connection is the one thing that the console may have said.
            browser.problems = [
                line for line in browser.problems if "net::ERR_CONNECTION_REFUSED" not in line
            ]

    asyncio.run(scene())


MODULES = """
(async () => {
  const { quantile, Measurements } = await import("/page/measurements.js");
  const { List, element, setText } = await import("/page/dom.js");
  const format = await import("/page/format.js");
  const found = {};
  const bounds = [0.001, 0.01, 0.1];
  found.quantiles = [
    quantile([0, 0, 0, 0], bounds, 0.99), quantile([10, 0, 0, 0], bounds, 0.5),
    quantile([0, 100, 0, 0], bounds, 0.99), quantile([99, 0, 1, 0], bounds, 0.99),
    quantile([0, 0, 0, 5], bounds, 0.5),
  ];
  const reading = (uptime, count) => ({
    uptime, bounds,
    exports: [{ volume: "__proto__", snapshot: null, commands: {
      read: { count, bytes: 4096 * count, buckets: [0, count, 0, 0] } } }],
  });
  const measured = new Measurements();
  const rates = () => [measured.total, measured.volumes.get("__proto__") ?? null];
  measured.take(reading(10, 100));
  found.first = rates();
  measured.take(reading(14, 300));
  found.second = rates();
  measured.take(reading(16, 200)); // went back: counted anew
  found.third = rates()[1];
  measured.take(reading(1, 5)); // another daemon
  found.restarted = rates();
  // A thousand rows that say the same again change nothing in the document.
  const parent = element("ol");
  document.body.append(parent);
  const items = [...Array(1000).keys()].map((number) => ({ name: `volume-${number}`, number }));
  const list = new List(parent, (item) => item.name, () => element("li"),
    (node, item) => setText(node, `${item.name} ${item.number}`));
  list.show(items);
  let changes = 0;
  const observer = new MutationObserver((records) => { changes += records.length; });
  const all = { childList: true, subtree: true, characterData: true, attributes: true };
  observer.observe(parent, all);
  list.show(items);
  changes += observer.takeRecords().length;
  found.same = changes;
  items[500].number = -1;
  list.show(items);
  found.one = observer.takeRecords().length;
  list.show(items.slice(10, 20).reverse());
  found.order = [...parent.children].map((node) => node.textContent);
  parent.remove();
  found.bytes = [0, 1023, 1024, 1536, 1024 ** 2 - 1, 5.25 * 1024 ** 3, 16 * 1024 ** 4, null]
    .map(format.bytes);
  found.counts = [0, 0.25, 9.999, 10, 9999, 12345, 5e6].map(format.count);
  found.latencies = [0, 2.5e-5, 9.9996e-4, 0.0123, 0.9999, 30].map(format.latency);
  found.durations = [0, 59, 60, 3599, 3600, 90000].map(format.duration);
  return found;
})()
"""


def test_the_numbers_are_right(watched: Watched) -> None:
    async def scene() -> None:
        async with watched.browse() as browser:
            found = await browser.evaluate(MODULES)
            assert found["quantiles"] == pytest.approx([None, 0.0005, 0.00991, 0.001, 0.1])
            assert found["first"] == [None, None]
            total, volume = found["second"]
            assert total == volume
            assert (volume["iops"], volume["read"], volume["write"]) == (50, 50 * 4096, 0)
            assert volume["p99"] == pytest.approx(0.001 + 0.009 * 0.99)
            assert volume["latencies"]["write"] is None
            assert found["third"] is None
            assert found["restarted"] == [None, None]
            assert (found["same"], found["one"]) == (0, 1)
            assert found["order"] == [f"volume-{n} {n}" for n in range(19, 9, -1)]
            assert found["bytes"] == [
                "0 B", "1023 B", "1 KiB", "1.5 KiB", "1 MiB", "5.25 GiB", "16 TiB", "\u2013",
            ]  # fmt: skip
            assert found["counts"] == ["0", "0.25", "10", "10", "9999", "12.3 k", "5 M"]
            assert found["latencies"] == ["0 µs", "25 µs", "1 ms", "12.3 ms", "1 s", "30 s"]
            assert found["durations"] == ["0 s", "59 s", "1 min", "59 min", "1 h 0 min", "1 d 1 h"]

    asyncio.run(scene())
