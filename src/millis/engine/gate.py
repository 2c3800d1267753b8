"""Which requests are refused before any of them is computed: those that would be late, or be too many."""

from __future__ import annotations

import math
from collections.abc import Callable

from millis.engine.load import Counters
from millis.engine.missed import Missed
from millis.engine.promises import Verdict
from millis.engine.request import Request
from millis.engine.scheduler import Scheduler
from millis.engine.turn import Turn
from millis.types import DeadlineError, OverloadError

RESERVE = 4.0  # requests like its own for which a tenant that has had its share leaves room
NEVER_S = 60.0  # when to try again what would be late on an idle engine, too


class Gate:
    """Refuses requests on their way to a scheduler. Its methods are called under the lock of `turn`.

    delivery_ms: what passes between an answer's last event and its reader; deadlines are kept so much earlier.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        counters: Counters,
        turn: Turn,
        clock: Callable[[], float],
        *,
        delivery_ms: float,
        max_waiting: int,
    ) -> None:
        self.free_s = -math.inf  # when the step under way is thought to end
        self.doubted = False  # a request was refused although nothing ran
        self.missed = Missed()
        self._scheduler = scheduler
        self._costs = scheduler.costs
        self._counters = counters
        self._turn = turn
        self._clock = clock
        self._delivery_ms = delivery_ms
        self._max_waiting = max_waiting

    def check_early(self, request: Request) -> None:
        """As `check`, of what has no chance as things stand; nothing is promised yet to what has one."""
        self._check_room()
        if request.deadline_s is not None and self._costs.known:
            self._aim(request, request.deadline_s)
            if self._consider(request, self._clock()).short_ms:
                self._promise(request, request.deadline_s)

    def check(self, request: Request) -> None:
        """OverloadError: too many requests wait. DeadlineError: its deadline cannot be kept; else it is promised."""
        self._check_room()
        if request.deadline_s is not None:
            self._promise(request, request.deadline_s)

    def _check_room(self) -> None:
        waiting = len(self._scheduler.waiting)
        if waiting >= self._max_waiting:
            self._counters.refused_overload += 1
            retry_s = self._scheduler.backlog_ms() / 1000
            raise OverloadError(
                f"{waiting} requests wait already; try again in {retry_s:.1f} s", retry_after_s=max(0.1, retry_s)
            )

    def _aim(self, request: Request, deadline_s: float) -> None:
        """Says when a request must be done, and how much of it need not be computed."""
        prefix = self._scheduler.prefix
        if prefix is not None and request.caches:
            request.cached = prefix.match_length(request.salt, request.tokens)
        request.due_s = deadline_s - self._delivery_ms / 1000
        request.latest_s = self._scheduler.promises.latest_s(request.due_s, request.owed)

    def _consider(self, request: Request, now: float) -> Verdict:
        """What would be if the request were admitted now."""
        start = max(now, self.free_s) if self._turn.taken else now
        return self._scheduler.promises.consider(request, start, self._scheduler.running)

    def _promise(self, request: Request, deadline_s: float) -> None:
        """Refuses a deadline that cannot be kept."""
        now = self._clock()
        self._aim(request, deadline_s)
        assert request.due_s is not None
        left_ms = 1000 * (request.due_s - now)
        if left_ms > 0 and not self._costs.known:  # nothing to predict from: it is tried
            return
        verdict = self._consider(request, now)
        tenants, work_ms = self._scheduler.tenants, verdict.work_ms
        wanted_ms = 1000 * (deadline_s - request.arrival_s)
        never = verdict.alone_ms + self._delivery_ms > wanted_ms
        tenants.ask(request.tenant, work_ms, now)
        greedy = verdict.spare_ms < RESERVE * work_ms and tenants.over_share(request.tenant, now)
        crowded = not (verdict.short_ms or greedy) and not self._scheduler.has_pages_for(request, now)
        if left_ms > 0 and not (verdict.short_ms or greedy or crowded):
            tenants.grant(request.tenant, work_ms, now)
            return
        if not greedy and not never:
            tenants.refuse(request.tenant, now)
        self._counters.refused_deadline += 1
        idle = not self._scheduler.has_work
        if left_ms > 0 and (never or idle) and self._scheduler.prefix is not None:
            self.missed.note(request)
        if left_ms > 0 and idle:
            self.doubted = True
            self._scheduler.promises.caution.doubt()
        asked_ms = wanted_ms if request.asked_ms is None else request.asked_ms
        behind_ms = self._delivery_ms + asked_ms - wanted_ms  # the engine
        ms = 1000 * (now - request.arrival_s) + behind_ms + max(verdict.ms, left_ms + verdict.short_ms)
        why = f"the shortest useful answer would take {ms:.0f} ms"
        if not verdict.short_ms:
            why = "others have not had their share" if greedy else "the KV cache is promised to others"
        asked = f"{asked_ms:.0f}" if asked_ms >= 1 else f"{asked_ms:.3f}"
        raise DeadlineError(
            f"the deadline of {asked} ms cannot be met: {why}; allow more time, or ask for less",
            predicted_ms=ms,
            retry_after_s=NEVER_S if never else max(0.01, verdict.short_ms / 1000),
        )
