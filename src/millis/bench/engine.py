"""Speed of one request at a time, engines side by side: rounds interleaved A B A B, warm-up apart, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from millis.tasks.model import LanguageModel


class Engine(Protocol):
    """An engine under measurement."""

    name: str

    def run(self, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
        """Greedy, past end-of-sequence: (milliseconds to the first token, gaps between the following ones)."""
        ...


class Millis:
    """Our own engine."""

    def __init__(self, lm: LanguageModel) -> None:
        self.name = "millis"
        self._lm = lm

    def run(self, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
        t = self._lm.generate(prompt, max_tokens=new_tokens, ignore_eos=True).timings
        return t.first_token_ms, [t.decode_ms / (new_tokens - 1)]


@dataclass(slots=True)
class Row:
    """Medians of one engine at one prompt length, in milliseconds; spread is (minimum, maximum)."""

    engine: str
    prompt_tokens: int
    first_ms: float = 0.0
    first_spread: tuple[float, float] = (0.0, 0.0)
    next_ms: float = 0.0
    next_spread: tuple[float, float] = (0.0, 0.0)
    firsts: list[float] = field(default_factory=list)
    nexts: list[float] = field(default_factory=list)

    def summarize(self) -> Row:
        """Fills the medians and spreads from the rounds."""
        self.first_ms, self.next_ms = statistics.median(self.firsts), statistics.median(self.nexts)
        self.first_spread = (min(self.firsts), max(self.firsts))
        self.next_spread = (min(self.nexts), max(self.nexts))
        return self


def measure(
    engines: Sequence[Engine],
    prompts: Sequence[int],
    *,
    vocab: int,
    new_tokens: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for every prompt length and engine; all see the same random token ids."""
    random = np.random.default_rng(0)
    rows = []
    for length in prompts:
        ids = [int(token) for token in random.integers(0, vocab, length)]
        found = [Row(engine.name, length) for engine in engines]
        for turn in range(-1, rounds):  # turn −1 warms up
            for engine, row in zip(engines, found, strict=True):
                first, gaps = engine.run(ids, new_tokens)
                if turn >= 0:
                    row.firsts.append(first)
                    row.nexts += gaps
                advance()
        rows += [row.summarize() for row in found]
    return rows


def report(rows: Sequence[Row], weight_bytes: int, bandwidth: float) -> dict[str, Any]:
    """What --json prints: the limit first, then the rows, then each peer's times over ours."""
    ours = {row.prompt_tokens: row for row in rows if row.engine == "millis"}
    return {
        "read_gb_per_s": bandwidth,
        "bytes_per_token": weight_bytes,
        "limit_next_ms": 1000 * weight_bytes / (bandwidth * 1e9),
        "rows": [
            {
                "engine": row.engine,
                "prompt_tokens": row.prompt_tokens,
                "first_ms": row.first_ms,
                "first_spread_ms": row.first_spread,
                "next_ms": row.next_ms,
                "next_spread_ms": row.next_spread,
                "first_over_millis": row.first_ms / ours[row.prompt_tokens].first_ms,
                "next_over_millis": row.next_ms / ours[row.prompt_tokens].next_ms,
            }
            for row in rows
        ],
    }
