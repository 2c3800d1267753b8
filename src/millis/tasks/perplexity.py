"""Perplexity of a text: exp of the mean negative log-probability a token (Jelinek et al., 1977)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from millis.types import RequestError


def windows(ids: Sequence[int], context: int, bos: int | None) -> list[list[int]]:
    """Consecutive windows of `context` tokens, the last one shorter; each begins with `bos` where there is one.

    Every token of a window after its first is predicted from those before it in the window.
    """
    if context < 2:
        raise RequestError(f"perplexity needs a context of at least 2 tokens, not {context}")
    head = [] if bos is None else [bos]
    step = context - len(head)
    cut = [head + list(ids[at : at + step]) for at in range(0, len(ids), step)]
    cut = [window for window in cut if len(window) > 1]
    if not cut:
        raise RequestError("the text is too short for a perplexity; give at least two tokens")
    return cut


def spread(cut: list[list[int]], count: int) -> list[list[int]]:
    """`count` of the windows at even distances, the first among them; all where there are no more than that."""
    return cut if count >= len(cut) else [cut[i * len(cut) // count] for i in range(count)]


def perplexity(
    log_likelihood: Callable[[list[int]], float], cut: Iterable[list[int]], advance: Callable[[], None] = lambda: None
) -> float:
    """exp(−Σ log p / Σ tokens) over the windows; `log_likelihood` sums one window's, in nats, without its first."""
    total, tokens = 0.0, 0
    for window in cut:
        total += log_likelihood(window)
        tokens += len(window) - 1
        advance()
    try:
        return math.exp(-total / tokens)
    except OverflowError:
        return math.inf
