"""Reads texts by their deadlines: the readings that wait, and whatever reads. Any thread may drive it.

One step runs at a time; requests are admitted and refused also while it does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from millis.engine.predict import StepModel
from millis.engine.reading import Reading, Readings, calibrate
from millis.engine.turn import Lock
from millis.types import DeadlineError

Read = Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]  # ids of N texts → [N, width or labels]
TYPICAL_TOKENS = 16  # of a text
PROBE_S = 0.05  # between readings for no request, by which it is learned that one was refused for nothing
MOST_WAITING = 1024  # requests


class TimelyReader:
    """embeddings, logits: read some texts. context: tokens of a text that are read; max_tokens: of a step at most."""

    def __init__(
        self,
        embeddings: Read,
        logits: Read | None = None,
        *,
        context: int,
        max_tokens: int,
        max_waiting: int = MOST_WAITING,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.costs = StepModel()
        self.typical = min(TYPICAL_TOKENS, context)
        self.steps = 0
        self.predicted_ms = self.took_ms = 0.0  # of the latest
        self._embeddings, self._logits = embeddings, embeddings if logits is None else logits
        self._context, self._clock = context, clock
        self._readings = Readings(self.costs, max_tokens=max_tokens, max_waiting=max_waiting)
        self._changed = Lock()  # guards the readings and what steps are thought to take
        self._turn = Lock()  # of whoever runs a step
        self._doubted, self._probed_s = False, -math.inf  # one was refused since the latest probe; when that was
        self._numbers = count(1)

    def measure(self, *, quick: bool) -> None:
        """Measures what reading takes. quick: a few sizes only."""
        with self._turn:
            calibrate(self.costs, self._embeddings, self._clock, self._context, quick)

    def prepare(self, *, quick: bool) -> None:
        """Measures, unless that was done."""
        with self._turn:
            if not self.costs.calibrated:
                calibrate(self.costs, self._embeddings, self._clock, self._context, quick)

    def admit(self, reading: Reading) -> None:
        """Queues a request. DeadlineError, OverloadError: as Readings.add."""
        with self._changed:
            try:
                self._readings.add(reading, self._clock())
            except DeadlineError:
                self._doubted = True
                raise

    def drop(self, number: int) -> None:
        """Forgets a request that nobody waits for."""
        with self._changed:
            self._readings.drop(number)

    def late(self) -> list[Reading]:
        """Takes out those that wait although their deadline has passed."""
        with self._changed:
            return self._readings.late(self._clock())

    def backlog(self) -> tuple[int, float]:
        """(requests that wait, milliseconds until all of them are read)."""
        with self._changed:
            return len(self._readings), self._readings.backlog_ms(self._clock())

    def step(self) -> list[Reading] | None:
        """Reads some texts, those due first; the requests that this made whole. None: nothing waits."""
        with self._turn:
            return self._step()

    def read(
        self, texts: Sequence[Sequence[int]], *, head: bool, arrival_s: float, deadline_ms: float
    ) -> tuple[NDArray[np.float32], Reading]:
        """[N, width], or with `head` [N, labels]: what came of each text, and how. The deadline is from the arrival.

        DeadlineError: they would be read too late, which is said before the first is; or it took longer than predicted.
        """
        due_s = arrival_s + deadline_ms / 1000
        number = next(self._numbers)
        reading = Reading(id=number, texts=texts, arrival_s=arrival_s, due_s=due_s, head=head, longest=self._context)
        try:
            self.admit(reading)
        except DeadlineError:
            if self._wants_probe():
                threading.Thread(target=self.probe, name="probe", daemon=True).start()
            raise
        try:
            while not reading.whole and self._clock() <= due_s:
                with self._turn:  # another thread may have read them meanwhile
                    if not reading.whole:
                        self._step()
        finally:
            self.late()
            self.drop(number)
        total_ms = 1000 * (self._clock() - arrival_s)
        if total_ms > deadline_ms:
            read = f"{len(reading.made)} of {len(texts)} texts were read in {total_ms:.1f} ms"
            raise DeadlineError(
                f"the deadline of {deadline_ms:g} ms passed: {read}, longer than predicted; allow more time",
                predicted_ms=total_ms,
                retry_after_s=0.0,
            )
        return np.stack(reading.made), reading

    def probe(self) -> bool:
        """Reads for nobody, if a request was refused and nothing waits; whether it did.

        What was refused may have been thought to take longer than it does by now.
        """
        if not self._wants_probe():
            return False
        self._doubted, self._probed_s = False, self._clock()
        probe = Reading(id=0, texts=[[0] * self.typical], arrival_s=self._probed_s)
        with self._turn:
            begin = self._clock()
            self._embeddings(probe.texts)
            took_ms = 1000 * (self._clock() - begin)
        with self._changed:
            self._readings.observe([(probe, 0)], took_ms)
        return True

    def _wants_probe(self) -> bool:
        return self._doubted and not len(self._readings) and self._clock() > self._probed_s + PROBE_S

    def _step(self) -> list[Reading] | None:
        with self._changed:
            chosen = self._readings.step(self._clock())
        if not chosen:
            return None
        read = self._logits if chosen[0][0].head else self._embeddings
        begin = self._clock()
        try:
            rows = read([reading.texts[at] for reading, at in chosen])
        except BaseException:  # an interrupt of one thread is none of the others'
            with self._changed:
                self._readings.undo(chosen)
            raise
        now = self._clock()
        self.steps += 1
        done = []
        for (reading, _), row in zip(chosen, rows, strict=True):
            reading.made.append(row)
            if reading.whole:
                done.append(reading)
        with self._changed:
            self.took_ms = 1000 * (now - begin)
            self.predicted_ms = self._readings.observe(chosen, self.took_ms)
            for reading in done:
                self._readings.learn(now <= reading.due_s)
        return done
