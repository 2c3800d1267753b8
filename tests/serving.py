"""A real server for tests: `millis serve` in a process of its own on a free port, and a plain HTTP client."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_S = 60.0
CHAT = "/v1/chat/completions"
QUICK = ("--threads", "1", "--max-batch-tokens", "64")  # a short warm-up


class Server:
    """`millis serve ARGUMENTS`, ready when the `with` block begins and gone when it ends. before: what starts it."""

    def __init__(
        self, model: Path, *arguments: str, key: str | None = None, before: Sequence[str] = (), **environment: str
    ) -> None:
        command = [
            *before,
            sys.executable,
            "-m",
            "millis",
            "serve",
            "-m",
            str(model),
            "--served-name",
            "m",
            "--port",
            "0",
            "--json",
        ]
        self.key = key
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        text = ""
        while line := self.process.stdout.readline():
            text += line
            if line.startswith("}"):
                break
        if not text:
            _, errors = self.process.communicate(timeout=LIMIT_S)
            raise AssertionError(errors)
        self.facts = json.loads(text)
        self.port = int(self.facts["url"].rsplit(":", 1)[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)  # the second does not wait for answers under way
        self.errors = self.process.communicate(timeout=LIMIT_S)[1]

    def connect(self, **headers: str) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), LIMIT_S)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body."""
        headers = {"content-type": "application/json", **(headers or {})}
        if self.key is not None:
            headers.setdefault("authorization", f"Bearer {self.key}")
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        status, _, data = self.ask(path, body, headers)
        return status, json.loads(data)

    def chat(self, text: str = "Say hello.", **fields: Any) -> tuple[int, Any]:
        return self.json(CHAT, chat(text, **fields))

    def stream(self, body: Any, path: str = CHAT) -> Iterator[Any]:
        """The events of a stream as they come."""
        connection = self.connect()
        try:
            headers = {"content-type": "application/json"}
            if self.key is not None:
                headers["authorization"] = f"Bearer {self.key}"
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a figure over the label values that are not given."""
        text = self.ask("/metrics")[2].decode()
        total = 0.0
        for found, value in re.findall(rf"^millis:{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE):
            if all(f'{key}="{label}"' in found for key, label in labels.items()):
                total += float(value)
        return total

    def workers(self, kind: str = "worker") -> list[int]:
        """The engine process, once it runs."""
        return workers(self.process.pid, kind)


def workers(pid: int, kind: str = "worker") -> list[int]:
    """The engine processes of a kind, by their module's name, that a server has started by now."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # it has ended meanwhile
            for child in (task / "children").read_text().split():
                if f"millis.server.{kind}\0".encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def random_bodies(count: int) -> Iterator[tuple[str, bytes]]:
    """(path, body): noise, and valid bodies with a value or a key replaced."""
    draw = random.Random(4)
    paths = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/classify", "/tokenize", "/detokenize"]
    values = [None, True, -1, 0, 1e308, 2**70, "", "\x00", "\ud800", "a" * 300, [], {}, [[]], {"a": {}}, [None], "null"]
    base = chat(max_tokens=1, stop=["x"], prompt="a", input="a", labels=["a", "b"], tokens=[1])
    for i in range(count):
        if i % 3 == 0:
            data = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        else:
            body = dict(base)
            for _ in range(draw.randrange(1, 4)):
                body[draw.choice([*base, "n", "tools", "seed", "response_format", "stream"])] = draw.choice(values)
            if draw.random() < 0.7:
                body = {key: value for key, value in body.items() if draw.random() < 0.6}
            data = json.dumps(body).encode()
        yield paths[i % len(paths)], data


def chat(text: str = "Say hello.", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **fields}


def until(condition: Callable[[], bool]) -> None:
    """Waits for what must come to be."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)
