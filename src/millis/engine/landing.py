"""How an answer ends when its time is up: text at a sentence end, a grammar closed. Pure: times are handed in."""

from __future__ import annotations

from enum import IntEnum

WINDOW_TOKENS = 16  # before the last token that fits: an answer ends at the first sentence end among these
EPSILON_MS = 1e-6


class Stage(IntEnum):
    """Where an answer stands on its way down."""

    FLYING = 0
    WINDOW = 1  # it ends at the next sentence end
    LAST = 2  # the token of this step is its last


def stage(left_ms: float, step_ms: float, next_ms: float, margin_ms: float, window: int = WINDOW_TOKENS) -> Stage:
    """left_ms: until the deadline, delivery taken off. step_ms: this step; next_ms: each of those behind it.

    margin_ms: how much longer than predicted a step may take.
    """
    after = left_ms - step_ms - margin_ms + EPSILON_MS
    if after < next_ms:
        return Stage.LAST
    return Stage.WINDOW if after < window * next_ms else Stage.FLYING
