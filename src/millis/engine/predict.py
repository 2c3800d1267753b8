"""Predicts how long a step takes on this machine. Pure: times are handed in.

A step is a pass of all its rows through the layers, the output matrix for each row that samples, and attention over
what lies in the KV cache. The first two are tables over the number of rows, for the kernels change with it; attention
grows with the positions read. `calibrate.py` measures them at load; every step that runs corrects them by a factor.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

REGIMES = (1, 8, 23, 127)  # most rows of the kernels that differ; beyond lies the last
PRIOR_BODY = {1: 1.0, 8: 1.6, 23: 3.0, 24: 3.0, 128: 6.0, 512: 22.0}  # in steps of a row, until measured
PRIOR_HEAD = {1: 0.25, 8: 0.6, 16: 1.2}
MOST = 1.5  # a step counts as at most so many times what was predicted: pauses of the machine are not its own
MOST_FIRST = 4.0  # likewise the first step of a regime, of which less is known
GLOBAL, LOCAL = 0.06, 0.1  # weight of a new measurement in the machine's factor and in the regime's
LEAST_CHUNK = 32  # rows of a prompt that a step takes even if it becomes longer than wished
FRUGAL = 1.25  # a chunk may cost so much more a row than the best of them
REMEMBERED = 1024  # steps whose error is kept
LATENESS = 4096  # steps of which the one that took longest beyond its prediction makes the margin


@dataclass(slots=True)
class Work:
    """What a step computes."""

    rows: int = 0  # tokens in all
    samples: int = 0  # rows of logits
    reads: int = 0  # Σ over sequences of one row: positions its attention reads
    pairs: int = 0  # Σ over the rows of longer sequences: positions before each

    def add(self, start: int, length: int, samples: int) -> Work:
        """With `length` tokens of one sequence at position `start` beside."""
        if length == 1:
            return Work(self.rows + 1, self.samples + samples, self.reads + start, self.pairs)
        pairs = self.pairs + length * start + length * length // 2
        return Work(self.rows + length, self.samples + samples, self.reads, pairs)


class Table:
    """rows → milliseconds: straight lines between measured points, the last one carried on."""

    def __init__(self, points: dict[int, float]) -> None:
        self.rows = sorted(points)
        self.values = [points[rows] for rows in self.rows]

    def __call__(self, rows: int) -> float:
        if rows <= 0:
            return 0.0
        known, values = self.rows, self.values
        at = bisect_left(known, rows)
        if at < len(known) and known[at] == rows:
            return values[at]
        if at == 0:
            return values[0]
        if len(known) == 1:
            return values[0] * rows / known[0]
        at = min(at, len(known) - 1)
        low, high = known[at - 1], known[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (rows - low) / (high - low)


class StepModel:
    """Work → milliseconds, and how far off that was."""

    def __init__(self) -> None:
        self.calibrated = False
        self.steps = 0  # observed
        self._body, self._head = Table(PRIOR_BODY), Table(PRIOR_HEAD)
        self._read_ms = self._pair_ms = 0.0
        self.chunk = self._frugal()  # rows of a prompt that a step had better take: more of them save little
        self._factor = 0.0  # logarithm of what all predictions are multiplied by
        self._regime = [0.0] * (len(REGIMES) + 1)
        self._seen = [0] * (len(REGIMES) + 1)
        self._pairs: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._late: deque[tuple[int, float]] = deque()  # (step, ms too late), falling: the maxima of a sliding window

    @property
    def known(self) -> bool:
        """Whether anything was measured yet; without, predictions mean nothing."""
        return self.calibrated or self.steps > 0

    def calibrate(self, body: dict[int, float], head: dict[int, float], read_ms: float, pair_ms: float) -> None:
        """Takes measured tables: rows without logits → ms, rows of logits → ms, and ms a position that is read."""
        self._body, self._head = Table(_rising(body)), Table(_rising(head))
        self.chunk = self._frugal()
        self._read_ms, self._pair_ms = max(0.0, read_ms), max(0.0, pair_ms)
        self._factor, self._regime = 0.0, [0.0] * len(self._regime)
        self._seen = [0] * len(self._seen)
        self.calibrated = True

    def ms(self, work: Work) -> float:
        """What such a step is expected to take; 0 as long as nothing was measured."""
        return self.plain_ms(work) * self.factor(work.rows) if self.known else 0.0

    def plain_ms(self, work: Work) -> float:
        """The tables' answer, before what the steps that ran say of it."""
        attention = self._read_ms * work.reads + self._pair_ms * work.pairs
        return self._body(work.rows) + self._head(work.samples) + attention

    def factor(self, rows: int) -> float:
        """Actual over predicted, for steps of so many rows."""
        at = regime(rows)
        if not self._seen[at]:
            seen = [n for n, count in enumerate(self._seen) if count]
            at = min(seen, key=lambda n: abs(n - at)) if seen else at
        return math.exp(self._factor + self._regime[at])

    def decode_ms(self, sequences: int, context: int) -> float:
        """A step of so many decodes, each behind `context` positions."""
        return self.ms(Work(sequences, sequences, sequences * context, 0))

    def prefill_ms(self, tokens: int, chunk: int) -> float:
        """A prompt of so many tokens in chunks of `chunk` at most; 0 as long as nothing was measured."""
        return self.prefill_plain_ms(0, tokens, chunk) * self.factor(chunk) if self.known else 0.0

    def prefill_plain_ms(self, start: int, length: int, chunk: int) -> float:
        """[start, start + length) of one prompt in chunks of `chunk` rows at most; to be multiplied by a factor."""
        whole, rest = divmod(length, chunk)
        pairs = length * start + length * length // 2
        return whole * self._body(chunk) + self._body(rest) + self._pair_ms * pairs

    def observe(self, work: Work, predicted_ms: float, took_ms: float) -> None:
        """Takes in a step that ran: what had been predicted for it and what it took."""
        plain = self.plain_ms(work)
        if plain <= 0 or took_ms <= 0:
            return
        at = regime(work.rows)
        actual, expected = math.log(took_ms / plain), math.log(self.factor(work.rows))
        if self._seen[at]:
            error = _within(actual - expected, MOST)
            self._factor += GLOBAL * error
            self._regime[at] += max(LOCAL, 1 / (self._seen[at] + 1) - GLOBAL) * error
        elif self.known:
            error = _within(actual - expected, MOST if self.calibrated else MOST_FIRST)
            self._regime[at] = expected + error - self._factor
        else:
            self._factor = actual
        learned = self.calibrated or self._seen[at] > 0
        self._seen[at] += 1
        self.steps += 1
        if predicted_ms > 0 and learned:  # the first of its kind was a guess
            self._pairs.append((predicted_ms, took_ms))
            self._note_lateness(took_ms - predicted_ms)

    @property
    def margin_ms(self) -> float:
        """How much longer than predicted any of the latest steps took."""
        return max(0.0, self._late[0][1]) if self._late else 0.0

    def median_error(self) -> float:
        """Median of |predicted − actual| / actual over the latest steps; 0 without any."""
        return statistics.median([abs(p - a) / a for p, a in self._pairs]) if self._pairs else 0.0

    def latest(self) -> tuple[float, float]:
        """(predicted, actual) milliseconds of the last step."""
        return self._pairs[-1] if self._pairs else (0.0, 0.0)

    def _frugal(self) -> int:
        a_row = {rows: ms / rows for rows, ms in zip(self._body.rows, self._body.values, strict=True)}
        return max(LEAST_CHUNK, min(rows for rows, ms in a_row.items() if ms <= FRUGAL * min(a_row.values())))

    def _note_lateness(self, ms: float) -> None:
        while self._late and self._late[-1][1] <= ms:
            self._late.pop()
        self._late.append((self.steps, ms))
        if self._late[0][0] <= self.steps - LATENESS:
            self._late.popleft()


def _within(error: float, times: float) -> float:
    return max(-math.log(times), min(math.log(times), error))


def regime(rows: int) -> int:
    """Which of the kernels compute so many rows."""
    return bisect_left(REGIMES, rows)


def _rising(points: dict[int, float]) -> dict[int, float]:
    """More rows never take less: what noise says to the contrary is levelled."""
    most, level = 0.0, {}
    for rows in sorted(points):
        most = max(most, points[rows])
        level[rows] = most
    return level
