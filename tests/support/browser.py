"""A headless Chromium that tests drive over the DevTools protocol, through a pipe.

Install it with `apt-get install chromium`. Its profile is a temporary directory, and it reaches no network.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot use
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
)


class BrowserTab:
    """A tab. Events of the page are kept in the order of arrival."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._out, self._in = os.fdopen(to_browser, "wb", buffering=0), os.fdopen(from_browser, "rb", buffering=0)
        self._rest, self._last_id, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command.

        Raises:
            RuntimeError: the browser refuses it.
        """
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read_message()).get("id") != self._last_id:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str, *, width: int, height: int = 900) -> None:
        """Loads a page in a window of this many CSS pixels, and waits until it is complete."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read_message())

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def save_download(self, act: Callable[[], None], folder: Path) -> Path:
        """The file that the page saves, when `act` has it do so."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        known = set(folder.iterdir())
        act()
        while not any(_ends_download(event) for event in self.events):
            self.events.append(self._read_message())
        (file,) = set(folder.iterdir()) - known
        return file

    def take_screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _read_message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._in.read(1 << 16)
            assert data, "the browser ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._out.close()
        self._in.close()


def _ends_download(event: dict[str, Any]) -> bool:
    is_progress = event.get("method") == "Browser.downloadProgress"
    assert not is_progress or event["params"]["state"] != "canceled", "the download was cancelled"
    return is_progress and event["params"]["state"] == "completed"


@contextmanager
def start_browser() -> Iterator[BrowserTab]:
    """A browser with one tab until the block ends."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "no Chromium is installed: apt-get install chromium"
    (theirs_in, to_browser), (from_browser, theirs_out) = os.pipe(), os.pipe()

    def place_pipes() -> None:
        spare = [os.dup(theirs_in), os.dup(theirs_out)]  # 3 and 4 may be these very pipes
        os.dup2(spare[0], 3)
        os.dup2(spare[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            preexec_fn=place_pipes,
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            tab = BrowserTab(to_browser, from_browser)
            yield tab
            tab.close()
            process.wait(30)
        finally:
            process.kill()
            process.wait()
