"""Which texts an encoder reads next, and whose deadline it can keep (earliest first; Liu and Layland, 1973). Pure.

A step reads a few texts in one call; a request of many takes several, and what is due sooner goes between them.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from millis.engine.admission import Caution
from millis.engine.predict import StepModel, Work
from millis.engine.scheduler import CLASSES
from millis.types import DeadlineError, OverloadError, Priority

STEPS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512)  # tokens of a text whose times are measured
QUICK = (8, 32, 128)
REPEATS = 3
# Of the time until a deadline, for steps that take longer than predicted. Readings take milliseconds, a pause of the
# machine longer than many of their deadlines.
MOST_MARGIN = 0.1
FEW = 8  # texts of a request that are planned one by one
WIDE, NARROW = 256, 16  # tokens of one text, and of each of many, that tell what attention costs


@dataclass(slots=True, eq=False, kw_only=True)
class Reading:
    """The texts of one request. `made`: what came of each so far."""

    id: int
    texts: Sequence[Sequence[int]]
    arrival_s: float
    due_s: float = math.inf
    asked_ms: float | None = None  # the deadline from arrival, as a refusal names it; None: until due_s
    priority: Priority = "standard"
    head: bool = False  # the head's logits are wanted, not a vector
    longest: int = 1 << 30  # tokens of a text that the network reads
    begin_s: float | None = None  # of its first step
    begun: int = 0  # texts that a step has taken
    steps: int = 0
    made: list[Any] = field(default_factory=list)
    alone_ms: float = 0.0  # that its steps were thought to take, when it came
    sizes: list[int] = field(init=False)  # tokens of each text that the network reads,
    tokens: int = field(init=False)  # of all of them,
    left: int = field(init=False)  # and those that no step has taken

    def __post_init__(self) -> None:
        self.sizes = [min(len(text), self.longest) for text in self.texts]
        self.tokens = self.left = sum(self.sizes)

    @property
    def whole(self) -> bool:
        """Whether every text is read."""
        return len(self.made) == len(self.texts)


class Readings:
    """All that waits. Not safe for several threads at once."""

    def __init__(self, costs: StepModel, *, max_tokens: int, max_waiting: int) -> None:
        self._costs = costs
        self._caution = Caution(MOST_MARGIN)
        self._max_tokens, self._max_waiting = max_tokens, max_waiting
        self._waiting: list[Reading] = []
        self._busy_s = 0.0  # when the step under way is thought to end

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, reading: Reading, now_s: float) -> None:
        """Admits a request. OverloadError: too many wait. DeadlineError: it, or one that was promised its deadline
        before, would be late."""
        if len(self._waiting) >= self._max_waiting:
            wait_s = max(0.1, self.backlog_ms(now_s) / 1000)
            raise OverloadError(
                f"{len(self._waiting)} requests wait already; try again in {wait_s:.1f} s", retry_after_s=wait_s
            )
        *_, reading.alone_ms = 0.0, *(ms for _, ms in self._ends([reading]))
        changed = [*self._waiting]
        insort(changed, reading, key=_order)
        promised = [one for one in changed if math.isfinite(one.due_s)]  # they stand before all others
        if reading in promised:
            self._check(reading, promised, now_s)
        self._waiting = changed

    def drop(self, number: int) -> None:
        """Forgets a request that nobody waits for."""
        self._waiting = [one for one in self._waiting if one.id != number]

    def late(self, now_s: float) -> list[Reading]:
        """Takes out those whose deadline has passed: nobody needs their answer any more."""
        gone = [one for one in self._waiting if one.due_s < now_s]
        for one in gone:
            self.drop(one.id)
            self.learn(False)
        return gone

    def learn(self, met: bool) -> None:
        """Takes in how an admitted request ended."""
        self._caution.learn(met)

    def step(self, now_s: float) -> list[tuple[Reading, int]]:
        """The texts to read together now, each as its request and its number there; [] where nothing waits.

        More texts than the first are taken where that saves time and nobody in the step is late for it.
        """
        chosen: list[tuple[Reading, int]] = []
        work, due_s = Work(), math.inf
        for reading, at in self._next():
            more = _add(work, reading.sizes[at])
            if chosen:
                ms = self._costs.ms(more)
                if reading.head != chosen[0][0].head or more.rows > self._room or now_s + ms / 1000 > due_s:
                    break
            work, due_s = more, min(due_s, reading.due_s)
            chosen.append((reading, at))
        for reading, at in chosen:
            reading.begin_s = now_s if reading.begin_s is None else reading.begin_s
            reading.begun = at + 1
            reading.left -= reading.sizes[at]
        for reading in {id(reading): reading for reading, _ in chosen}.values():
            reading.steps += 1
        self._waiting = [one for one in self._waiting if one.begun < len(one.texts)]
        self._busy_s = now_s + self._costs.ms(work) / 1000
        return chosen

    def undo(self, chosen: Sequence[tuple[Reading, int]]) -> None:
        """Takes back a step that failed: its texts wait again."""
        for reading, at in reversed(chosen):
            reading.begun = at
            reading.left += reading.sizes[at]
        for reading in {id(reading): reading for reading, _ in chosen}.values():
            reading.steps -= 1
            if reading not in self._waiting:
                insort(self._waiting, reading, key=_order)

    def observe(self, chosen: Sequence[tuple[Reading, int]], took_ms: float) -> float:
        """Takes in how long a step took; what had been predicted, in milliseconds."""
        work = _work([reading.sizes[at] for reading, at in chosen])
        predicted = self._costs.ms(work)
        self._costs.observe(work, predicted, took_ms)
        return predicted

    def backlog_ms(self, now_s: float) -> float:
        """Until everything that waits is read."""
        *_, ms = 0.0, *(ms for _, ms in self._ends(self._waiting))
        return self._begin_ms(now_s) + ms

    @property
    def _room(self) -> int:
        """Tokens of a step: more of them save little, and whoever comes meanwhile waits for them."""
        return min(self._max_tokens, self._costs.chunk)

    def _next(self) -> Iterator[tuple[Reading, int]]:
        for reading in self._waiting:
            for at in range(reading.begun, len(reading.texts)):
                yield reading, at

    def _check(self, new: Reading, promised: Sequence[Reading], now_s: float) -> None:
        begin_ms = self._begin_ms(now_s)
        before = dict(self._ends([one for one in promised if one is not new]))
        mine_ms = short_ms = 0.0
        for one, ms in self._ends(promised):
            left_ms = 1000 * (one.due_s - now_s)
            free_ms = left_ms - self._hand_ms(left_ms) - begin_ms
            mine_ms = begin_ms + ms if one is new else mine_ms
            if ms > free_ms and (one is new or before[one] <= free_ms):
                short_ms = max(short_ms, ms - free_ms)
                if one is new:
                    break
        if short_ms > 0:
            self._caution.doubt()
            waited_ms, left_ms = 1000 * (now_s - new.arrival_s), 1000 * (new.due_s - new.arrival_s)
            late = mine_ms + waited_ms > left_ms - self._hand_ms(left_ms)
            asked_ms = left_ms if new.asked_ms is None else new.asked_ms
            predicted_ms = mine_ms + waited_ms + self._hand_ms(left_ms) + asked_ms - left_ms
            who = "the answer would take" if late else "requests before it would be late; it would take"
            raise DeadlineError(
                f"the deadline of {asked_ms:.1f} ms cannot be met: {who} {predicted_ms:.1f} ms; allow more time",
                predicted_ms=predicted_ms,
                retry_after_s=short_ms / 1000,
            )

    def _hand_ms(self, left_ms: float) -> float:
        """Of the time until a deadline, what may not be planned with."""
        return self._caution.hand_ms(left_ms, self._costs.margin_ms)

    def _begin_ms(self, now_s: float) -> float:
        return max(0.0, 1000 * (self._busy_s - now_s))

    def _ends(self, waiting: Sequence[Reading]) -> Iterator[tuple[Reading, float]]:
        """Milliseconds until each is read, one behind the other, in steps as `step` makes them."""
        ms, work, head = 0.0, Work(), False
        for reading in waiting:
            if reading.alone_ms and len(reading.texts) - reading.begun > FEW:  # not all of its texts one by one again
                ms += self._costs.ms(work) + reading.alone_ms * reading.left / reading.tokens
                work = Work()
            else:
                for size in reading.sizes[reading.begun :]:
                    more = _add(work, size)
                    if work.rows and (more.rows > self._room or reading.head != head):
                        ms += self._costs.ms(work)
                        more = _add(Work(), size)
                    work, head = more, reading.head
            yield reading, ms + self._costs.ms(work)


def calibrate(
    costs: StepModel, read: Callable[[list[list[int]]], object], clock: Callable[[], float], context: int, quick: bool
) -> None:
    """Measures what reading takes. read: computes some texts. quick: a few sizes only."""

    def ms(lengths: list[int]) -> float:
        texts, took = [[0] * length for length in lengths], []
        for _ in range(REPEATS):
            begin = clock()
            read(texts)
            took.append(1000 * (clock() - begin))
        return sorted(took)[REPEATS // 2]

    short = min(NARROW, context)
    ms([short])  # the first of a process is not like the others
    body = {}
    for tokens in QUICK if quick else STEPS:
        many, rest = divmod(tokens, short)
        body[tokens] = ms([short] * many + ([rest] if rest else []))
    wide = min(WIDE, context)
    pair_ms = 0.0
    if wide >= 4 * short and not quick:
        many = wide // short
        pair_ms = (ms([wide]) - ms([short] * many)) / (wide * wide - many * short * short)
    costs.calibrate(body, {1: 0.0}, 0.0, pair_ms)


def _order(reading: Reading) -> tuple[float, int, float]:
    """Deadlines first; what has none by its class, then as it came."""
    return reading.due_s, CLASSES[reading.priority], reading.arrival_s


def _add(work: Work, tokens: int) -> Work:
    return Work(work.rows + tokens, 0, 0, work.pairs + tokens * tokens)


def _work(sizes: Sequence[int]) -> Work:
    return Work(sum(sizes), 0, 0, sum(size**2 for size in sizes))
