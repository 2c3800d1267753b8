"""What LoRA adapters cost: a batch of decodes, each with an adapter of its own, in turn with the same batch without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millis.engine.adapters import Adapter
from millis.models.adapter import AdapterWeights, Pair
from millis.models.config import ModelConfig
from millis.models.tensors_expected import expected_shapes
from millis.tasks.model import LanguageModel
from millis.types import SamplingParams

PROMPT = 24  # tokens of each sequence: twenty fit one step, so that a decode meets no prompt, which rounds otherwise
ROUNDS = 6  # of steps with adapters and without, in turns
SIZE = 0.02  # of both matrices' random values: weights change by some 2 %; more flattens the logits, and screens less


@dataclass(frozen=True, slots=True)
class Row:
    """Decode steps of so many sequences: medians."""

    sequences: int
    base_ms: float
    adapters_ms: float
    ratio: float  # of the two
    alone: bool | None = None  # whether each sequence's greedy tokens are those it has alone; None: not looked at


def random_adapter(config: ModelConfig, rank: int, seed: int) -> AdapterWeights:
    """An adapter of every matrix of every layer."""
    random = np.random.default_rng(seed)
    pairs = []
    for name, shape in expected_shapes(config).items():
        if name.startswith("blk.") and len(shape) == 2:
            a, b = (
                random.standard_normal(s, np.float32) * np.float32(SIZE) for s in ((rank, shape[1]), (shape[0], rank))
            )
            pairs.append(Pair(name, a, b, 2.0))
    return AdapterWeights(Path(f"random-{seed}"), rank, tuple(pairs))


def measure(
    lm: LanguageModel,
    *,
    count: int,
    rank: int,
    steps: int,
    answer: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Times steps of one sequence and of `count`, and compares `answer` tokens of `count` mixed ones with each alone.

    `lm` must hold `count` sequences and adapters, and guess no tokens.
    """
    random = np.random.default_rng(0)
    packed = []
    for i in range(count):
        packed.append(lm.runner.adapter(random_adapter(lm.model.checkpoint.config, rank, i)))
        advance()
    prompts = [[int(t) for t in random.integers(0, lm.runner.vocab, PROMPT)] for _ in range(count)]
    adapters = [Adapter(f"random-{i}", native, native.nbytes, i + 1) for i, native in enumerate(packed)]
    rows = []
    for sequences in sorted({1, count}):
        base_ms, with_ms = _times(lm, prompts[:sequences], adapters, steps, advance)
        same = _same_alone(lm, prompts, adapters, answer, advance) if sequences == count else None
        rows.append(Row(sequences, base_ms, with_ms, with_ms / base_ms, same))
    return {"adapters": count, "rank": rank, "adapter_mb": packed[0].nbytes / 1e6, "rows": rows}


def _times(lm: LanguageModel, prompts: list[Any], adapters: list[Any], steps: int, advance: Any) -> tuple[float, float]:
    """(without, with) milliseconds a step: medians of steps that took turns, so that both meet the same machine."""
    engine, params = lm.engine, SamplingParams(max_tokens=lm.runner.context, ignore_eos=True)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for times, used in zip(found, ([None] * len(prompts), adapters), strict=True):
            requests = [engine.submit(p, params, adapter=a) for p, a in zip(prompts, used, strict=False)]
            while not all(request.decoding for request in requests) and engine.step():
                pass
            for _ in range(-(-steps // ROUNDS)):
                begin = time.perf_counter()
                engine.step()
                times.append(1000 * (time.perf_counter() - begin))
            for request in requests:
                engine.cancel(request)
            advance()
    return statistics.median(found[0]), statistics.median(found[1])


def _same_alone(lm: LanguageModel, prompts: list[Any], adapters: list[Any], answer: int, advance: Any) -> bool:
    """Whether a mixed batch writes what each request writes alone."""
    engine, params = lm.engine, SamplingParams(max_tokens=answer, ignore_eos=True)
    mixed = [engine.submit(prompt, params, adapter=a) for prompt, a in zip(prompts, adapters, strict=True)]
    while engine.has_work:
        engine.step()
    same = True
    for prompt, adapter, together in zip(prompts, adapters, mixed, strict=True):
        request = engine.submit(prompt, params, adapter=adapter)
        while engine.has_work:
            engine.step()
        same = same and request.output == together.output
        advance()
    return same
