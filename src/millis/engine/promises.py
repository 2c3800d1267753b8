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
    spare_ms: float  # time that is left to others then; negative when somebody is late anyway
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
        debt, pace = self._debt(request, self._costs.factor(self._chunk)), self._pace(running)
        at = sum(other.latest_s <= request.latest_s for other in self._owing if _is_owed(other))
        debts = self._debts()
        changed = [*debts[:at], debt, *debts[at:]]
        found = []
        for count, (slack, ms) in enumerate(slacks(changed, start_s, pace, self.caution)):
            found.append((slack, ms))
            if count == at and slack < 0:  # late itself: others do not matter
                break
        short = max(0.0, -found[at][0])
        if not short and any(slack < 0 for slack, _ in found):  # but those who are late anyway do not count
            before = [slack for slack, _ in slacks(debts, start_s, pace, self.caution)]
            before.insert(at, 0.0)
            short = max((-slack for (slack, _), was in zip(found, before, strict=True) if slack < was), default=0.0)
        alone = self._costs.decode_ms(1, len(request.tokens)) * debt.tokens + debt.prefill_ms
        work = debt.prefill_ms + debt.tokens * self._costs.decode_ms(self._slots, 0) / self._slots
        return Verdict(max(0.0, short), min(slack for slack, _ in found), found[at][1], alone, work)

    def _debts(self) -> list[Debt]:
        factor = self._costs.factor(self._chunk)
        return [self._debt(request, factor) for request in self._owing if _is_owed(request)]

    def _debt(self, request: Request, factor: float) -> Debt:
        assert request.due_s is not None
        length = len(request.tokens)
        if request.score is not None:
            return Debt(request.due_s, self._score_plain_ms(request) * factor, 0, 0, False)
        owed, left = max(0, request.minimum + request.prompt_tokens - length), request.limit - length
        if request.pages and length - request.computed == 1:
            return Debt(request.due_s, 0.0, owed, left, True)
        start = request.start
        if request.plain_ms[0] != start:
            plain_ms = self._costs.prefill_plain_ms(start, length - start, self._chunk)
            request.plain_ms = (start, plain_ms)
        return Debt(request.due_s, request.plain_ms[1] * factor, owed, left, False)

    def _score_plain_ms(self, request: Request) -> float:
        assert request.score is not None
        if request.score.parts and request.score.parts[0][1] is not None:  # their first tokens are the least there is
            rows = len(request.tokens) - request.start
            return self._costs.plain_ms(Work().add(request.start, rows, 1))
        waiting = request.score.continuations[len(request.score.values) :]
        context = len(request.tokens)
        start = request.start
        return self._costs.prefill_plain_ms(start, max(0, context - 1 - start), self._chunk) + sum(
            self._costs.plain_ms(Work(len(one), len(one), 0, len(one) * context)) for one in waiting
        )

    def _pace(self, running: Sequence[Request]) -> Pace:
        decoding = [request for request in running if request.decoding]
        behind = [request for request in self._owing if not (request.decoding and request.pages)]
        count = len(decoding) + len(behind)
        context = sum(len(request.tokens) for request in (*decoding, *behind)) // max(1, count)
        most = min(self._slots, count + 1)
        one, all_ms = self._costs.decode_ms(1, context), self._costs.decode_ms(most, context)
        row_ms = min(all_ms / most, (all_ms - one) / max(1, most - 1))
        chunk_ms = max(1e-3, self._costs.prefill_ms(self._chunk, self._chunk))
        return Pace(
            base_ms=one - row_ms if most > 1 else one,
            row_ms=row_ms,
            chunk_ms=chunk_ms,
            slots=self._slots,
            decoding=len(decoding),
            most=sum(request.left for request in decoding),
            margin_ms=self._costs.margin_ms + chunk_ms,  # a step that has begun is not interrupted
        )


def _latest(request: Request) -> float:
    return request.latest_s


def _is_owed(request: Request) -> bool:
    return request.score is not None or request.minimum + request.prompt_tokens > len(request.tokens)
