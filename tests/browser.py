"""Chromium without a window, driven over a pipe by the DevTools protocol: what a person at a page does and sees."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowLeft": (37, ""),
    "End": (35, ""),
    "Home": (36, ""),
}


def find_chromium() -> str | None:
    """Its path; None: this machine has none."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


class Browser:
    """One process of Chromium with a fresh profile in `folder`, gone when the `with` block ends."""

    def __init__(self, folder: Path, program: str) -> None:
        read_commands, self._commands = map(_high, os.pipe())
        self._events, write_events = map(_high, os.pipe())
        script = f'exec "$@" 3<&{read_commands} 4>&{write_events} {read_commands}<&- {write_events}>&-'
        command = ["bash", "-c", script, "bash", program, *FLAGS, f"--user-data-dir={folder}"]
        with open(folder / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(
                command, pass_fds=(read_commands, write_events), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        os.close(read_commands)
        os.close(write_events)
        self._rest, self._number = b"", 0
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._commands)  # Chromium ends when its pipe does
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._events)

    def page(
        self, url: str, *, width: int = 1280, height: int = 860, language: str = "en-US", scheme: str = "light"
    ) -> Page:
        """A tab with cookies and storage of its own that has loaded `url`."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        agent = self.call("Browser.getVersion")["userAgent"]
        page.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        page.scheme(scheme)
        page.go(url)
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command. AssertionError: Chromium refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._waiting.append(answer)

    def events(self, session: str) -> list[dict[str, Any]]:
        """What a page has told since the last call."""
        found = [event for event in self._waiting if event.get("sessionId") == session]
        self._waiting = [event for event in self._waiting if event.get("sessionId") != session]
        return found

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + LIMIT_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._events], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._events, 1 << 20) if ready else b""
            assert data, "Chromium ended or does not answer; its words are in chromium.log of the profile's folder"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


def _high(descriptor: int) -> int:
    """The same file under a number that is neither 3 nor 4: those are Chromium's."""
    found = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return found


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.requests: list[str] = []
        self.bodies: list[str] = []  # of the requests that had one
        self.problems: list[str] = []
        self._canned: dict[str, Any] = {}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        result = self._browser.call(method, self._session, **parameters)
        for event in self._browser.events(self._session):
            self._note(event["method"], event["params"])
        return result

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
            if "postData" in told["request"]:
                self.bodies.append(told["request"]["postData"])
        elif method == "Fetch.requestPaused":
            self.call("Fetch.fulfillRequest", requestId=told["requestId"], **self._canned)
        elif method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(str([argument.get("value") for argument in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def go(self, url: str) -> None:
        """Loads a page and waits until it has loaded."""
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def answer(self, path: str, status: int, headers: dict[str, str], body: bytes) -> None:
        """From now on, requests for `path` get this answer instead of the server's."""
        listed = [{"name": name, "value": value} for name, value in headers.items()]
        text = base64.b64encode(body).decode()
        self._canned = {"responseCode": status, "responseHeaders": listed, "body": text}
        self.call("Fetch.enable", patterns=[{"urlPattern": f"*{path}"}])

    def close(self) -> None:
        """Ends the tab."""
        self.call("Page.close")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited. AssertionError: it throws."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"].get("exception", result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + LIMIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}\n{self.problems}\n{self.text('body')[:2000]}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """The text of the first element, as it is seen."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def count(self, selector: str) -> int:
        return int(self.run(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element, wherever that is; what lies above it gets the click."""
        spot = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'nearest'});"
            "const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=spot[0], y=spot[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    def choose(self, selector: str, value: str | int) -> None:
        """Sets a field, and tells the page as a person's choice would."""
        self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, { bubbles: true })); })()"
        )

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
