"""One part of a load on one server: requests go out on time, whatever the server does, and what comes back is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from millis.bench.serve_answer import Answer, read
from millis.bench.serve_client import Client
from millis.bench.serve_trace import Planned
from millis.bench.serve_wire import Exchange

KEPT_LIMIT = 256 << 20  # bytes of answers kept unread while a load runs


@dataclass(frozen=True, slots=True)
class Level:
    """One load: arrivals a second, or that many requests at once. Neither: as a trace file has it."""

    rate: float | None = None
    concurrency: int | None = None


def name_of(level: Level) -> str:
    """`4 a second`, `8 at once`."""
    if level.concurrency:
        return f"{level.concurrency} at once"
    return f"{level.rate:g} a second" if level.rate else "as the trace has it"


class Run:
    """Sends, waits, and keeps what came until it is read."""

    def __init__(
        self,
        client: Client,
        level: Level,
        planned: Sequence[Planned],
        before_s: float,
        duration_s: float,
        finish: Callable[[Answer], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client, self._level, self._planned, self._before_s = client, level, planned, before_s
        self._duration_s, self._finish, self._sleep = duration_s, finish, sleep
        self.requests: list[bytes] = []
        self.ended = self.told = 0
        self.seconds = 0.0
        self._exchanges: dict[Exchange, Answer] = {}
        self._under_way: set[Exchange] = set()
        self._unread: list[Exchange] = []
        self._kept = 0
        self._start_s = 0.0

    async def to_the_end(self) -> None:
        """Returns when every request has ended."""
        clock = self._client.clock
        self._client.on_end = self._on_end
        self._start_s = clock()
        try:
            if self._level.concurrency:
                for _ in range(min(self._level.concurrency, len(self._planned))):
                    self._send(clock())
            else:
                for planned in self._planned:
                    due = self._start_s + planned.arrival_s - self._before_s
                    await self._sleep(max(0.0, due - clock()))  # late or not, the loop has a turn
                    while (wait := due - clock()) > 0:
                        await self._sleep(wait)
                    self._send(due)
            await self._client.drained()
        finally:
            self._client.on_end = lambda exchange: None
            self.seconds = clock() - self._start_s

    def read(self) -> list[Answer]:
        """The answers, in the order of arrival. Requests that were interrupted are left out."""
        self._read_all()
        return [answer for exchange, answer in self._exchanges.items() if exchange not in self._under_way]

    def _send(self, scheduled_s: float) -> None:
        i = len(self._exchanges)
        exchange = Exchange(self.requests[i], scheduled_s)
        self._exchanges[exchange] = Answer(deadline_ms=self._planned[i].deadline_ms)
        self._under_way.add(exchange)
        self._client.send(exchange)

    def _on_end(self, exchange: Exchange) -> None:
        self.ended += 1
        self._under_way.remove(exchange)
        self._unread.append(exchange)
        self._kept += exchange.size
        if self._kept > KEPT_LIMIT:
            self._read_all()
        now = self._client.clock()
        if self._level.concurrency and len(self._exchanges) < len(self._planned):
            if now - self._start_s < self._duration_s:
                self._send(now)

    def _read_all(self) -> None:
        for exchange in self._unread:
            self._finish(read(exchange, self._exchanges[exchange]))
            exchange.pieces.clear()
            exchange.data = b""
        self._unread.clear()
        self._kept = 0
