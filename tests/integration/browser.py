"""Headless Chromium, driven over its DevTools protocol (JSON over a WebSocket)."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

from .parts import DIE_WITH_PARENT, require

PATIENCE = 60.0
"""Seconds to wait for anything that the page is to show."""

OPTIONS = (
    "--headless=new", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--hide-scrollbars", "--mute-audio", "--remote-debugging-port=0",
)  # fmt: skip


class ScriptError(AssertionError):
    """What was evaluated in the page threw something."""


class Browser:
    """One tab; ``problems`` are what the console would show as an error or a warning.

    ``requests`` are the URLs that were asked for.
    """

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._socket = socket
        self._session: str | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def begin(self) -> None:
        """Open the tab."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def end(self) -> None:
        """Stop listening."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = len(self._answers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        async with asyncio.timeout(PATIENCE):
            found = await answer
        assert "error" not in found, (method, found)
        result: dict[str, Any] = found["result"]
        return result

    async def open(self, url: str) -> None:
        """Go to a page, and return when it is loaded."""
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, awaited when it is a promise."""
        found = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise ScriptError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true, as JavaScript has it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not await self.evaluate(f"Boolean({condition})"):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                return
        shown = await self.evaluate("document.body.innerText")
        raise AssertionError(f"not true after {PATIENCE} seconds: {condition}\n{shown}")

    async def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, and which colours the user prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def press(self, key: str) -> None:
        """Press a key that writes nothing, such as Tab or ArrowRight."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowDown": 40}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    async def screenshot(self, file: Path) -> bytes:
        """Store what is seen as PNG."""
        found = await self.call("Page.captureScreenshot", format="png")
        content = base64.b64decode(found["data"])
        file.write_bytes(content)
        return content

    async def _read(self) -> None:
        async for message in self._socket:
            found = json.loads(message.data)
            if "id" in found:
                self._answers[found["id"]].set_result(found)
            else:
                self._note(found["method"], found["params"])

    def _note(self, event: str, said: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(said["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(said["args"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")


@contextlib.asynccontextmanager
async def browse() -> AsyncIterator[Browser]:
    """Start Chromium with a profile of its own, and end it."""
    require("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        process = await asyncio.create_subprocess_exec(
            *DIE_WITH_PARENT, "chromium", *OPTIONS, *sandbox,
            f"--user-data-dir={profile}/profile", "about:blank",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
            env={**os.environ, "HOME": profile, "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
        draining = None
        try:
            where = await _devtools(process)
            assert process.stderr is not None
            draining = asyncio.create_task(process.stderr.read())
            async with (
                ClientSession() as client,
                client.ws_connect(where, max_msg_size=0) as socket,
            ):
                browser = Browser(socket)
                try:
                    await browser.begin()
                    yield browser
                finally:
                    await browser.end()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            if draining is not None:
                await draining


async def _devtools(process: asyncio.subprocess.Process) -> str:
    """Where it says that it listens."""
    assert process.stderr is not None
    said = []
    async with asyncio.timeout(PATIENCE):
        while line := (await process.stderr.readline()).decode(errors="replace"):
            if line.startswith("DevTools listening on "):
                return line.split()[-1]
            said.append(line)
    raise AssertionError(f"chromium does not start:\n{''.join(said)}")
