"""Requests with a deadline whose readers do something else: a thread goes on with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from millis.engine.load import Counters
from millis.engine.request import Request
from millis.engine.turn import Turn

KEEPER_S = 0.005  # for which nobody computes before the keeper does


class Keeper:
    """Steps whenever nobody else does, until no kept request is left."""

    def __init__(self, turn: Turn, counters: Counters) -> None:
        self._turn = turn
        self._counters = counters
        self._kept: list[Request] = []
        self._thread: threading.Thread | None = None

    def keep(self, request: Request, lead: Callable[[], bool]) -> None:
        """Sees to a request until it has ended. lead: runs a step for whoever has taken the turn, and gives it back."""
        with self._turn:
            self._kept.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(lead,), name="keeper", daemon=True)
                self._thread.start()

    def _run(self, lead: Callable[[], bool]) -> None:
        seen = -1  # steps that had been taken when nobody computed KEEPER_S ago
        while True:
            with self._turn:
                self._kept = [one for one in self._kept if one.finish_reason is None and not one.abandoned]
                if not self._kept:
                    self._thread = None
                    return
                idle = not self._turn.taken and not self._turn.awaited
                steps = idle and seen == self._counters.steps
                seen = self._counters.steps if idle else -1
                if steps:
                    self._turn.take()
            if steps:
                with suppress(Exception):  # its requests have it, for their readers
                    lead()
                steps, seen = seen != self._counters.steps, self._counters.steps  # the next one follows at once
            if not steps:
                time.sleep(KEEPER_S)
