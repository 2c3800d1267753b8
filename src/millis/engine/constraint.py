"""A request's grammar at work in the engine: its matcher, and the mask of its sampler, made while the model computes.

The mask for the token behind the pending ones depends on accepted tokens only. So its computation starts when they are
known, on a thread of its own, and the sampler waits for it where it is not there when the logits are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millis.types import GrammarError


class Matcher(Protocol):
    """See millis.engine.grammar."""

    @property
    def stopped(self) -> bool: ...
    def mask(self) -> NDArray[np.uint32]: ...
    def accept(self, token: int) -> None: ...
    def forced(self) -> list[int]: ...
    def closing(self) -> list[int] | None: ...


class Constraint:
    """One request's. `jump`: forced tokens skip the model; else it computes them, with their log-probabilities."""

    def __init__(self, matcher: Matcher, sampler: Any, jump: bool) -> None:
        self.matcher = matcher
        self.error: GrammarError | None = None  # why there was no mask; what was chosen since then is worth nothing
        self._sampler, self._jump = sampler, jump

    def begin(self) -> list[int]:
        """The tokens that every answer begins with; the first mask is under way. Call once."""
        forced = self._take_forced()
        self._request_mask()
        return forced

    def check(self) -> None:
        """GrammarError: there was no mask for the token that was chosen."""
        if self.error is not None:
            raise self.error

    def advance(self, token: int) -> list[int]:
        """Accepts a chosen token; returns those that must follow. GrammarError: none may."""
        self.check()
        self.matcher.accept(token)
        forced = self._take_forced()
        self._request_mask()
        return forced

    @property
    def stopped(self) -> bool:
        """Whether the answer is whole."""
        return self.matcher.stopped

    def closing(self) -> list[int] | None:
        """Tokens that make the answer whole, found without the model; None where none were found."""
        return self.matcher.closing()

    def _take_forced(self) -> list[int]:
        forced = [] if not self._jump or self.matcher.stopped else self.matcher.forced()
        for token in forced:
            self.matcher.accept(token)
        if forced:
            self._sampler.commit(np.asarray(forced, np.int32))
        return forced

    def _request_mask(self) -> None:
        if not self.matcher.stopped:
            self._sampler.expect_mask()
            _masks().submit(self._set_mask)

    def _set_mask(self) -> None:
        try:
            self._sampler.set_mask(self.matcher.mask())
        except Exception as error:
            self.error = error if isinstance(error, GrammarError) else GrammarError(f"the grammar failed: {error}")
            self._sampler.set_mask(None)


@cache
def _masks() -> ThreadPoolExecutor:
    """One thread for the masks of all requests: most take microseconds, and the processors are the model's."""
    return ThreadPoolExecutor(1, thread_name_prefix="millis-masks")
