"""An engine on simulated time: steps take what a cost function says, and requests come in the middle of them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from millis.engine.engine import Engine
from millis.engine.predict import Table
from millis.engine.request import Request
from millis.engine.runner import Batch, Sampled
from millis.types import DeadlineError, OverloadError, SamplingParams

BODY = Table({1: 2.0, 8: 4.4, 9: 4.6, 23: 6.0, 24: 5.5, 128: 10.0, 512: 40.0})
HEAD = Table({1: 0.5, 8: 1.4, 16: 2.2})
SENTENCE_EVERY = 12  # tokens; END ends a sentence
END, WORD = 3, 5


class Clock:
    """Time that only steps, and waiting, move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner:
    """Takes a small model's times: `noise` of each step either way, and now and then the machine pauses."""

    vocab, context, page_tokens = 97, 4096, 32

    def __init__(
        self,
        clock: Clock,
        *,
        seed: int = 0,
        noise: float = 0.04,
        pauses: float = 0.0,
        speed: float = 1.0,
        pages: int = 2048,
        max_tokens: int = 512,
        max_sequences: int = 64,
    ) -> None:
        self.clock, self.noise, self.pauses, self.speed = clock, noise, pauses, speed
        self.pages, self.max_tokens, self.max_sequences = pages, max_tokens, max_sequences
        self.random = random.Random(seed)
        self.steps: list[tuple[float, list[int]]] = []  # milliseconds, lengths
        self.hidden_ms: list[float] = []  # of those that read texts for vectors
        self.advance: Callable[[float], None] = lambda until_s: setattr(clock, "now", until_s)

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Any:
        return set()

    def restricted(self, params: SamplingParams, tokens: Sequence[int], allowed: frozenset[int]) -> Any:
        return set(allowed)

    def _take(self, rows: int, samples: int, reads: int, lengths: list[int]) -> None:
        ms = (BODY(rows) + HEAD(samples) + 5e-4 * reads) * self.speed
        ms *= 1 + self.random.uniform(-self.noise, self.noise)
        if self.random.random() < self.pauses:
            ms += self.random.uniform(5, 25)
        self.steps.append((ms, lengths))
        self.advance(self.clock.now + ms / 1000)

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        assert len(batch.tokens) <= self.max_tokens and len(batch.starts) <= self.max_sequences
        serving = [id(sampler) for sampler in samplers if sampler is not None]
        assert len(set(serving)) == len(serving)
        lengths = [int(n) for n in batch.lengths]
        self._take(len(batch.tokens), sum(s is not None for s in samplers), int(batch.starts.sum()), lengths)
        tokens = []
        for start, length, sampler in zip(batch.starts, batch.lengths, samplers, strict=True):
            said = END if int(start + length) % SENTENCE_EVERY == 0 or sampler else WORD
            tokens.append([] if sampler is None else [said])
        return Sampled(tokens, [[None] * len(one) for one in tokens])

    def score_tree(self, batch: Batch, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        self._take(len(batch.tokens), len(set(rows)), int(batch.starts.sum()), [int(n) for n in batch.lengths])
        return np.zeros(len(targets), np.float32)

    def hidden(self, batch: Batch) -> np.ndarray:
        self._take(len(batch.tokens), 0, int(batch.starts.sum()), [int(n) for n in batch.lengths])
        self.hidden_ms.append(self.steps[-1][0])
        return np.ones((len(batch.tokens), 1), np.float32)

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        self._take(len(batch.tokens), len(batch.tokens), int(batch.starts.sum()), [len(batch.tokens)])
        return np.zeros(len(targets), np.float32)


@dataclass
class Arrival:
    """A request to come."""

    at_s: float
    prompt: int = 100
    answer: int = 32
    deadline_ms: float | None = 500.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of the arrivals."""

    engine: Engine
    admitted: list[tuple[Arrival, Request]] = field(default_factory=list)
    refused: list[tuple[Arrival, DeadlineError | OverloadError]] = field(default_factory=list)

    @property
    def late(self) -> int:
        """Admitted requests that were not done in time."""
        return sum(r.due_s is not None and not in_time(r) for _, r in self.admitted)

    @property
    def good(self) -> int:
        """Requests done in time."""
        return sum(in_time(r) for _, r in self.admitted)


def in_time(request: Request) -> bool:
    """Whether it was answered by its deadline."""
    slack = request.timings.slack_ms
    return request.answered and slack is not None and slack >= 0


def engine(seed: int = 0, *, calibrated: bool = True, **options: Any) -> Engine:
    """An engine on a TimedRunner; options are those of either."""
    clock = Clock()
    names = ("noise", "pauses", "speed", "pages", "max_tokens", "max_sequences")
    runner = TimedRunner(clock, seed=seed, **{name: options.pop(name) for name in names if name in options})
    made = Engine(
        runner,
        frozenset(),
        clock,
        **{"sentence_ends": frozenset({END}), "max_gap_ms": 30, "max_step_ms": 60, **options},
    )
    if calibrated:
        made.calibrate()
        runner.steps.clear()
        clock.now = 0.0
    return made


def run(e: Engine, arrivals: Sequence[Arrival], until_s: float = float("inf")) -> Outcome:
    """Lets requests come at their times, in the middle of steps too, until all is done."""
    out, coming, clock = Outcome(e), deque(sorted(arrivals, key=lambda a: a.at_s)), e.clock
    assert isinstance(clock, Clock)

    def advance(to_s: float) -> None:
        while coming and coming[0].at_s <= to_s:
            arrival = coming.popleft()
            clock.now = max(clock.now, arrival.at_s)
            deadline = None if arrival.deadline_ms is None else arrival.at_s + arrival.deadline_ms / 1000
            params = SamplingParams(max_tokens=arrival.answer, ignore_eos=True)
            try:
                request = e.submit(
                    [1] * arrival.prompt, params, arrival_s=arrival.at_s, deadline_s=deadline, **arrival.options
                )
                out.admitted.append((arrival, request))
            except (DeadlineError, OverloadError) as error:
                out.refused.append((arrival, error))
        clock.now = max(clock.now, to_s)

    e.runner.advance = advance  # type: ignore[attr-defined]
    while (coming or e.has_work) and clock.now < until_s:
        if not e.has_work:
            advance(coming[0].at_s)
        e.step()
        if e.counters.steps % 16 == 0:
            e.scheduler.check_integrity()
    e.scheduler.check_integrity()
    return out


def poisson(rate: float, count: int, seed: int = 1, **shape: Any) -> list[Arrival]:
    """So many arrivals a second, independent of each other."""
    source, at, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at += source.expovariate(rate)
        arrivals.append(Arrival(at, **shape))
    return arrivals
