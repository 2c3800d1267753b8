"""Runs encoders on the native runtime: many texts of different lengths in one call, nothing kept between calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.config import EngineConfig
from millis.engine.eight_bits import eight_bits
from millis.engine.native_runner import CLOSED, check_values, fill
from millis.models.load import Model
from millis.models.ngrams import TOKENS, Ngrams
from millis.types import FormatError, ModelError

OUTPUT_ROWS = 64  # texts whose head is computed at once

Ids = Sequence[Sequence[int]]  # of each text


class Reader(ABC):
    """What makes vectors and logits of texts. Calls from several threads take turns.

    ngrams: what is added to the head's logits. suffix: how many tokens the tokenizer puts behind a text. end: where a
    model reads pairs, the token behind the first text; what follows it is of kind 1.
    """

    max_tokens: int  # of a step
    isa: str  # the instruction set in use
    weight_bytes: int  # of the packed weights

    def __init__(self, context: int, ngrams: Ngrams | None, suffix: int, end: int | None = None) -> None:
        self.context = context  # tokens of a text that the network reads,
        self.reads = context if ngrams is None else max(context, TOKENS)  # and that `logits` looks at
        self._ngrams, self._suffix, self._end = ngrams, suffix, end

    def embeddings(self, ids: Ids, types: Ids | None = None) -> NDArray[np.float32]:
        """[N, width] the pooled hidden states of each text. types: the kind of each token, 0 unless given."""
        return self._run(ids, types, head=False)

    def logits(self, ids: Ids, types: Ids | None = None) -> NDArray[np.float32]:
        """[N, labels] what the head makes of each text, of which the network reads no more than the context."""
        if types is None and self._end is not None:
            types = [kinds(text, self._end) for text in ids]
        found = self._run([self.cut(text) for text in ids], types and [self.cut(text) for text in types], head=True)
        if self._ngrams is not None:
            found = found + np.stack([self._ngrams.logits(text) for text in ids])
        return found

    def cut(self, text: Sequence[int]) -> Sequence[int]:
        """A text's beginning and what belongs behind it, as many tokens as the network reads."""
        if len(text) <= self.context:
            return text
        return [*text[: self.context - self._suffix], *text[len(text) - self._suffix :]]

    @abstractmethod
    def close(self) -> None:
        """Gives the weights back, at the end of the step that is under way."""

    @abstractmethod
    def _run(self, ids: Ids, types: Ids | None, head: bool) -> NDArray[np.float32]:
        """The rows that `logits`, where `head`, or `embeddings` give. ValueError: ids or types that cannot be."""


class EncoderRunner(Reader):
    """Raises FormatError when the weights do not fit the plan or hold NaN or infinite values, ModelError when
    the machine's memory is too small for them."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        ngrams: Ngrams | None = None,
        suffix: int = 1,
        end: int | None = None,
    ) -> None:
        plan = model.plan
        super().__init__(plan.context, ngrams, suffix, end)
        self.max_tokens = max(config.max_batch_tokens, plan.context)
        try:
            check_values(plan, model.checkpoint.tensors)
            self._runtime = _native.Runtime(
                threads=config.threads,
                isa=config.isa,
                max_tokens=self.max_tokens,
                max_outputs=min(self.max_tokens, OUTPUT_ROWS),
                pages=1,
                layers=1,
                kv_heads=1,
                head_dim=16,
                vocab=plan.vocab,
                context=plan.context,
                exact=config.precision == "exact",
                bytes=config.precision != "exact",
            )
            tensors = model.checkpoint.tensors
            fill(self._runtime, plan, tensors if config.precision == "exact" else eight_bits(plan, tensors))
        except ValueError as error:
            raise FormatError(f"{model.checkpoint.path}: {error}") from None
        except MemoryError:
            raise ModelError(f"{model.checkpoint.path}: not enough memory for the weights") from None
        self.isa, self.weight_bytes = str(self._runtime.isa), int(self._runtime.weight_bytes)

    def close(self) -> None:
        self._runtime = CLOSED

    def _run(self, ids: Ids, types: Ids | None, head: bool) -> NDArray[np.float32]:
        if len(ids) == 1:  # the fastest way is the one of a single request
            return self._step(ids, types, head)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        found: list[NDArray[np.float32]] = []
        for group in groups([len(ids[i]) for i in order], self.max_tokens):
            chosen = [order[i] for i in group]
            found.append(self._step([ids[i] for i in chosen], types and [types[i] for i in chosen], head))
        sorted_rows = np.concatenate(found)
        out = np.empty_like(sorted_rows)
        out[order] = sorted_rows
        return out

    def _step(self, ids: Ids, types: Ids | None, head: bool) -> NDArray[np.float32]:
        tokens = np.fromiter(chain.from_iterable(ids), np.int32)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        kinds = None if types is None else np.fromiter(chain.from_iterable(types), np.int32)
        found: NDArray[np.float32] = self._runtime.texts(tokens, lengths, head, kinds)
        return found


def kinds(pair: Sequence[int], end: int) -> list[int]:
    """Of each token: 0 up to the first `end`, 1 behind it."""
    first = pair.index(end) + 1 if end in pair else len(pair)
    return [0] * first + [1] * (len(pair) - first)


def groups(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Runs of consecutive texts, each of at most `max_tokens` tokens together; no text is longer than that."""
    found, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if tokens + length > max_tokens:
            found.append(range(first, i))
            first, tokens = i, 0
        tokens += length
    return [*found, range(first, len(lengths))]
