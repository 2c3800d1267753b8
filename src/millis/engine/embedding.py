"""Vectors of texts by a model that writes: read a piece at a time, so that answers take their steps between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millis.engine.pooling import groups, hidden_part, mean_hidden
from millis.engine.predict import LEAST_CHUNK, Work
from millis.engine.scheduler import Scheduler
from millis.engine.turn import Turn
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.engine.runner import Runner


class Embedding:
    """The mean of each prompt's final hidden states. One thread drives it, and closes it, whatever happens.

    Consecutive prompts that fit a piece are read together; one that is longer is read alone and holds its pages.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        runner: Runner,
        scheduler: Scheduler,
        turn: Turn,
        clock: Callable[[], float],
    ) -> None:
        self._waiting = list(prompts)
        self._runner, self._scheduler = runner, scheduler
        self._turn, self._clock = turn, clock
        self._pages: list[int] = []  # of the first of those that wait, where a piece of it was read
        self._done = 0  # tokens of it that were read,
        self._sum: NDArray[np.float32] | None = None  # [width] and the sum of their states
        self._means: list[NDArray[np.float32]] = []  # [n, width] of each group

    @property
    def whole(self) -> bool:
        """Whether every prompt is read."""
        return not self._waiting

    @property
    def vectors(self) -> NDArray[np.float32]:
        """[N, width] when it is whole."""
        return np.concatenate(self._means)

    def step(self) -> bool:
        """Reads a piece: as much as the answers under way have time for. False: nothing, for want of time or pages.

        RequestError: the KV cache is in use.
        """
        with self._turn.whole():
            rows = self._rows()
            if not rows:
                return False
            if self._done or len(self._waiting[0]) > rows:
                return self._read_part(rows)
            group = next(self._groups(rows))
            pages = self._take(group)
            if pages is None:
                return False
            try:
                self._means.append(mean_hidden(self._runner, group, pages))
            finally:
                self._scheduler.allocator.give(pages)
            del self._waiting[: len(group)]
            return True

    def close(self) -> None:
        """Gives back what it holds."""
        with self._turn:
            self._give()

    def left_ms(self) -> float:
        """What reading the rest is predicted to take, with nothing between; 0 as long as nothing was measured."""
        with self._turn:
            return self._left_ms()

    def hurries(self, due_s: float) -> bool:
        """Whether a step before the next piece would make it late, and none of the others has a deadline to keep."""
        with self._turn:
            now, costs = self._clock(), self._scheduler.costs
            needed_ms = self._left_ms() + costs.margin_ms + costs.latest()[1]
            return 1000 * (due_s - now) < needed_ms and math.isinf(
                self._scheduler.promises.spare_ms(now, self._scheduler.running)
            )

    def _rows(self) -> int:
        return self._scheduler.rows_between(self._clock(), self._done)

    def _groups(self, rows: int) -> Iterator[Sequence[Sequence[int]]]:
        return groups(self._waiting, self._runner, self._runner.pages // 2, rows)

    def _left_ms(self) -> float:
        costs, total = self._scheduler.costs, 0.0
        rows = self._rows() or min(LEAST_CHUNK, self._runner.max_tokens)
        for group in self._groups(rows):
            work = Work()
            for prompt in group:
                work = work.add(0, len(prompt), 0)
            total += costs.ms(work) if work.rows <= rows else costs.prefill_ms(work.rows, rows)
        return total - (costs.prefill_ms(self._done, rows) if self._done else 0.0)

    def _read_part(self, rows: int) -> bool:
        """Reads a piece of a prompt that is longer than one."""
        prompt = self._waiting[0]
        if not self._done:
            pages = self._take([prompt])
            if pages is None:
                return False
            self._pages = pages
            self._scheduler.lent += len(pages)
        states = hidden_part(self._runner, prompt, self._done, rows, self._pages).sum(axis=0)
        self._sum = states if self._sum is None else self._sum + states
        self._done += rows
        if self._done >= len(prompt):
            self._means.append(np.asarray(self._sum, np.float32)[None] / np.float32(len(prompt)))
            self._give()
            self._done, self._sum = 0, None
            del self._waiting[0]
        return True

    def _take(self, group: Sequence[Sequence[int]]) -> list[int] | None:
        """Pages for a group, which requests lose if need be; None: they are lent to others that are read."""
        scheduler = self._scheduler
        count = sum(-(-len(prompt) // self._runner.page_tokens) for prompt in group)
        pinned = 0 if scheduler.prefix is None else scheduler.prefix.pinned_pages
        if scheduler.lent and count > scheduler.allocator.pages - pinned - scheduler.lent:
            return None
        pages = scheduler.allocator.take(count) if scheduler.reclaim(count) else None
        if pages is None:
            raise RequestError("the KV cache is in use; try again, or raise cache_tokens")
        return pages

    def _give(self) -> None:
        self._scheduler.lent -= len(self._pages)
        self._scheduler.allocator.give(self._pages)
