"""Measures what steps take on this machine, by running some without a request: the start of a StepModel."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from millis.engine.predict import StepModel
from millis.engine.runner import Batch, Runner
from millis.types import SamplingParams

BODY = (1, 8, 24, 128, 64, 2, 23, 9, 16, 4, 32, 256, 512, 1024)  # rows, what is needed most first
HEADS_AFTER = {1: (1,), 128: (8, 2, 16, 4, 24, 32, 64)}  # sequences that sample, once so many rows are known
QUICK = 4  # of BODY
REPEATS, REPEATS_WIDE, WIDE = 5, 3, 24  # runs of a step, of one with so many rows
CONTEXT = 768  # positions before the steps that tell what attention costs


class Bench:
    """Runs synthetic steps in pages that nobody holds and times them."""

    def __init__(self, runner: Runner, clock: Callable[[], float], pages: list[int], budget_s: float) -> None:
        self._runner, self._clock, self._pages = runner, clock, pages
        self._end_s = clock() + budget_s
        self._latest = (1, 0.0)  # rows, seconds
        self._samplers: list[Any] = []  # one serves one sequence

    @property
    def room(self) -> int:
        """Positions that the pages hold."""
        return min(self._runner.context, len(self._pages) * self._runner.page_tokens)

    def ms(self, starts: list[int], lengths: list[int], samples: bool, repeats: int | None = None) -> float | None:
        """Median of some runs of such a step; None: no time is left for it."""
        took: list[float] = []
        rows = sum(lengths)
        repeats = repeats or (REPEATS if rows < WIDE else REPEATS_WIDE)
        while len(self._samplers) < len(lengths) * samples:
            self._samplers.append(self._runner.sampler(SamplingParams(), [0]))
        samplers = self._samplers[: len(lengths)] if samples else [None] * len(lengths)
        for _ in range(repeats):
            begin = self._clock()
            if begin + (took[-1] if took else self._guess_s(rows)) > self._end_s:
                break
            self._runner.step(self._batch(starts, lengths), samplers)
            took.append(self._clock() - begin)
        if not took:
            return None
        self._latest = (rows, statistics.median(took))
        return 1000 * self._latest[1]

    def _guess_s(self, rows: int) -> float:
        """What a step probably takes, from the latest one: half as much for a further row."""
        known, took = self._latest
        return took * (1 + max(0, rows - known) / known / 2)

    def _batch(self, starts: list[int], lengths: list[int]) -> Batch:
        width = max(-(-(s + n) // self._runner.page_tokens) for s, n in zip(starts, lengths, strict=True))
        tables = np.empty((len(lengths), width), np.int32)
        for row in range(len(lengths)):  # rows begin in different pages where there are enough
            tables[row] = [self._pages[(row * width + at) % len(self._pages)] for at in range(width)]
        ints = np.int32
        return Batch(np.zeros(sum(lengths), ints), np.asarray(starts, ints), np.asarray(lengths, ints), tables)


def calibrate(
    model: StepModel,
    runner: Runner,
    clock: Callable[[], float],
    pages: list[int],
    *,
    budget_s: float = 1.5,
    quick: bool = False,
) -> None:
    """Fills `model` from steps run in `pages`, which the caller holds; nothing else may use the runner meanwhile.

    It ends when `budget_s` seconds are over, with one step more at most. quick: a handful of steps only.
    """
    bench = Bench(runner, clock, pages, budget_s)
    bench.ms([0], [1], True, repeats=1)  # the first step of a process is not like the others
    body: dict[int, float] = {}
    head: dict[int, float] = {}
    read_ms = pair_ms = 0.0
    most = min(runner.max_tokens, bench.room - 1)
    for rows in BODY[: QUICK if quick else len(BODY)]:
        if rows <= most and (ms := bench.ms([0], [rows], False)) is not None:
            body[rows] = ms
        for count in HEADS_AFTER.get(rows, ()) if body else ():
            many = count <= min(runner.max_sequences, runner.max_tokens) and (not quick or count <= 8)
            if many and (ms := bench.ms([0] * count, [1] * count, True)) is not None:
                head[count] = max(0.0, ms - _between(body, count))
        far = min(CONTEXT, bench.room - 65)
        if rows == 64 and not quick and far > 64:
            long, near = bench.ms([far], [1], False), bench.ms([0], [min(64, most)], False)
            wide = bench.ms([far], [min(64, most)], False)
            read_ms = 0.0 if long is None else (long - body[1]) / far
            pair_ms = 0.0 if wide is None or near is None else (wide - near) / (far * min(64, most))
    if body:
        model.calibrate(body, head or {1: 0.0}, read_ms, pair_ms)


def _between(body: dict[int, float], rows: int) -> float:
    below = max((n for n in body if n <= rows), default=min(body))
    above = min((n for n in body if n >= rows), default=max(body))
    share = 0.0 if above <= below else (rows - below) / (above - below)
    return body[below] + share * (body[above] - body[below])
