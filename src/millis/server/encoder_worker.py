"""The process of an encoder: loads it, then reads texts while there are any, those due first.

The receiver thread admits and refuses at once, also while a step runs in native code.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np

from millis.engine.predict import StepModel, Work
from millis.engine.reading import Reading, Readings, calibrate
from millis.server.messages import Batch, Cancel, Embed, EngineInfo, Refused, Start, Stats, Vectors
from millis.server.process import Line, Report, main
from millis.tasks.embed import unit_vectors
from millis.tasks.encoder import Encoder
from millis.types import DeadlineError, OverloadError, Timings

STATS_S = 0.1
TYPICAL_TOKENS = 16  # of a text, for the estimate that refuses early
PROBE_S = 0.05  # between readings for no request, by which an idle process learns that it was refused for nothing


class Worker:
    """One encoder and the line it answers on."""

    def __init__(self, encoder: Encoder, line: Line, max_waiting: int) -> None:
        self._encoder, self._runner = encoder, encoder.runner
        self._line = line
        self._costs = StepModel()
        self._readings = Readings(self._costs, max_tokens=self._runner.max_tokens, max_waiting=max_waiting)
        self._changed = threading.Lock()  # guards the two above
        self._wake = threading.Event()
        self._steps = 0
        self._predicted_ms = self._took_ms = 0.0  # of the latest
        self._refused = False  # somebody, since the latest step
        self._probed_s = 0.0
        self._stats_s = 0.0

    def warm_up(self, *, again: bool) -> None:
        """Measures what reading takes. again: a few sizes only; requests wait."""
        calibrate(self._costs, self._runner.embeddings, time.monotonic, self._runner.context, again)

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
            load_s=load_s,
            warm_s=warm_s,
        )

    def run(self) -> None:
        """Reads until the process is ended."""
        while True:
            self._wake.clear()
            now = time.monotonic()
            with self._changed:
                late = self._readings.late(now)
                chosen = self._readings.step(now)
            for reading in late:
                total_ms = 1000 * (now - reading.arrival_s)
                self._refuse(Refused(reading.id, "deadline_unmeetable", "no time was left to read it", total_ms, 1.0))
            if chosen:
                self._step(chosen)
            elif self._refused and now - self._probed_s > PROBE_S:
                self._probe(now)
            self._send_stats(idle=not chosen)
            if not chosen:
                self._wake.wait()

    def take(self, message: Any) -> None:
        """Admits, refuses and cancels."""
        match message:
            case Embed():
                self._admit(message)
            case Cancel(number):
                with self._changed:
                    self._readings.drop(number)
            case _:
                raise TypeError(f"an encoder's process understands no {type(message).__name__}")
        self._wake.set()

    def _admit(self, job: Embed) -> None:
        reading = Reading(
            id=job.id,
            texts=job.prompts,
            arrival_s=job.arrival_s,
            due_s=math.inf if job.deadline_s is None else job.deadline_s,
            priority=job.priority,
            head=job.head,
            longest=self._runner.context,
        )
        try:
            with self._changed:
                self._readings.add(reading, time.monotonic())
        except DeadlineError as error:
            self._refused = True
            self._refuse(Refused(job.id, "deadline_unmeetable", str(error), error.predicted_ms, error.retry_after_s))
        except OverloadError as error:
            self._refuse(Refused(job.id, "overloaded", str(error), None, error.retry_after_s))

    def _step(self, chosen: list[tuple[Reading, int]]) -> None:
        texts = [reading.texts[at] for reading, at in chosen]
        read = self._runner.logits if chosen[0][0].head else self._runner.embeddings
        begin = time.monotonic()
        rows = read(texts)
        now = time.monotonic()
        self._steps += 1
        done = []
        for (reading, _), row in zip(chosen, rows, strict=True):
            reading.made.append(row)
            if reading.whole:
                done.append(reading)
        with self._changed:
            self._took_ms = 1000 * (now - begin)
            self._predicted_ms = self._readings.observe(chosen, self._took_ms)
            for reading in done:
                self._readings.learn(now <= reading.due_s)
        if done:
            self._line.send(Batch([_vectors(reading, now) for reading in done]))

    def _probe(self, now_s: float) -> None:
        """Reads for nobody: what was refused may have been thought to take longer than it does by now."""
        self._refused, self._probed_s = False, now_s
        probe = Reading(id=0, texts=[[0] * min(TYPICAL_TOKENS, self._runner.context)], arrival_s=now_s)
        begin = time.monotonic()
        self._runner.embeddings(probe.texts)
        took_ms = 1000 * (time.monotonic() - begin)
        with self._changed:
            self._readings.observe([(probe, 0)], took_ms)

    def _send_stats(self, *, idle: bool) -> None:
        now = time.monotonic()
        if now - self._stats_s < STATS_S and not idle:
            return
        self._stats_s = now
        with self._changed:
            waiting, backlog_ms = len(self._readings), self._readings.backlog_ms(now)
        chunk = min(self._costs.chunk, self._runner.max_tokens)
        self._line.send(
            Stats(
                at_s=now,
                running=int(not idle),
                waiting=waiting,
                steps=self._steps,
                step_predicted_ms=self._predicted_ms,
                step_actual_ms=self._took_ms,
                step_ms=self._costs.ms(Work(min(TYPICAL_TOKENS, self._runner.context))),
                prefill_token_ms=self._costs.ms(Work(chunk)) / chunk,
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
