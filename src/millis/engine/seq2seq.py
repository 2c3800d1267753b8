"""Answers of encoder-decoder models: texts are read together, then every answer grows by a token a step.

It grows until its end, its longest length or its deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millis.engine.beams import BeamSearch
from millis.engine.landing import Stage, stage
from millis.engine.seq2seq_runner import Chosen, Row, Seq2SeqRunner, Source
from millis.models.generation import Generation
from millis.types import DeadlineError, FinishReason, SamplingParams

MARGIN = 0.25  # of a step's time, that it may take longer than the ones before
SMOOTHING = 0.2  # weight of the latest measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How answers are to be written. deadline: on the clock of Writer, in seconds; None: any time. lands: whether one
    that will be late may end at a sentence end before its time is up."""

    generation: Generation
    params: SamplingParams
    beams: int
    deadline: float | None = None
    lands: bool = True


@dataclass(slots=True)
class Written:
    """An answer: its tokens without the one that ended it, and when its parts were done, on the clock of Writer."""

    tokens: list[int] = field(default_factory=list)
    reason: FinishReason = "deadline"
    begun: float = 0.0
    read: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    steps: int = 0


class Writer:
    """Writes answers. For one thread at a time; the clock gives seconds. sentence_ends: ids at which text may stop."""

    def __init__(
        self,
        runner: Seq2SeqRunner,
        sentence_ends: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner, self._sentence_ends, self._clock = runner, sentence_ends, clock
        self.token_ms = self.step_ms = 0.0  # to read a token; a step. 0: not known yet

    def write(self, texts: Sequence[Sequence[int]], wish: Wish, stop: Callable[[], bool] = bool) -> list[Written]:
        """The answer to each text, ids of 1 to the runner's context. DeadlineError: not even a token would be in time.

        Where time runs out the answers are what is written by then, up to a sentence end where one comes in time.
        stop: asked before every step; once it is true all that is unfinished is "cancelled".
        """
        self._refuse_late(texts, wish)
        answers = [Written(begun=self._clock()) for _ in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        together = self._runner.rows // wish.beams
        for at in range(0, len(order), together):
            group = order[at : at + together]
            if stop() or self._left_ms(wish) <= 0:
                for i in group:
                    answers[i].reason = "cancelled" if stop() else "deadline"
                    answers[i].begun = answers[i].read = answers[i].ended = self._clock()
                continue
            self._write_group([texts[i] for i in group], [answers[i] for i in group], wish, stop)
        return answers

    def measure(self, generation: Generation, beams: int = 1, rounds: int = 1) -> None:
        """Learns how long reading and steps take, once, so that a deadline can be promised."""
        if self.step_ms == 0:
            text = [generation.start] * min(16, self._runner.context)
            bare = replace(generation, min_length=4, no_repeat=0)
            for _ in range(rounds):
                self.write([text], Wish(generation=bare, params=SamplingParams(max_tokens=4), beams=beams))

    def least_ms(self, tokens: int) -> float:
        """What it takes to read a text of so many tokens and to write one; 0: not known yet."""
        return self.token_ms * tokens + (1 + MARGIN) * self.step_ms

    def _write_group(
        self, texts: Sequence[Sequence[int]], answers: Sequence[Written], wish: Wish, stop: Callable[[], bool]
    ) -> None:
        begun = self._clock()
        sources = self._runner.read(texts)
        read = self._clock()
        self.token_ms = _smoothed(self.token_ms, 1000 * (read - begun) / sum(map(len, texts)))
        make = _Searching if wish.beams > 1 else _Sampling
        under_way = [make(self._runner, source, wish, answer) for source, answer in zip(sources, answers, strict=True)]
        for answer in answers:
            answer.begun, answer.read = begun, read
        try:
            self._run(under_way, wish, stop)
        finally:
            self._runner.free([row for one in under_way for row in one.rows])
            self._runner.free(sources)

    def _run(self, under_way: Sequence[_Answer], wish: Wish, stop: Callable[[], bool]) -> None:
        active = list(under_way)
        while active:
            landing = self._stage(wish)
            if stop() or landing is None:
                reason: FinishReason = "cancelled" if stop() else "deadline"
                for one in active:
                    one.land(reason)
            else:
                begun, window = self._clock(), wish.lands and landing is Stage.WINDOW
                rows = [row for one in active for row in one.rows]
                found = iter(self._runner.step(rows, [sampler for one in active for sampler in one.samplers()]))
                for one in active:
                    one.take([next(found) for _ in one.rows])
                    if not one.done and (landing is Stage.LAST or (window and one.may_land(self._sentence_ends))):
                        one.land("deadline")
                self.step_ms = _smoothed(self.step_ms, 1000 * (self._clock() - begun))
            now = self._clock()
            for one in active:
                one.answer.first = one.answer.first or now
                if one.done:
                    one.answer.ended = now
                    self._runner.free(one.rows)
            active = [one for one in active if not one.done]

    def _left_ms(self, wish: Wish) -> float:
        return np.inf if wish.deadline is None else 1000 * (wish.deadline - self._clock())

    def _stage(self, wish: Wish) -> Stage | None:
        """How near the deadline is; None: there is no time for another step."""
        if wish.deadline is None:
            return Stage.FLYING
        left, margin = self._left_ms(wish), MARGIN * self.step_ms
        if left < self.step_ms + margin or left <= 0:
            return None
        return stage(left, self.step_ms, self.step_ms, margin)

    def _refuse_late(self, texts: Sequence[Sequence[int]], wish: Wish) -> None:
        longest = max(map(len, texts))
        needed = self.least_ms(longest)
        left = self._left_ms(wish)
        if left <= 0 or (self.step_ms and left < needed):
            raise DeadlineError(
                f"{left:.1f} ms are left, and to read {longest} tokens and write one takes about {needed:.1f} ms; "
                "give more time or a shorter text",
                predicted_ms=needed,
                retry_after_s=0.0,
            )


def _smoothed(known: float, measured: float) -> float:
    return measured if known == 0 else known + SMOOTHING * (measured - known)


class _Answer(Protocol):
    answer: Written
    rows: list[Row]
    done: bool

    def samplers(self) -> list[Any]:
        """One a row, that forbid what may not follow it."""
        ...

    def take(self, found: Sequence[Chosen]) -> None:
        """One token more."""
        ...

    def may_land(self, sentence_ends: frozenset[int]) -> bool:
        """Whether it may end here, where there is little time left."""
        ...

    def land(self, reason: FinishReason) -> None:
        """Ends it as it is."""
        ...


class _Sampling:
    """One row: the likeliest token each time, or one that is drawn."""

    def __init__(self, runner: Seq2SeqRunner, source: Source, wish: Wish, answer: Written) -> None:
        self.answer, self.done = answer, False
        self.rows = [runner.begin(source, wish.generation.start)]
        self._generation, self._most = wish.generation, wish.params.max_tokens
        self._vocab = runner.vocab
        self._sampler = runner.sampler(wish.params, wish.generation.banned)
        self._masked = False

    def samplers(self) -> list[Any]:
        forbidden = forbids(self._generation, self.rows[0].tokens) - set(self._generation.banned)
        if forbidden or self._masked:
            self._sampler.set_mask(_all_but(forbidden, self._vocab) if forbidden else None)
            self._masked = bool(forbidden)
        return [self._sampler]

    def take(self, found: Sequence[Chosen]) -> None:
        token = found[0][0]
        self.answer.steps += 1
        if token in self._generation.ends:
            return self.land("stop")
        self.answer.tokens.append(token)
        self.rows[0].tokens.append(token)
        if len(self.answer.tokens) == self._most:
            self.land("length")

    def may_land(self, sentence_ends: frozenset[int]) -> bool:
        return bool(self.answer.tokens) and self.answer.tokens[-1] in sentence_ends

    def land(self, reason: FinishReason) -> None:
        self.answer.reason, self.done = reason, True


class _Searching:
    """As many rows as beams."""

    def __init__(self, runner: Seq2SeqRunner, source: Source, wish: Wish, answer: Written) -> None:
        self.answer, self.done = answer, False
        self.rows = [runner.begin(source, wish.generation.start)]
        self._runner, self._generation, self._most = runner, wish.generation, wish.params.max_tokens
        self._search = BeamSearch(wish.generation, wish.beams, wish.params.max_tokens)
        self._forbidden: list[set[int]] = []

    def samplers(self) -> list[Any]:
        self._forbidden = [forbids(self._generation, row.tokens) for row in self.rows]
        params, looked_at = SamplingParams(), self._search.looked_at
        return [self._runner.sampler(params, best=looked_at + len(forbidden)) for forbidden in self._forbidden]

    def take(self, found: Sequence[Chosen]) -> None:
        self.answer.steps += 1
        best = [
            [(token, logprob) for token, logprob in chosen[2] if token not in forbidden]
            for chosen, forbidden in zip(found, self._forbidden, strict=True)
        ]
        forced = self._generation.forced_end
        if forced is not None and self.answer.steps == self._most:
            best = [[(forced, 0.0)] for _ in best]
        kept = self._search.advance(best)
        if self._search.done:
            return self.land("stop")
        self._follow(kept)

    def _follow(self, kept: Sequence[tuple[int, int]]) -> None:
        """The rows of the beams that run on: the last to continue a row takes it over, others get a copy."""
        uses = [place for place, _ in kept]
        rows: list[Row] = []
        for at, (place, _) in enumerate(kept):
            row = self.rows[place]
            rows.append(self._runner.fork(row) if place in uses[at + 1 :] else row)
        self._runner.free([row for place, row in enumerate(self.rows) if place not in uses])
        for row, (_, token) in zip(rows, kept, strict=True):
            row.tokens.append(token)
        self.rows = rows

    def may_land(self, sentence_ends: frozenset[int]) -> bool:
        return bool(self._search.finished) or self._search.best.tokens[-1] in sentence_ends

    def land(self, reason: FinishReason) -> None:
        tokens = self._search.best.tokens
        forced = self._generation.forced_end is not None and len(tokens) == self._most
        whole = bool(tokens) and tokens[-1] in self._generation.ends and not forced
        self.answer.tokens = [token for token in tokens if token not in self._generation.ends]
        self.answer.reason = "length" if reason == "stop" and not whole else reason
        self.done = True


def forbids(generation: Generation, tokens: Sequence[int]) -> set[int]:
    """Ids that may not follow `tokens`, the decoder's first one among them."""
    found = set(generation.banned)
    if len(tokens) < generation.min_length:
        found |= generation.ends
    if (size := generation.no_repeat) and len(tokens) >= size:
        suffix = tokens[len(tokens) + 1 - size :]
        found.update(tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == suffix)
    return found


def _all_but(forbidden: set[int], vocab: int) -> NDArray[np.uint32]:
    """[vocab / 32, rounded up] a bit for every id that may be chosen."""
    allowed = np.ones(-(-vocab // 32) * 32, np.uint8)
    allowed[list(forbidden)] = 0
    return np.packbits(allowed, bitorder="little").view(np.uint32)
