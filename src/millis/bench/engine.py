"""Speed of one request at a time, engines side by side: rounds interleaved A B A B, warm-up apart, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from millis.bench.process import WorkerError

OURS = "millis"


class Engine(Protocol):
    """An engine under measurement. Whatever goes wrong in it is a WorkerError."""

    name: str

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Greedy, past end-of-sequence: {"tokens": ids, "ms": from the start to each of them}."""
        ...


@dataclass(slots=True)
class Row:
    """One engine after one prompt length: a figure for every round, in milliseconds.

    next_ms is the mean gap of a round: engines that hand out several tokens at once are measured like the others.
    """

    engine: str
    tokens: int  # of the prompt: those the cache holds when the next ones are timed
    first_ms: list[float] = field(default_factory=list)
    next_ms: list[float] = field(default_factory=list)
    output: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class Measured:
    """What came of it. `failed`: engine → why it could not go on; its rows before that are kept."""

    rows: list[Row]
    failed: dict[str, str]
    read_gb_per_s: list[float] = field(default_factory=list)  # one a round


def measure(
    engines: Sequence[Engine],
    *,
    prompts: Sequence[int],
    depths: Sequence[int],
    vocab: int,
    new_tokens: int,
    rounds: int,
    read: Callable[[], float],
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """First tokens after `prompts`, next tokens at `depths`, all in tokens.

    Every round has its own random ids, the same for all engines: no prefix cache can help. It begins with read(), the
    machine's bandwidth in GB/s, which on a shared machine changes like everything else.
    """
    random = np.random.default_rng(0)
    result = Measured([], {})
    for length in sorted({*prompts, *depths}):
        count = new_tokens if length in depths else 1
        rows = [Row(engine.name, length) for engine in engines]
        for turn in range(-1, rounds):  # turn −1 warms up
            if turn >= 0:
                result.read_gb_per_s.append(read())
            ids = [int(token) for token in random.integers(0, vocab, length)]
            for engine, row in zip(engines, rows, strict=True):
                if engine.name not in result.failed:
                    try:
                        _take(row if turn >= 0 else Row(engine.name, length), engine, ids, count, vocab)
                    except WorkerError as error:
                        result.failed[engine.name] = f"at {length} tokens: {error}"
                advance()
        result.rows += [row for row in rows if row.first_ms]
    return result


def _take(row: Row, engine: Engine, ids: list[int], count: int, vocab: int) -> None:
    """One run, believed only if it can be true."""
    begin = time.perf_counter()
    answer = engine.run(ids, count)
    tokens, ms = _believed(answer, count, vocab, 1000 * (time.perf_counter() - begin))
    row.first_ms.append(ms[0])
    row.output.append(tokens)
    if count > 1:
        row.next_ms.append((ms[-1] - ms[0]) / (count - 1))


def _believed(answer: dict[str, Any], count: int, vocab: int, wall_ms: float) -> tuple[list[int], list[float]]:
    """(tokens, their times) of an answer that came after wall_ms. WorkerError for what was not asked or cannot be."""
    tokens, ms = answer.get("tokens"), answer.get("ms")
    if not isinstance(tokens, list) or len(tokens) != count or not all(_whole_below(token, vocab) for token in tokens):
        raise WorkerError(f"was asked for {count} tokens of a vocabulary of {vocab} and gave {str(tokens)[:60]}")
    if not isinstance(ms, list) or len(ms) != count or not all(type(at) is float and math.isfinite(at) for at in ms):
        raise WorkerError(f"gave no time for each token but {str(ms)[:60]}")
    if not 0 < ms[0] or any(after < before for before, after in pairwise(ms)) or ms[-1] > wall_ms:
        raise WorkerError(f"claims times that cannot be: {ms[0]:.3f} to {ms[-1]:.3f} ms in a call of {wall_ms:.3f} ms")
    return tokens, ms


def _whole_below(value: Any, bound: int) -> bool:
    return type(value) is int and 0 <= value < bound


def report(measured: Measured, token_bytes: int, cache_bytes: Callable[[int], int]) -> dict[str, Any]:
    """What --json prints: the limit first, then the rows with their ratios to Millis's, then who failed and why.

    token_bytes: of the packed weights that a token is multiplied by; cache_bytes(tokens): what attention reads of
    so many.
    """
    bandwidth = statistics.median(measured.read_gb_per_s)
    ours = {row.tokens: row for row in measured.rows if row.engine == OURS}
    rows = []
    for row in measured.rows:
        our = ours.get(row.tokens)
        limit = 1000 * (token_bytes + cache_bytes(row.tokens)) / (bandwidth * 1e9)
        first, next_token = summary(row.first_ms), summary(row.next_ms) if row.next_ms else None
        rows.append(
            {
                "engine": row.engine,
                "tokens": row.tokens,
                "first": first,
                "first_over_millis": first["median_ms"] / statistics.median(our.first_ms) if our else None,
                "next": next_token,
                "next_limit_ms": limit,
                "next_share_of_limit": limit / next_token["median_ms"] if next_token else None,
                "next_over_millis": next_token["median_ms"] / statistics.median(our.next_ms)
                if our and our.next_ms and next_token
                else None,
                "same_first_token": _same(row, our) if our else None,
            }
        )
    return {
        "read_gb_per_s": bandwidth,
        "read_spread_gb_per_s": [min(measured.read_gb_per_s), max(measured.read_gb_per_s)],
        "bytes_per_token": token_bytes,
        "cache_bytes_per_token": cache_bytes(1),
        "limit_next_ms": 1000 * token_bytes / (bandwidth * 1e9),
        "rows": rows,
        "failed": measured.failed,
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}


def _same(row: Row, our: Row) -> float:
    """The share of rounds in which the engine's first token is ours: whether it runs the same model at all."""
    pairs = list(zip(row.output, our.output, strict=False))
    return sum(theirs[0] == mine[0] for theirs, mine in pairs) / len(pairs)
