"""The requests with a deadline that were admitted, and what is still owed to them."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from millis.engine.admission import Caution, Debt, Pace, slacks
from millis.engine.predict import StepModel, Work
from millis.engine.request import Request


@dataclass(frozen=True, slots=True)
class Verdict:
    """What admitting a request would mean."""

    short_ms: float  # by which it, or one behind it, would be late; 0: all are in time
    ms: float  # until its shortest useful answer is done
    alone_ms: float  # likewise, had the engine nothing else to do
    work_ms: float  # computing that it asks for


class Promises:
    """Keeps the debts in the order in which prompts are computed: by the latest time each must be."""

    def __init__(self, costs: StepModel, *, slots: int, max_tokens: int) -> None:
        self.caution = Caution()
        self._costs = costs
        self._slots = slots
        self._max_tokens = max_tokens
        self._owing: list[Request] = []

    @property
    def _chunk(self) -> int:
        return min(self._max_tokens, self._costs.chunk)

    def add(self, request: Request) -> None:
        """Promises a request its deadline, if it has one."""
        if request.due_s is not None:
            insort(self._owing, request, key=_latest)

    def settle(self, request: Request) -> None:
        """Nothing more is owed to a request."""
        if request.due_s is not None and request in self._owing:
            self._owing.remove(request)

    def latest_s(self, due_s: float, tokens: int) -> float:
        """When a prompt must be computed so that `tokens` tokens are there by `due_s`."""
        return due_s - tokens * self._costs.decode_ms(1, 0) / 1000

    def spare_ms(self, now_s: float, running: Sequence[Request]) -> float:
        """Time that may go to other work without a promise being broken; negative when one will be."""
        if not self._owing or not self._costs.known:
            return math.inf
        return min(
            (slack for slack, _ in slacks(self._debts(), now_s, self._pace(running), self.caution)), default=math.inf
        )

    def consider(self, request: Request, start_s: float, running: Sequence[Request]) -> Verdict:
        """What would be if a request were admitted now and the next step began at `start_s`."""
        debt, pace = self._debt(request), self._pace(running)
        debts = self._debts()
        before = [slack for slack, _ in slacks(debts, start_s, pace, self.caution)]
        at = sum(other.latest_s <= request.latest_s for other in self._owing if _is_owed(other))
        debts.insert(at, debt)
        found = [*slacks(debts, start_s, pace, self.caution)]
        before.insert(at, math.inf)
        short = max((-slack for (slack, _), was in zip(found, before, strict=True) if slack < was), default=0.0)
        alone = self._costs.decode_ms(1, len(request.tokens)) * debt.tokens + debt.prefill_ms
        work = debt.prefill_ms + debt.tokens * (pace.row_ms + pace.base_ms / min(pace.slots, max(1, pace.decoding)))
        return Verdict(max(0.0, short), found[at][1], alone, work)

    def _debts(self) -> list[Debt]:
        return [self._debt(request) for request in self._owing if _is_owed(request)]

    def _debt(self, request: Request) -> Debt:
        assert request.due_s is not None
        if request.decoding and request.pages:
            return Debt(request.due_s, 0.0, request.owed, request.left, True)
        computed, plain_ms = request.plain_ms
        score = request.score
        if computed != request.computed or score is not None:
            plain_ms = self._costs.prefill_plain_ms(request.computed, request.pending, self._chunk)
            if score is not None:
                plain_ms += sum(
                    self._costs.plain_ms(Work(len(rest), len(rest), 0, len(rest) * len(request.tokens)))
                    for rest in score.continuations[len(score.values) :]
                )
            request.plain_ms = (request.computed, plain_ms)
        return Debt(request.due_s, plain_ms * self._costs.factor(self._chunk), request.owed, request.left, False)

    def _pace(self, running: Sequence[Request]) -> Pace:
        decoding = [request for request in running if request.decoding]
        context = sum(len(request.tokens) for request in decoding) // max(1, len(decoding))
        waiting = sum(not other.pages for other in self._owing)
        most = max(1, min(self._slots, len(decoding) + waiting + 1))
        one, all_ms = self._costs.decode_ms(1, context), self._costs.decode_ms(most, context)
        row_ms = min(all_ms / most, (all_ms - one) / max(1, most - 1))
        return Pace(
            base_ms=one - row_ms if most > 1 else one,
            row_ms=row_ms,
            chunk_ms=self._costs.prefill_ms(self._chunk, self._chunk),
            slots=self._slots,
            decoding=len(decoding),
            most=sum(request.left for request in decoding),
            margin_ms=self._costs.margin_ms,
        )


def _latest(request: Request) -> float:
    return request.latest_s


def _is_owed(request: Request) -> bool:
    return request.score is not None or request.owed > 0
