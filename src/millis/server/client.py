"""The server's side of the engine process: starts it, sends it work, hands out its answers, and restarts it.

Everything runs on the event loop; an answer's messages come to its listener by a plain call, with no task between.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import pickle
import socket
import sys
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

from millis.server.messages import (
    Answer,
    Batch,
    Cancel,
    EngineInfo,
    Failed,
    Frames,
    Pin,
    Progress,
    Ready,
    Refused,
    Start,
    Stats,
    Submit,
    Work,
    frame,
)
from millis.types import ModelError

log = logging.getLogger("millis.server")

CALM_S = 60.0  # an engine that ran so long before it crashed is restarted at once
BACKOFF_S = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 15.0, 30.0)
POISON_CRASHES = 2  # a request that was in flight in so many crashes is refused
SUSPECTS = 4096  # requests remembered for that
SUSPECT_S = 600.0
HUNG_S = 60.0  # a step takes far less
WATCH_S = 2.0
END_S = 2.0  # a process that is to end has so long, then it is killed: it may be stopped, or hang in a system call
MAX_DELIVERY_S = 0.05  # more than this is a pause of the machine, which no deadline can foresee
DELIVERY_FADE = 0.99  # of the longest delivery is still counted on a step later


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine process ended while the request was in flight. `retryable`: the same request may well succeed."""

    id: int
    code: str
    message: str
    retryable: bool = True


class Mailbox:
    """The replies to one request, Answer or Lost, and what else its owner puts in; for the one coroutine that waits."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: object) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def get_now(self) -> Any | None:
        """The next reply, if it is here."""
        return self._items.popleft() if self._items else None


@dataclass(slots=True)
class _Flight:
    work: Work
    mailbox: Mailbox


@dataclass(slots=True)
class _Suspect:
    crashes: int
    seen_s: float = field(default_factory=time.monotonic)


class EngineClient:
    """One engine process at a time. `start` before anything else; `close` in the end.

    `info` and `stats` are those of the latest process; `restarts` counts crashes.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        adapters: Mapping[str, str] | None = None,
        worker: str = "millis.server.worker",
    ) -> None:
        self._worker = worker  # the module that the process runs
        self.adapters = dict(adapters or {})  # name → path, those of every later process, too
        self.info: EngineInfo | None = None
        self.stats = Stats(at_s=time.monotonic())
        self.restarts = 0
        self.delivery_s = 0.0  # from a step's end to this process: of late at most
        self.on_stats: Callable[[Stats], None] = lambda stats: None
        self._start = Start(model, dict(options))
        self._pins: list[Pin] = []
        self._numbers = itertools.count(1)
        self._flights: dict[int, _Flight] = {}
        self._suspects: OrderedDict[bytes, _Suspect] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._link: _Link | None = None
        self._ready = asyncio.Event()
        self._first: asyncio.Future[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._unheard_s: float | None = None  # since when the process owes a word; None: it has nothing to do

    @property
    def ready(self) -> bool:
        """Whether a process is loaded and warm now."""
        return self._ready.is_set()

    @property
    def in_flight(self) -> int:
        """Requests that the engine has not answered yet."""
        return len(self._flights)

    @property
    def pid(self) -> int | None:
        """The engine process."""
        return None if self._process is None else self._process.pid

    async def start(self) -> EngineInfo:
        """Waits until the first process is ready; from then on it is restarted whenever it ends.

        ModelError: it cannot load the model; its text says why.
        """
        self._first = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        await self._first
        assert self.info is not None
        return self.info

    async def wait_ready(self, limit_s: float) -> bool:
        """Whether an engine is ready within so many seconds."""
        if self._ready.is_set():
            return True
        try:
            await asyncio.wait_for(self._ready.wait(), max(0.0, limit_s))
        except asyncio.TimeoutError:
            return False
        return True

    def number(self) -> int:
        """A fresh id for a piece of work."""
        return next(self._numbers)

    def submit(self, work: Work, mailbox: Mailbox) -> None:
        """Sends work off. Replies come to the mailbox; the last is Tokens with a finish_reason, or another kind."""
        if self._suspects and self._poisoned(work):
            mailbox.put(Lost(work.id, "request_poisoned", POISONED, retryable=False))
        elif self._link is None or not self._ready.is_set():
            mailbox.put(Lost(work.id, "engine_unavailable", STARTING))
        else:
            if self._unheard_s is None:
                self._unheard_s = time.monotonic()
            self._flights[work.id] = _Flight(work, mailbox)
            self._link.send(work)

    def cancel(self, number: int) -> None:
        """Tells the engine that nobody waits any more; no further reply comes. Does nothing to what has ended."""
        if self._flights.pop(number, None) is not None and self._link is not None:
            self._link.send(Cancel(number))

    def stop(self, number: int) -> None:
        """As `cancel`, but the mailbox still gets the last message, with the timings."""
        if number in self._flights and self._link is not None:
            self._link.send(Cancel(number))

    def pin(self, pin: Pin) -> None:
        """Keeps a prefix in the cache of this process and of every later one."""
        self._pins.append(pin)
        self._send(pin)

    def fail_all(self, code: str, message: str) -> None:
        """Ends everything in flight."""
        for number, flight in list(self._flights.items()):
            self.cancel(number)
            flight.mailbox.put(Lost(number, code, message))

    async def close(self) -> None:
        """Ends the process, by force where it does not end by itself."""
        self._closing.set()
        self.fail_all("server_stopping", "the server is stopping; try another")
        if self._link is not None:
            self._link.close()
        if self._supervisor is not None:
            await asyncio.wait((self._supervisor,), timeout=END_S)
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            await self._supervisor

    # The link calls these.

    def received(self, message: Any) -> None:
        """Takes one message of the engine process."""
        match message:
            case Batch(items, at_s):
                self.delivery_s = max(min(time.monotonic() - at_s, MAX_DELIVERY_S), DELIVERY_FADE * self.delivery_s)
                for item in items:
                    self._deliver(item)
            case Stats():
                self.stats = message
                self.on_stats(message)
            case Ready(info):
                self.info = info
                for pin in self._pins:
                    self._send(pin)
                self._ready.set()
                if self._first is not None and not self._first.done():
                    self._first.set_result(None)
            case Progress(text):
                log.info("%s", text)
            case Failed(0, text):
                if self._first is not None and not self._first.done():
                    self._first.set_exception(ModelError(text))
                else:
                    log.error("the engine could not start again: %s", text)
        self._unheard_s = time.monotonic() if self._flights else None

    def _send(self, message: Any) -> None:
        if self._link is not None:
            self._link.send(message)

    def _deliver(self, item: Answer) -> None:
        flight = self._flights.get(item.id)
        if flight is None:
            return
        if getattr(item, "finish_reason", item) is not None:  # the last of its messages
            del self._flights[item.id]
            if self._suspects and not isinstance(item, Refused):
                self._suspects.pop(_content(flight.work), None)
        flight.mailbox.put(item)

    def disconnected(self) -> None:
        """The engine process has gone: what was in flight fails now."""
        self._ready.clear()
        self._link = self._unheard_s = None
        flights, self._flights = self._flights, {}
        if not self._closing.is_set():
            now = time.monotonic()
            for flight in flights.values():
                key = _content(flight.work)
                suspect = self._suspects.pop(key, None) or _Suspect(0)
                self._suspects[key] = _Suspect(suspect.crashes + 1, now)
            while len(self._suspects) > SUSPECTS:
                self._suspects.popitem(last=False)
        for number, flight in flights.items():
            flight.mailbox.put(Lost(number, "engine_restarted", RESTARTED))

    def _poisoned(self, work: Work) -> bool:
        key = _content(work)
        suspect = self._suspects.get(key)
        if suspect is not None and time.monotonic() - suspect.seen_s > SUSPECT_S:
            del self._suspects[key]
            return False
        return suspect is not None and suspect.crashes >= POISON_CRASHES

    async def _supervise(self) -> None:
        crashes = 0  # in a row, without a calm time between
        while not self._closing.is_set():
            begin = time.monotonic()
            try:
                why = f"ended (exit {await self._run_once()})"
            except OSError as error:  # too many open files or processes, or no memory: perhaps for a moment
                why = f"cannot be started ({error.strerror or error})"
            if self._closing.is_set():
                return
            if self._first is not None and not self._first.done():
                self._first.set_exception(ModelError(f"the engine process {why} before it had loaded the model"))
                return
            if self._first is not None and self._first.exception() is not None:
                return
            self.restarts += 1
            crashes = 1 if time.monotonic() - begin > CALM_S else crashes + 1
            delay = BACKOFF_S[min(crashes, len(BACKOFF_S)) - 1]
            log.error("the engine process %s; it starts again in %.1f s", why, delay)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)

    async def _run_once(self) -> int:
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._worker, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        _, link = await asyncio.get_running_loop().create_unix_connection(lambda: _Link(self), sock=ours)
        self._link = link
        link.send(replace(self._start, again=self.restarts > 0, adapters=tuple(self.adapters.items())))
        if self._closing.is_set():
            link.close()
        watching = asyncio.create_task(self._watch(self._process))
        code = await self._process.wait()
        watching.cancel()
        link.close()
        return code

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kills a process that has work and says nothing for long: it hangs."""
        silent = 0
        while silent < 2:  # seen twice: this process may have been the one that stood still
            await asyncio.sleep(WATCH_S)
            owes = self._unheard_s is not None and time.monotonic() - self._unheard_s > HUNG_S
            silent = silent + 1 if owes else 0
        log.error("the engine process hangs: silent for %.0f s with work to do; it is ended", HUNG_S)
        process.kill()


STARTING = "the engine is starting; try again in a second"
RESTARTED = "the engine ended unexpectedly and starts again; try again"
POISONED = "this request was in work in two crashes of the engine; it is refused for some minutes: change it"


class _Link(asyncio.Protocol):
    """The socket to one engine process."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._client.received(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._client._link is self:
            self._client.disconnected()

    def send(self, message: Any) -> None:
        """Sends one frame; what cannot be sent any more is answered by `disconnected`."""
        if self._transport is not None:
            self._transport.write(frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _content(work: Work) -> bytes:
    """What a piece of work asks for, whoever asks and whenever."""
    digest = hashlib.sha256(type(work).__name__.encode())
    if isinstance(work, Submit):
        digest.update(array("q", work.prompt).tobytes())
        digest.update(pickle.dumps((work.params, work.adapter)))
    else:
        for name in ("prompt", "prompts", "head", "continuations", "best", "adapter", "name", "path"):
            digest.update(pickle.dumps(getattr(work, name, None)))
    return digest.digest()
