"""Headless Chromium, driven by the DevTools protocol; everything that a page asks the network for, or complains of, is kept."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = Path(__file__).parents[1] / "install.sh"
CHROMIUM = ("chromium", "chromium", "fonts-liberation")
"""A command, and the packages for it: a bare machine has no font for the pictures."""


def installed() -> str | None:
    """Chromium's command, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def unavailable() -> str | None:
    """Why there is no browser here; None: it is installed."""
    if installed():
        return None
    install = subprocess.run([INSTALL, *CHROMIUM], capture_output=True, text=True, check=False)
    return None if install.returncode == 0 else f"Chromium is not to be had: {install.stderr.strip()}"


class Page:
    """One page of a browser."""

    def __init__(self, url: str) -> None:
        self._socket = connect(url, max_size=None)
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol; events that arrive meanwhile are kept."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                return message["result"]
            self._keep(message)

    def _keep(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(parameters["entry"]))

    def run(self, script: str) -> Any:
        """Value of an expression; promises are awaited."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def open(self, file: Path) -> None:
        """Load a file and wait until it is drawn."""
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.drawn()

    def drawn(self, seconds: float = 60) -> None:
        """Wait until the page says that all charts are there."""
        end = time.monotonic() + seconds
        while self.run("document.body?.dataset.drawn") != "yes":
            assert time.monotonic() < end, f"not drawn after {seconds} s: {self.complaints}"
            time.sleep(0.05)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window's size and the colours that the system prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        with suppress(ConnectionClosed):
            self.call("Browser.close")
        self._socket.close()


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A started browser's page. It cannot reach a network: every host is resolved to nothing.

    Args:
        folder: empty; for the browser's profile.
    """
    command = [
        *(installed() or "chromium", "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-port=0", f"--user-data-dir={folder}"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "about:blank",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        page = Page(_page_url(folder, process))
        try:
            yield page
        finally:
            page.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()


def _page_url(folder: Path, process: subprocess.Popen, seconds: float = 60) -> str:
    """Address of the page's socket, asked of the browser's own."""
    port_file, end = folder / "DevToolsActivePort", time.monotonic() + seconds
    while not (port_file.is_file() and len(port_file.read_text().split()) == 2):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, f"no browser after {seconds} s: {(folder / 'log').read_text()}"
        time.sleep(0.05)
    port, path = port_file.read_text().split()
    with connect(f"ws://127.0.0.1:{port}{path}") as socket:
        socket.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
        while (answer := json.loads(socket.recv(timeout=30))).get("id") != 1:
            pass
    page = next(target for target in answer["result"]["targetInfos"] if target["type"] == "page")
    return f"ws://127.0.0.1:{port}/devtools/page/{page['targetId']}"
