"""The process of an encoder: loads it, then reads texts while there are any, those due first.

The receiver thread admits and refuses at once, also while a step runs in native code.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np

from millis.engine.predict import Work
from millis.engine.reading import Reading
from millis.engine.timely import TimelyReader
from millis.server.messages import Batch, Cancel, Embed, EngineInfo, Refused, Start, Stats, Vectors
from millis.server.process import STATS_S, Line, Report, main, refusal
from millis.tasks.embed import unit_vectors
from millis.tasks.encoder import Encoder
from millis.types import DeadlineError, OverloadError, Timings


class Worker:
    """One encoder and the line it answers on."""

    def __init__(self, encoder: Encoder, line: Line, max_waiting: int) -> None:
        self._encoder, self._runner = encoder, encoder.runner
        self._line = line
        self._reader = TimelyReader(
            self._runner.embeddings,
            self._runner.logits,
            context=self._runner.context,
            max_tokens=self._runner.max_tokens,
            max_waiting=max_waiting,
            clock=time.monotonic,
        )
        self._wake = threading.Event()
        self._stats_s = 0.0

    def warm_up(self, *, again: bool) -> None:
        """Measures what reading takes. again: a few sizes only; requests wait."""
        self._reader.measure(quick=again)

    def info(self, load_s: float, warm_s: float) -> EngineInfo:
        """What was loaded."""
        config = self._encoder.model.checkpoint.config
        return EngineInfo(
            path=str(self._encoder.path),
            context=self._runner.context,
            vocab=config.vocab,
            threads=self._encoder.config.threads,
            isa=self._runner.isa,
            weight_bytes=self._runner.weight_bytes,
            head=config.head,
            reads=self._runner.reads,
            relates=self._encoder.relates,
            load_s=load_s,
            warm_s=warm_s,
        )

    def run(self) -> None:
        """Reads until the process is ended."""
        while True:
            self._wake.clear()
            for reading in self._reader.late():
                total_ms = 1000 * (time.monotonic() - reading.arrival_s)
                self._refuse(Refused(reading.id, "deadline_unmeetable", "no time was left to read it", total_ms, 1.0))
            done = self._reader.step()
            if done is None:
                self._reader.probe()
                self._send_stats(idle=True)
                self._wake.wait()
                continue
            if done:
                now = time.monotonic()
                self._line.send(Batch([_vectors(reading, now) for reading in done]))
            self._send_stats(idle=False)

    def take(self, message: Any) -> None:
        """Admits, refuses and cancels."""
        match message:
            case Embed():
                self._admit(message)
            case Cancel(number):
                self._reader.drop(number)
            case _:
                raise TypeError(f"an encoder's process understands no {type(message).__name__}")
        self._wake.set()

    def _admit(self, job: Embed) -> None:
        reading = Reading(
            id=job.id,
            texts=job.prompts,
            arrival_s=job.arrival_s,
            due_s=math.inf if job.deadline_s is None else job.deadline_s,
            asked_ms=job.asked_ms,
            priority=job.priority,
            head=job.head,
            longest=self._runner.context,
        )
        try:
            self._reader.admit(reading)
        except (DeadlineError, OverloadError) as error:
            self._refuse(refusal(job.id, error))

    def _send_stats(self, *, idle: bool) -> None:
        now = time.monotonic()
        if now - self._stats_s < STATS_S and not idle:
            return
        self._stats_s = now
        reader, costs = self._reader, self._reader.costs
        waiting, backlog_ms = reader.backlog()
        chunk = min(costs.chunk, self._runner.max_tokens)
        self._line.send(
            Stats(
                at_s=now,
                running=int(not idle),
                waiting=waiting,
                steps=reader.steps,
                step_predicted_ms=reader.predicted_ms,
                step_actual_ms=reader.took_ms,
                step_ms=costs.ms(Work(reader.typical)),
                prefill_token_ms=costs.ms(Work(chunk)) / chunk,
                backlog_ms=backlog_ms,
            )
        )

    def _refuse(self, refusal: Refused) -> None:
        self._line.send(Batch([refusal]))


def _vectors(reading: Reading, now_s: float) -> Vectors:
    begin_s = now_s if reading.begin_s is None else reading.begin_s
    rows = np.stack(reading.made)
    if not reading.head:
        rows = unit_vectors(rows)
    timings = Timings(
        queue_ms=1000 * (begin_s - reading.arrival_s),
        prefill_ms=1000 * (now_s - begin_s),
        total_ms=1000 * (now_s - reading.arrival_s),
        prompt_tokens=sum(map(len, reading.texts)),
        steps=reading.steps,
    )
    return Vectors(reading.id, rows.astype(np.float32).tobytes(), (rows.shape[0], rows.shape[1]), timings)


def load(start: Start, line: Line) -> Worker:
    """Loads the encoder that a server asks for."""
    options = dict(start.options)
    max_waiting = options.pop("max_waiting")
    return Worker(Encoder(start.model, progress=Report(line), **options), line, max_waiting)


if __name__ == "__main__":
    main(load)
