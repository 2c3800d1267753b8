"""The calibration text, in windows of token ids: some to learn from, the others to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millis.tasks.perplexity import spread, windows
from millis.tokenizer import Tokenizer
from millis.types import RequestError

LEARN_TOKENS, MEASURE_TOKENS = 256, 512  # of a window


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of both kinds have no text in common."""

    learn: list[list[int]]
    measure: list[list[int]]


def calibration(text: str, tokenizer: Tokenizer, learn: int, measure: int, context: int) -> Calibration:
    """`learn` and `measure` windows, spread over the text. RequestError: a text too short for two of each."""
    ids = tokenizer.encode(text, add_special=False)
    bos = tokenizer.bos if tokenizer.encode("a")[:1] == [tokenizer.bos] else None
    stretch = min(context, MEASURE_TOKENS) * 2
    first = [ids[at : at + stretch // 2] for at in range(0, len(ids), stretch)]
    second = [ids[at + stretch // 2 : at + stretch] for at in range(0, len(ids), stretch)]
    found = Calibration(
        spread(_cut(first, min(context, LEARN_TOKENS), bos), learn),
        spread(_cut(second, min(context, MEASURE_TOKENS), bos), measure),
    )
    if len(found.learn) < 2 or len(found.measure) < 2:
        raise RequestError(f"a calibration text of {len(ids)} tokens is too short; give {4 * stretch} or more")
    return found


def _cut(parts: Sequence[list[int]], context: int, bos: int | None) -> list[list[int]]:
    """Windows of full length only."""
    return [
        window for part in parts if part for window in windows(part + part[:1], context, bos) if len(window) == context
    ]
