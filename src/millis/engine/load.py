"""What an engine is doing and has counted, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(slots=True)
class Counters:
    """Since the engine was made."""

    steps: int = 0
    admitted: int = 0
    refused_deadline: int = 0  # could not have been in time, or at the cost of others
    refused_overload: int = 0  # too many waited
    met: int = 0  # deadlines of admitted requests, delivery included
    missed: int = 0
    landed: int = 0  # answers ended early, at a sentence end or closed by their grammar

    def copy(self) -> Counters:
        """As they stand now."""
        return replace(self)


@dataclass(frozen=True, slots=True)
class Load:
    """A moment's view."""

    running: int  # requests that hold pages
    waiting: int
    pages: int
    free_pages: int
    preemptions: int  # of requests that lost their pages for a while, since the start
    backlog_ms: float  # that computing the prompts which wait is thought to take
    step_predicted_ms: float  # of the latest step
    step_actual_ms: float
    median_error: float  # |predicted − actual| / actual of the latest steps
    margin_ms: float  # kept in hand for a step that takes longer than predicted
    counters: Counters
