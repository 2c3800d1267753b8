"""What a set of tensors does in the engine: log-likelihoods of windows, distributions, and the time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from millis.config import EngineConfig
from millis.engine.native_runner import NativeRunner
from millis.engine.runner import Batch
from millis.models.checkpoint import Checkpoint
from millis.models.load import Model, build_plan
from millis.models.tensor import Tensor

Floats = NDArray[np.float32]

_ROWS = 64  # of logits taken at once: a large vocabulary makes each of them half a megabyte
_STEPS = 24


class Measured:
    """A checkpoint with some of its tensors exchanged, ready to run windows of up to `context` tokens."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], context: int, threads: int) -> None:
        changed = replace(checkpoint, tensors={**checkpoint.tensors, **tensors})
        config = EngineConfig(
            threads=threads, context=context, max_batch_tokens=context, max_sequences=1, cache_tokens=context
        )
        self._runner = NativeRunner(Model(changed, build_plan(changed, context)), config)

    def log_likelihood(self, window: Sequence[int]) -> float:
        """The summed log-probability of every token of the window after its first, in nats."""
        scored = self._runner.score(self._batch(window[:-1]), np.asarray(window[1:], np.int32))
        return float(np.sum(scored, dtype=np.float64))

    def log_probabilities(self, window: Sequence[int]) -> Floats:
        """[T, vocab]: log-probabilities after every token of the window."""
        logits = self._runner.logits(self._batch(window), every=True)
        return np.concatenate([_log_softmax(logits[at : at + _ROWS]) for at in range(0, len(logits), _ROWS)])

    def step_ms(self) -> float:
        """Milliseconds of a step of a single token: the median of several."""
        tokens = [self._time(batch_of([0], at, self._tables())) for at in range(_STEPS)]
        return float(np.median(tokens))

    def _time(self, batch: Batch) -> float:
        begin = time.perf_counter()
        self._runner.score(batch, np.zeros(1, np.int32))
        return 1000 * (time.perf_counter() - begin)

    def _batch(self, tokens: Sequence[int]) -> Batch:
        return batch_of(tokens, 0, self._tables())

    def _tables(self) -> NDArray[np.int32]:
        return np.arange(self._runner.pages, dtype=np.int32)[None]


def batch_of(tokens: Sequence[int], start: int, tables: NDArray[np.int32]) -> Batch:
    return Batch(
        tokens=np.asarray(tokens, np.int32),
        starts=np.array([start], np.int32),
        lengths=np.array([len(tokens)], np.int32),
        tables=tables,
    )


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def mean_loss(
    log_likelihood: Callable[[Sequence[int]], float], windows: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """[windows]: mean negative log-probability a token, in nats."""
    return np.array([-log_likelihood(window) / (len(window) - 1) for window in windows])
