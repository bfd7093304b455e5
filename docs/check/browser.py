"""Headless Chromium, spoken to over two pipes in its own protocol: nothing to install but the browser."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"]
WAIT = 60.0
"""Seconds in which a page must have loaded."""
HIGHEST = 16_000
"""Pixels of a picture; Chromium makes none that is higher than 16,384."""


class Page:
    """One page in a browser of its own; closed with it.

    Attributes:
        heard: errors and warnings that the page's console had, and requests that left the machine or failed.
    """

    def __init__(self, executable: str) -> None:
        self.heard: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # the browser may still write
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        os.set_inheritable(to_read, True), os.set_inheritable(to_write, True)

        def wire() -> None:  # the browser reads from 3 and writes to 4
            os.dup2(to_read, 13), os.dup2(to_write, 14)
            os.dup2(13, 3), os.dup2(14, 4)

        command = [
            executable,
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, close_fds=False, preexec_fn=wire, stdout=quiet, stderr=quiet)
        os.close(to_read), os.close(to_write)
        self._count, self._rest, self._session, self._loaded = 0, b"", "", False
        target = next(each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, command: str, **parameters: Any) -> Any:
        """What the browser answers; events in between are heard."""
        self._count += 1
        message = {"id": self._count, "method": command, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._event(answer)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']['message']}")
        return answer["result"]

    def open(self, address: str) -> None:
        """Load a page, until its scripts have run."""
        self._loaded = False
        self.ask("Page.navigate", url=address)
        while not self._loaded:
            self._event(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def size(self, width: int, height: int) -> None:
        """Of the window, in pixels; below 600 a phone's."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def scheme(self, name: str) -> None:
        """What the system prefers: "light" or "dark"."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key: str, code: int) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Text, to where the focus is."""
        self.ask("Input.insertText", text=text)

    def picture(self, file: Path, whole: bool = False) -> None:
        """What is to be seen; or the whole page, as much of it as a picture can hold."""
        parameters: dict[str, Any] = {"captureBeyondViewport": whole}
        if whole:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            tall = min(size["height"], HIGHEST)
            parameters["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": tall, "scale": 1}
        found = self.ask("Page.captureScreenshot", **parameters)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)
        self._profile.cleanup()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _event(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        kind = event.get("method")
        if kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Runtime.exceptionThrown":
            self.heard.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.heard.append(" ".join(str(each.get("value", each.get("description"))) for each in told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.heard.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif kind == "Network.requestWillBeSent" and told["request"]["url"].startswith(("http:", "https:")):
            self.heard.append(f"asks the network for {told['request']['url']}")
