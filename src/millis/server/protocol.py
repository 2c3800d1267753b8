"""HTTP/1.1 on uvicorn's httptools protocol, with what a server that trusts nobody needs besides.

Each request's scope gets a `Connection` under "millis": when its first byte arrived, and whom to call when its client
has gone. Slow senders, slow readers, headers without end and too many connections are cut off here, before any task
or slot is spent on them.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from millis.config import ServerConfig

REFUSAL = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"


@dataclass(slots=True)
class Connection:
    """What the application may know of the connection of a request. Times are time.monotonic() seconds."""

    arrival_s: float
    on_gone: Callable[[], None] | None = None  # called once when the client has gone before the answer was complete
    gone: bool = False


class Protocol(HttpToolsProtocol):
    """One connection. `settings` is set on a subclass; see `protocol_for`."""

    settings: ServerConfig

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._now = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._drain: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True
        self._open: list[RequestResponseCycle] = []  # begun or waiting for their turn
        if len(self.connections) > self.settings.max_connections:
            self._refuse("503 Service Unavailable", "overloaded", "too many connections; try again")
            return
        limit = self.settings.write_buffer_bytes
        self.transport.set_write_buffer_limits(high=limit)
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limit)
        self._arm(self.settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._drain is not None:
            self._drain.cancel()
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True  # uvicorn tells the last one only
                cycle.message_event.set()
                connection: Connection = cycle.scope["millis"]  # type: ignore[typeddict-item]
                connection.gone = True
                if connection.on_gone is not None:
                    connection.on_gone()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        if self._in_headers:
            self._header_bytes += len(data)
            if self._timer is None:
                self._arm(self.settings.header_timeout_s)
        self._unset_keepalive_if_required()
        self._parse(memoryview(data))
        if self._in_headers and self._header_bytes > self.settings.max_header_bytes and not self._closing:
            self._refuse("431 Request Header Fields Too Large", "headers_too_large", self._too_large)

    def _parse(self, data: memoryview) -> None:
        """Feeds the parser. A request that asks for another protocol is answered all the same (RFC 9110, 7.8).

        Java's HttpClient asks for HTTP/2 first. The parser leaves the body of such a request unread, so it gets the
        head once more, without the question.
        """
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    if not self._asks_upgrade:
                        return
                    headers = [b"%s: %s\r\n" % one for one in self.headers if one[0] != b"upgrade"]
                    head = b"%s %s HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
                    self.parser.feed_data(b"".join([head, *headers, b"\r\n"]))
        except httptools.HttpParserError:
            self.send_400_response("")

    @property
    def _asks_upgrade(self) -> bool:
        return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP; uvicorn would answer in plain text, and in the middle of an answer, too."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self._cut()
        elif not self._closing:
            self._refuse("400 Bad Request", "invalid_http", "this is no valid HTTP/1.1 request")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["millis"] = Connection(self._now)  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        if self._asks_upgrade:
            return
        self._in_headers = False
        total = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        if total > self.settings.max_header_bytes:
            self._refuse("431 Request Header Fields Too Large", "headers_too_large", self._too_large)
            return
        self._arm(self.settings.body_timeout_s)
        super().on_headers_complete()
        self._open = [cycle for cycle in self._open if not cycle.response_complete] + [self.cycle]

    def on_body(self, body: bytes) -> None:
        if not self._closing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._asks_upgrade:
            return
        self._disarm()
        self._in_headers, self._header_bytes = True, 0
        if not self._closing:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._drain is None:
            self._drain = self.loop.call_later(self.settings.drain_timeout_s, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None

    @property
    def _closing(self) -> bool:
        return self.transport.is_closing()

    @property
    def _too_large(self) -> str:
        return f"the request's headers exceed {self.settings.max_header_bytes} bytes; shorten them"

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        """The sender took too long. A connection on which nothing came is closed without a word."""
        self._timer = None
        if self._closing:
            return
        answered = not self._in_headers and self.cycle is not None and self.cycle.response_started
        if answered or (self._in_headers and not self._header_bytes):
            self._cut()
        else:
            self._refuse("408 Request Timeout", "request_timeout", "the request did not arrive in time; send it faster")

    def _cut(self) -> None:
        """Ends the connection now, whatever is unsent."""
        self.transport.abort()

    def _refuse(self, status: str, code: str, message: str) -> None:
        """Answers in the application's stead, and closes."""
        kind = "server_error" if status.startswith("5") else "invalid_request_error"
        body = f'{{"error":{{"message":"{message}","type":"{kind}","param":null,"code":"{code}"}}}}'.encode()
        self.transport.write(REFUSAL % (status.encode(), len(body), body))
        self.transport.close()


def protocol_for(settings: ServerConfig) -> type[Protocol]:
    """The protocol class of a server with these settings."""
    return type("Protocol", (Protocol,), {"settings": settings})


def connection_of(scope: Any) -> Connection:
    """The connection of a request; one that arrived just now where another server runs the application."""
    found = scope.get("millis")
    return found if isinstance(found, Connection) else Connection(time.monotonic())
