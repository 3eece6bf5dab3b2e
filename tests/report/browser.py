"""A headless Chromium, driven over a pipe by its own DevTools protocol.

python -m tests.report.browser PAGE.html PICTURE.png --width 360 --scheme dark --from map --height 800
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()
TIMEOUT_S = 60


def chromium() -> str | None:
    """The browser's path."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def installed() -> str:
    """Install Chromium where it is missing and that can be done; returns why it is not there, or nothing."""
    if chromium():
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "Chromium is not installed (Debian: chromium), and only root with apt can install it"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update",), ("install", "-y", "--no-install-recommends", "chromium")):
        command = ("apt-get", "-o", "Acquire::Retries=0", *words)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired:
            return f"Chromium is not installed, and apt-get {words[0]} did not end in 180 s"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            return f"Chromium is not installed, and apt-get {words[0]} failed: {last}"
    return "" if chromium() else "Chromium is not installed: apt-get brought no command of its name"


class Browser:
    """One tab. `requests` and `complaints` are all that the page asked for, and all that the console said."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Load a file at a width in CSS pixels."""
        self.requests.clear()
        self.complaints.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def each(self, selector: str, expression: str) -> list[Any]:
        """A JavaScript expression of each element `e` that a CSS selector finds, in the page's order."""
        found = f"document.querySelectorAll({json.dumps(selector)})"
        return self.value(f"[...{found}].map((e) => {expression})")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        until = time.monotonic() + TIMEOUT_S
        while not self.value(condition):
            assert time.monotonic() < until, f"{condition} was not true in {TIMEOUT_S} s"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key, as the keyboard gives it."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path: Path, *, width: int, top: int = 0, height: int) -> None:
        """A part of the page as PNG or WebP, as the name ends."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        kind = path.suffix.removeprefix(".")
        data = self.call("Page.captureScreenshot", format=kind, clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], TIMEOUT_S)
            assert ready, f"Chromium said nothing for {TIMEOUT_S} s"
            block = os.read(self._answers, 1 << 20)
            assert block, "Chromium ended"
            self._buffer += block
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        method, about = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(about["args"]))


@contextmanager
def started() -> Iterator[Browser]:
    """A browser with a profile of its own, ended at the end."""
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and writes to 4; the shell puts the pipes there.
        script = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        words = [chromium(), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            ["bash", "-c", script, *words],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Browser(commands, answers)
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
            os.close(commands)
            os.close(answers)


def main() -> None:
    """Draw a page, or the part of it from a section on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--height", type=int, help="of the picture (default: to the page's end)")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--from", dest="section", help="id of the heading to begin at")
    words = parser.parse_args()
    with started() as browser:
        browser.open(words.page, width=words.width, scheme=words.scheme)
        browser.value("document.getElementById('scatter')?.focus({preventScroll: true})")  # shows an image
        found = f"document.getElementById({json.dumps(words.section)}).getBoundingClientRect().top + scrollY"
        top = round(browser.value(found)) if words.section else 0
        height = words.height or browser.value("document.documentElement.scrollHeight") - top
        browser.picture(words.picture, width=words.width, top=top, height=height)


if __name__ == "__main__":
    main()
