"""An HTTP/1.1 client that notes when bytes arrive and does nothing else meanwhile: what they say is read afterwards."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from millis.bench.serve_wire import Exchange, Server

HEAD_LIMIT = 64 << 10  # bytes before the headers of an answer end
BODY_LIMIT = 8 << 20  # bytes of an answer
Clock = Callable[[], float]


class Client:
    """Sends requests to one server over connections that it keeps open. One loop, no thread, no retry of an answer.

    `limit` bounds the connections; a request beyond them waits, and its latency grows by that. Every request ends, by
    an answer or by an error, within `timeout_s` of being handed over.
    """

    def __init__(self, server: Server, *, limit: int = 512, timeout_s: float = 30.0, clock: Clock = time.perf_counter):
        self.server, self.limit, self.timeout_s, self.clock = server, limit, timeout_s, clock
        self.loop = asyncio.get_running_loop()
        self.pending: set[Exchange] = set()
        self.waited = 0  # requests that found no connection free
        self.on_end: Callable[[Exchange], None] = lambda exchange: None
        self._timers: dict[Exchange, asyncio.TimerHandle] = {}
        self._idle: list[Connection] = []  # the warmest last
        self._busy: dict[Exchange, Connection] = {}
        self._waiting: deque[Exchange] = deque()
        self._connecting: dict[Exchange, asyncio.Task[None]] = {}
        self._drained = asyncio.Event()

    def send(self, exchange: Exchange) -> None:
        """Hands a request over; `on_end` is called with it when it has ended."""
        self.pending.add(exchange)
        self._drained.clear()
        self._timers[exchange] = self.loop.call_later(self.timeout_s, self._time_out, exchange)
        self._place(exchange)

    async def ask(self, exchange: Exchange) -> Exchange:
        """One request, to its end."""
        self.send(exchange)
        await self.drained()
        return exchange

    async def drained(self) -> None:
        """Returns when every request handed over has ended."""
        while self.pending:
            await self._drained.wait()

    async def close(self) -> None:
        """Ends every connection; requests under way end with the error `cancelled`."""
        for exchange in list(self.pending):
            self.end(exchange, "cancelled")
        tasks = list(self._connecting.values())
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def end(self, exchange: Exchange, error: str | None) -> None:
        """Of the connections: this exchange has ended."""
        if exchange not in self.pending:
            return
        self.pending.remove(exchange)
        exchange.error, exchange.end_s = error, exchange.end_s if error is None else self.clock()
        self._timers.pop(exchange).cancel()
        connection = self._busy.pop(exchange, None)
        if task := self._connecting.pop(exchange, None):
            task.cancel()
        if connection is not None:
            if error is None and connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()
        self.on_end(exchange)
        self._place_waiting()
        if not self.pending:
            self._drained.set()

    def lost(self, connection: Connection) -> None:
        """Of the connections: the server closed this one, or its bytes were no HTTP."""
        if connection in self._idle:
            self._idle.remove(connection)

    def resend(self, exchange: Exchange) -> None:
        """Of the connections: a kept connection was closed as the request went out, before a byte came back."""
        self._busy.pop(exchange, None)
        self._place(exchange)

    def _place(self, exchange: Exchange) -> None:
        if self._idle:
            self._start(self._idle.pop(), exchange)
        elif len(self._busy) + len(self._connecting) < self.limit:
            self._connecting[exchange] = self.loop.create_task(self._connect(exchange))
        else:
            self.waited += 1
            self._waiting.append(exchange)

    def _place_waiting(self) -> None:
        while self._waiting and (self._idle or len(self._busy) + len(self._connecting) < self.limit):
            exchange = self._waiting.popleft()
            if exchange in self.pending:
                self._place(exchange)

    def _start(self, connection: Connection, exchange: Exchange) -> None:
        self._busy[exchange] = connection
        connection.start(exchange)

    async def _connect(self, exchange: Exchange) -> None:
        server = self.server
        try:
            _, connection = await self.loop.create_connection(
                lambda: Connection(self), server.host, server.port, ssl=True if server.tls else None
            )
        except ConnectionRefusedError:
            self._connecting.pop(exchange, None)
            self.end(exchange, "connection refused")
        except (OSError, ValueError) as error:  # ValueError: TLS names
            self._connecting.pop(exchange, None)
            self.end(exchange, f"cannot connect: {_word(error)}")
        else:
            self._connecting.pop(exchange, None)
            if exchange in self.pending:
                self._start(connection, exchange)
            else:
                connection.abort()

    def _time_out(self, exchange: Exchange) -> None:
        self.end(exchange, "timeout")


def _word(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or type(error).__name__)


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Also the callbacks of httptools' parser."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0  # when the bytes being parsed arrived
        self._head_bytes = 0
        self._framed = False  # the headers say where the body ends
        self._headers_done = False
        self._complete = False
        self._answered = 0  # exchanges before this one
        self.reusable = True

    def start(self, exchange: Exchange) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._head_bytes, self._framed, self._headers_done, self._complete = 0, False, False, False
        self._transport.write(exchange.data)
        if exchange.sent_s is None:
            exchange.sent_s = self._client.clock()

    def abort(self) -> None:
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from asyncio's

    def data_received(self, data: bytes) -> None:
        self._now = self._client.clock()
        exchange = self._exchange
        if exchange is None:  # bytes that nobody asked for
            self.reusable = False
            self._client.lost(self)
            self.abort()
            return
        if not self._headers_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("answer is not HTTP")
            return
        if exchange.size > BODY_LIMIT or (not self._headers_done and self._head_bytes > HEAD_LIMIT):
            self._fail("answer too long")
        elif self._complete:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._client.lost(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._headers_done and not self._framed and error is None:  # such a body ends with the connection
            self._exchange, self._now = exchange, self._client.clock()
            self._finish()
        elif self._answered and exchange.status is None and not self._head_bytes:
            self._client.resend(exchange)
        else:
            self._client.end(exchange, "disconnected")

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._exchange is not None and not self._complete:
            self._headers_done, self._exchange.status = True, status
            self._framed |= status in (204, 304)

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is not None and not self._complete:
            exchange.size += len(body)
            exchange.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if not self._headers_done:  # 100 Continue and its like
            return
        self.reusable = self._parser.should_keep_alive() and not self._complete
        self._complete = True

    def _finish(self) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        exchange.end_s = self._now
        self._answered += 1
        self._client.end(exchange, None)

    def _fail(self, error: str) -> None:
        self.reusable = False
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        self._client.end(exchange, error)
        self.abort()
