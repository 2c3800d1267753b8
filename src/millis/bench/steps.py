"""Step times as they were predicted and as they came, on a model that answers several requests at once."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from millis.tasks.model import LanguageModel
from millis.types import SamplingParams

PROMPTS = (16, 128, 384)  # tokens
TOGETHER = (1, 4)  # requests
ANSWER = 24  # tokens


@dataclass(frozen=True, slots=True)
class Row:
    """All steps of so many rows: medians."""

    rows: int  # tokens computed
    steps: int
    predicted_ms: float
    actual_ms: float
    error: float  # |predicted − actual| / actual


def predictions(lm: LanguageModel) -> list[Row]:
    """Calibrates, then runs requests of several sizes and compares step by step; by number of rows."""
    random, engine = np.random.default_rng(0), lm.engine
    engine.calibrate()
    found: dict[int, list[tuple[float, float]]] = {}
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    for together in TOGETHER:
        for length in PROMPTS:
            for _ in range(together):
                engine.submit([int(token) for token in random.integers(0, lm.runner.vocab, length)], params)
            while engine.has_work:
                if engine.step():
                    load = engine.load()
                    pair = load.step_predicted_ms, load.step_actual_ms
                    found.setdefault(engine.scheduler.work.rows, []).append(pair)
    return [_row(rows, pairs) for rows, pairs in sorted(found.items())]


def median_error(rows: list[Row]) -> float:
    """Over all steps, each kind weighed by how often it came."""
    return statistics.median(error for row in rows for error in [row.error] * row.steps)


def _row(rows: int, pairs: list[tuple[float, float]]) -> Row:
    predicted, actual = zip(*pairs, strict=True)
    errors = [abs(p - a) / a for p, a in pairs]
    middle = statistics.median
    return Row(rows, len(pairs), middle(predicted), middle(actual), middle(errors))
