"""The engine process: loads a model, then runs steps while there is work. Started by the server with a socket.

The receiver thread admits, refuses and cancels at once, also while a step runs in native code; the main thread steps
and sends what each step brought, one frame a step. Ends when the socket closes; signals are the server's business.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from millis.engine.request import Request
from millis.server.messages import (
    Batch,
    Cancel,
    Embed,
    EngineInfo,
    Failed,
    Frames,
    Progress,
    Ready,
    Refused,
    Score,
    Scores,
    Start,
    Stats,
    Submit,
    Tokens,
    frame,
)
from millis.tasks.model import LanguageModel
from millis.types import DeadlineError, MillisError, OverloadError, RequestError, SamplingParams, Timings

STATS_S = 0.1
CRASHED = 70  # exit code after a failed step: EX_SOFTWARE
WARM_TOKENS = 8
NO_VECTORS = "the model served here gives no embeddings; serve an embedding model"


class Worker:
    """One engine and the socket it answers to."""

    def __init__(self, lm: LanguageModel, connection: socket.socket) -> None:
        self.engine = lm.engine
        self.engine.clock = time.monotonic
        self._lm = lm
        self._socket = connection
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._table: dict[int, Request] = {}  # those whose last event was not sent yet
        self._scores: list[Score] = []
        self._changed = threading.Lock()  # guards the two above
        self._stats_s = 0.0
        self._steps = 0
        self._drafted = self._accepted = 0
        self._step_ms = 0.0

    def warm_up(self, *, again: bool) -> None:
        """Runs one whole chunk and some decodes: memory is touched, and step times are known.

        again: only the decodes; requests wait for this process to take the place of one that ended.
        """
        runner = self.engine.runner
        length = max(1, min(runner.max_tokens, runner.context - WARM_TOKENS - 1))
        for tokens in (1,) if again else (length, 1):
            params = SamplingParams(max_tokens=WARM_TOKENS, ignore_eos=True)
            request = self.engine.submit([0] * tokens, params)
            while request.finish_reason is None:
                self.engine.step()

    def run(self, frames: Frames) -> None:
        """Steps until the process is ended."""
        threading.Thread(target=self._receive, args=(frames,), daemon=True, name="receiver").start()
        while True:
            self._wake.clear()
            if not self._has_work():
                self._send_stats()
                self._wake.wait()
                continue
            self._run_scores()
            begin = time.monotonic()
            self.engine.step()
            self._steps += 1
            self._step_ms = 1000 * (time.monotonic() - begin)
            self._hand_out()
            self._send_stats()

    def _has_work(self) -> bool:
        scheduler = self.engine.scheduler
        return bool(self._scores or scheduler.running or scheduler.waiting)

    def _hand_out(self) -> None:
        items: list[Any] = []
        with self._changed:
            live = list(self._table.items())
        for number, request in live:
            tokens, logprobs, reason = [], [], None
            while request.inbox:
                event = request.inbox.popleft()
                if event.token is not None:
                    tokens.append(event.token)
                    if event.logprob is not None:
                        logprobs.append(event.logprob)
                reason = event.finish_reason
            if reason is not None:
                with self._changed:
                    self._table.pop(number, None)
                self._drafted += request.timings.drafted_tokens
                self._accepted += request.timings.accepted_tokens
            if tokens or reason is not None:
                timings = request.timings if reason is not None else None
                items.append(Tokens(number, tuple(tokens), tuple(logprobs) or None, reason, timings))
        if items:
            self.send(Batch(items))

    def _run_scores(self) -> None:
        with self._changed:
            jobs, self._scores = self._scores, []
        for job in jobs:
            begin = time.monotonic()
            try:
                values = self.engine.score(job.prompt, job.continuations)
            except RequestError as error:
                self.send(Batch([Refused(job.id, "invalid_request", str(error))]))
                continue
            now = time.monotonic()
            count = len(job.prompt) + sum(map(len, job.continuations))
            timings = Timings(
                queue_ms=1000 * (begin - job.arrival_s),
                prefill_ms=1000 * (now - begin),
                total_ms=1000 * (now - job.arrival_s),
                prompt_tokens=count,
            )
            self.send(Batch([Scores(job.id, tuple(values), timings)]))

    def _send_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_s < STATS_S and self._has_work():
            return
        self._stats_s = now
        scheduler = self.engine.scheduler
        total = self.engine.runner.pages
        self.send(
            Stats(
                at_s=now,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                kv_used=total - scheduler.allocator.free,
                kv_total=total,
                drafted=self._drafted,
                accepted=self._accepted,
                steps=self._steps,
                step_actual_ms=self._step_ms,
            )
        )

    def _receive(self, frames: Frames) -> None:
        try:
            while data := self._socket.recv(1 << 16):
                for message in frames.feed(data):
                    self._take(message)
        except OSError:
            pass
        except BaseException:
            traceback.print_exc()
            os._exit(CRASHED)
        os._exit(0)  # the server has gone

    def _take(self, message: Any) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Score():
                with self._changed:
                    self._scores.append(message)
            case Embed():
                self._refuse(Refused(message.id, "invalid_request", NO_VECTORS))
            case Cancel(number):
                with self._changed:
                    request = self._table.get(number)
                    self._scores = [job for job in self._scores if job.id != number]
                if request is not None:
                    request.abandoned = True
            case _:
                raise TypeError(f"the engine process understands no {type(message).__name__}")
        self._wake.set()

    def _submit(self, job: Submit) -> None:
        try:
            with self._changed:
                self._table[job.id] = self.engine.submit(
                    job.prompt, job.params, arrival_s=job.arrival_s, deadline_s=job.deadline_s
                )
        except DeadlineError as error:
            self._refuse(Refused(job.id, "deadline_unmeetable", str(error), error.predicted_ms, error.retry_after_s))
        except OverloadError as error:
            self._refuse(Refused(job.id, "overloaded", str(error), None, error.retry_after_s))
        except MillisError as error:
            self._refuse(Refused(job.id, "invalid_request", str(error)))

    def _refuse(self, refusal: Refused) -> None:
        self.send(Batch([refusal]))

    def send(self, message: Any) -> None:
        """Sends one frame; ends the process where nobody listens."""
        data = frame(message)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError:
            os._exit(0)


class _Report:
    """What a load has to say, told to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def say(self, text: str) -> None:
        self._socket.sendall(frame(Progress(text)))

    def start(self, total_bytes: int, what: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


def main() -> None:
    """`python -m millis.server.worker FD`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)
    connection = socket.socket(fileno=int(sys.argv[1]))
    frames = Frames()
    start: Start | None = None
    while start is None:
        data = connection.recv(1 << 16)
        if not data:
            return
        messages = frames.feed(data)
        start = messages[0] if messages else None
    try:
        began = time.monotonic()
        lm = LanguageModel(start.model, progress=_Report(connection), **start.options)
        loaded = time.monotonic()
        worker = Worker(lm, connection)
        worker.warm_up(again=start.again)
    except (MillisError, MemoryError, OSError) as error:
        with contextlib.suppress(OSError):  # the server may have ended for the same reason
            connection.sendall(frame(Failed(0, str(error) or type(error).__name__)))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection looks at it again
    worker.send(Ready(_info(lm, loaded - began, time.monotonic() - loaded)))
    try:
        worker.run(frames)
    except BaseException:
        traceback.print_exc()
        os._exit(CRASHED)


def _info(lm: LanguageModel, load_s: float, warm_s: float) -> EngineInfo:
    runner = lm.runner
    return EngineInfo(
        path=str(lm.path),
        context=runner.context,
        vocab=runner.vocab,
        pages=runner.pages,
        page_tokens=runner.page_tokens,
        threads=lm.config.threads,
        isa=runner.isa,
        weight_bytes=runner.weight_bytes,
        max_sequences=runner.max_sequences,
        load_s=load_s,
        warm_s=warm_s,
    )


if __name__ == "__main__":
    main()
