"""A headless Chromium over its debugging pipe, with the standard library alone.

`python tests/support/browser.py PAGE PICTURE [WIDTH HEIGHT]` takes a screenshot of a page's first screen.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PATIENCE = 120.0
PIPES = (3, 4)  # where Chromium reads and writes with --remote-debugging-pipe


def find_browser() -> str | None:
    """Path of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One open page: what it asked the network for and what it complained about, so far."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    loaded: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        return self.browser.call(method, self.session, **parameters)

    def open(self, file: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load `file` in a window of `width` by `height` CSS pixels; up to 500 wide it is a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        before = self.loaded
        self.call("Page.bringToFront")  # pages behind others are not drawn
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.browser.wait(lambda: self.loaded > before)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; the page itself need not allow scripts."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, whole: bool = False) -> bytes:
        """The window, or the whole page, as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def hear(self, method: str, told: dict[str, Any]) -> None:
        """Take an event in."""
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(told))


class Browser:
    """A running Chromium with a profile of its own in `folder`."""

    def __init__(self, program: str, folder: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        spare = [fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (commands, answers)]

        def connect() -> None:
            for end, place in zip(spare, PIPES, strict=True):
                os.dup2(end, place)

        arguments = [program, *FLAGS, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=connect,
            pass_fds=PIPES,
        )
        for end in (commands, answers, *spare):
            os.close(end)
        self._number, self._buffer = 0, b""
        self._replies: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def new_page(self) -> Page:
        """An empty page that listens to network, console and log."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Network", "Log", "Runtime"):
            page.call(f"{domain}.enable")
        return page

    def call(self, method: str, session: str = "", /, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its reply."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        self.wait(lambda: number in self._replies)
        reply = self._replies.pop(number)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def wait(self, done: Any) -> None:
        """Take in what the browser says until `done()`."""
        end = time.monotonic() + PATIENCE
        while not done():
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser is silent"
            block = os.read(self._answers, 1 << 16)
            assert block, "the browser has ended"
            *whole, self._buffer = (self._buffer + block).split(b"\0")
            for message in map(json.loads, whole):
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._replies[message["id"]] = message
        elif message.get("sessionId") in self._pages:
            self._pages[message["sessionId"]].hear(message["method"], message["params"])


def _screenshot(page: str, picture: str, width: str = "1200", height: str = "900") -> None:
    program = find_browser()
    assert program is not None, "no Chromium on this machine"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(program, Path(folder))
        opened = browser.new_page()
        opened.open(Path(page), int(width), int(height))
        Path(picture).write_bytes(opened.screenshot())
        browser.close()


if __name__ == "__main__":
    _screenshot(*sys.argv[1:])
