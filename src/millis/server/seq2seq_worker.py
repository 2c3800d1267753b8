"""The process of an encoder-decoder model: loads it, then writes one answer after another, those due first.

Texts that want the same manner and deadline are read and written together. The receiver thread admits and refuses at
once, also while a step runs in native code.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

from millis.engine.scheduler import CLASSES
from millis.engine.seq2seq import Writer, Written
from millis.server.messages import Answer, Batch, Cancel, EngineInfo, Refused, Start, Stats, Submit, Tokens
from millis.server.process import STATS_S, Line, Report, main
from millis.tasks.sentences import sentence_ends
from millis.tasks.seq2seq import Seq2Seq, timings_of
from millis.types import DeadlineError, SamplingParams

ROUNDS = 4  # of what is measured at the start: the first is slow


class Worker:
    """One model and the line it answers on."""

    def __init__(self, lm: Seq2Seq, line: Line, max_waiting: int) -> None:
        self._lm, self._line, self._max_waiting = lm, line, max_waiting
        self._writer = Writer(lm.runner, sentence_ends(lm.tokenizer), time.monotonic)
        self._wake = threading.Event()
        self._waiting: dict[int, Submit] = {}
        self._wanted: set[int] = set()  # of those that are being written
        self._changed = threading.Lock()  # guards the two above
        self._stats_s = 0.0
        self._steps = 0

    def warm_up(self, *, again: bool) -> None:
        """Measures what reading and writing take. again: in a few steps; requests wait."""
        beams = self._lm.wish(SamplingParams()).beams
        self._writer.measure(self._lm.generation, beams, 1 if again else ROUNDS)

    def info(self, load_s: float, warm_s: float) -> EngineInfo:
        """What was loaded."""
        runner = self._lm.runner
        return EngineInfo(
            path=str(self._lm.path),
            context=runner.context,
            vocab=runner.vocab,
            threads=self._lm.config.threads,
            isa=runner.isa,
            weight_bytes=runner.weight_bytes,
            answer_tokens=self._lm.answer_tokens(),
            max_sequences=runner.rows,
            load_s=load_s,
            warm_s=warm_s,
        )

    def run(self) -> None:
        """Writes until the process is ended."""
        while True:
            self._wake.clear()
            if not self.step():
                self._send_stats(idle=True)
                self._wake.wait()

    def step(self) -> bool:
        """Writes what is due first; whether there was anything."""
        jobs = self._next()
        if jobs:
            self._write(jobs)
        return bool(jobs)

    def take(self, message: Any) -> None:
        """Admits, refuses and cancels."""
        match message:
            case Submit():
                self._admit(message)
            case Cancel(number):
                with self._changed:
                    self._waiting.pop(number, None)
                    self._wanted.discard(number)
            case _:
                raise TypeError(f"an encoder-decoder model's process understands no {type(message).__name__}")
        self._wake.set()

    def _admit(self, job: Submit) -> None:
        with self._changed:
            waiting = len(self._waiting)
            if waiting < self._max_waiting:
                self._waiting[job.id] = job
        if waiting >= self._max_waiting:
            message = f"{waiting} requests wait already; try again"
            self._line.send(Batch([Refused(job.id, "overloaded", message, None, 1.0)]))
        self._refuse_late()

    def _refuse_late(self) -> None:
        """Refuses those that wait and cannot be in time any more, whenever their turn would come."""
        now = time.monotonic()
        with self._changed:
            late = [
                job
                for job in self._waiting.values()
                if job.deadline_s is not None and 1000 * (job.deadline_s - now) < self._writer.least_ms(len(job.prompt))
            ]
            for job in late:
                del self._waiting[job.id]
        if late:
            self._line.send(Batch([self._late(job) for job in late]))

    def _late(self, job: Submit) -> Refused:
        ms = 1000 * (time.monotonic() - job.arrival_s) + self._writer.least_ms(len(job.prompt))
        message = "no time is left to read the text and write a word; allow more time"
        return Refused(job.id, "deadline_unmeetable", message, ms, 1.0)

    def _next(self) -> list[Submit]:
        """What is written next: the answer that is due first, and those that want the same with it."""
        with self._changed:
            order = sorted(self._waiting.values(), key=_urgency)
            if not order:
                return []
            first = order[0]
            together = self._lm.runner.rows // self._lm.wish(first.params).beams
            same = [job for job in order if (job.params, job.deadline_s) == (first.params, first.deadline_s)]
            jobs = same[:together]
            for job in jobs:
                del self._waiting[job.id]
            self._wanted = {job.id for job in jobs}
            return jobs

    def _write(self, jobs: list[Submit]) -> None:
        first = jobs[0]  # and all that are due then are of its request
        wish = replace(self._lm.wish(first.params, deadline=first.deadline_s), lands=first.on_deadline == "partial")
        items: list[Answer]
        try:
            written = self._writer.write([job.prompt for job in jobs], wish, self._between_steps)
        except DeadlineError:
            items = [self._late(job) for job in jobs]
        else:
            items = [self._answer(job, one) for job, one in zip(jobs, written, strict=True)]
            self._steps += max(one.steps for one in written)
        with self._changed:
            items = [item for item in items if item.id in self._wanted]
            self._wanted = set()
        if items:
            self._line.send(Batch(items))

    def _between_steps(self) -> bool:
        """Whether nobody waits for what is being written any more."""
        self._refuse_late()
        self._send_stats(idle=False)
        return not self._wanted

    def _answer(self, job: Submit, one: Written) -> Answer:
        if one.reason == "deadline" and not one.tokens:
            return self._late(job)
        timings = timings_of(one, len(job.prompt), job.arrival_s)
        return Tokens(job.id, tuple(one.tokens), None, one.reason, timings)

    def _send_stats(self, *, idle: bool) -> None:
        now = time.monotonic()
        if now - self._stats_s < STATS_S and not idle:
            return
        self._stats_s = now
        with self._changed:
            running, waiting = len(self._wanted), list(self._waiting.values())
        writer = self._writer
        self._line.send(
            Stats(
                at_s=now,
                running=running,
                waiting=len(waiting),
                steps=self._steps,
                step_predicted_ms=writer.step_ms,
                step_actual_ms=writer.step_ms,
                step_ms=writer.step_ms,
                prefill_token_ms=writer.token_ms,
                backlog_ms=sum(writer.token_ms * len(job.prompt) for job in waiting),
            )
        )


def _urgency(job: Submit) -> tuple[float, int, float]:
    due_s = math.inf if job.deadline_s is None else job.deadline_s
    return due_s, CLASSES[job.priority], job.arrival_s


def load(start: Start, line: Line) -> Worker:
    """Loads the model that a server asks for."""
    options = dict(start.options)
    max_waiting = options.pop("max_waiting")
    return Worker(Seq2Seq(start.model, progress=Report(line), **options), line, max_waiting)


if __name__ == "__main__":
    main(load)
