"""Reads texts with a decoder that was trained for embeddings or labels, on the runner of models that write.

A label is told from the hidden state behind a text's last token, as transformers' *ForSequenceClassification do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from millis.config import EngineConfig
from millis.engine.eight_bits import eight_bits
from millis.engine.encoder_runner import OUTPUT_ROWS, Ids, Reader
from millis.engine.native_runner import NativeRunner
from millis.engine.pooling import groups, last_hidden, mean_hidden
from millis.engine.turn import Lock
from millis.models.load import Model
from millis.models.ngrams import Ngrams


class DecoderReader(Reader):
    """Raises ModelError when the weights do not fit the plan or the machine's memory. A text that is longer than a step
    runs in pieces; of what the KV cache holds nothing is kept between calls."""

    def __init__(self, model: Model, config: EngineConfig, ngrams: Ngrams | None = None, suffix: int = 0) -> None:
        plan, checkpoint = model.plan, model.checkpoint
        super().__init__(plan.context, ngrams, suffix)
        tensors = dict(checkpoint.tensors)
        head = tensors.pop("cls.output.weight", None)
        self._head = None if head is None else head.numpy()  # [labels, width]
        self._pooled = last_hidden if checkpoint.config.pooling == "last" else mean_hidden
        if config.precision != "exact":
            tensors = eight_bits(plan, tensors)
        positions = max(plan.context, 2 * config.max_batch_tokens)  # short texts leave their pages half empty
        config = replace(config, max_sequences=OUTPUT_ROWS, cache_tokens=positions)
        self._runner = NativeRunner(Model(replace(checkpoint, tensors=tensors), plan), config)
        self._turn = Lock()  # all calls use the same pages
        self.max_tokens = self._runner.max_tokens
        self.isa, self.weight_bytes = self._runner.isa, self._runner.weight_bytes

    def close(self) -> None:
        self._runner.close()

    def _run(self, ids: Ids, types: Ids | None, head: bool) -> NDArray[np.float32]:
        if types is not None:
            raise ValueError("a decoder knows no kinds of tokens")
        if head and self._head is None:
            raise ValueError("the decoder has no head")
        pooled = last_hidden if head else self._pooled
        pages = range(self._runner.pages)
        with self._turn:
            found = [pooled(self._runner, group, pages) for group in groups(ids, self._runner, len(pages))]
        rows = np.concatenate(found)
        return rows @ self._head.T if head and self._head is not None else rows
