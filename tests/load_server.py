"""A server that speaks OpenAI's API as a test tells it to: scripted answers, every request remembered."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MODELS = b'{"object": "list", "data": [{"id": "tiny"}]}'


@dataclass
class Request:
    line: str
    headers: dict[str, str]
    body: Any  # of JSON; None for GET
    connection: int  # which, counted from 0


Script = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """A response with a length."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(content: str, finish_reason: str | None = None, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": content} | more, "finish_reason": finish_reason}]}


def usage(prompt: int, completion: int) -> dict[str, object]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def stream(*values: object) -> bytes:
    """A whole streamed response, [DONE] included."""
    return HEAD + b"".join(chunk(event(value)) for value in (*values, b"[DONE]")) + LAST


def answer(request: Request, texts: tuple[str, ...] = ("One", " two", " three")) -> bytes:
    """What a good server says: a role, some text, the end, the usage of a tokenizer that counts words and adds ten."""
    words = len(str(request.body.get("messages") or request.body.get("prompt")).split())
    role = delta("", role="assistant")
    return stream(role, *map(delta, texts), delta("", "stop"), usage(10 + words, len(texts)))


async def good(request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(request))


class LoadServer:
    """Listens on a free port of 127.0.0.1. `requests` are those that came, without the lists of models."""

    def __init__(self, script: Script = good) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number, self.connections = self.connections, self.connections + 1
        try:
            while not writer.is_closing():
                request = await self._read(reader, number)
                if request.line.startswith("GET /v1/models"):
                    writer.write(whole(MODELS))
                else:
                    self.requests.append(request)
                    await self.script(request, writer)
                await writer.drain()
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, number: int) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:]) if name}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(head[0], headers, json.loads(body) if body else None, number)


@contextmanager
def running(*scripts: Script) -> Iterator[list[LoadServer]]:
    """Servers in a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = [LoadServer(script) for script in scripts or (good,)]
    try:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield servers
    finally:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
