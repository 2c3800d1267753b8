"""Runs encoder-decoder models on the native runtime: texts read into pages of a cache, answers a token a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.config import EngineConfig
from millis.engine.eight_bits import eight_bits
from millis.engine.encoder_runner import groups
from millis.engine.kvcache import PageAllocator
from millis.engine.native_runner import CLOSED, check_values, fill, new_runtime, new_sampler
from millis.models.generation import MOST_BEAMS
from millis.models.load import Model
from millis.models.tensor import Tensor
from millis.types import FormatError, ModelError, SamplingParams

Chosen = tuple[int, float, list[tuple[int, float]]]  # a token, its log-probability, the best ones: see _native.Runtime


@dataclass(slots=True)
class Source:
    """A text that was read: its tokens, and the pages with what the decoder looks at."""

    length: int
    pages: list[int]


@dataclass(slots=True)
class Row:
    """One answer under way. tokens: what the decoder began with and what was written; the last is not yet computed."""

    source: Source
    tokens: list[int]
    pages: list[int]


class Seq2SeqRunner:
    """Raises FormatError when the weights do not fit the plan or hold NaN or infinite values, ModelError when
    the machine's memory is too small for them. For one thread at a time.

    precision fast: matrices in eight bits, see eight_bits.py, activations of two bytes or bfloat16, an f16 cache.
    exact: float32.
    """

    page_tokens: int = _native.PAGE_TOKENS

    def __init__(self, model: Model, config: EngineConfig, silenced: Sequence[int] = ()) -> None:
        """silenced: ids that the model gives no probability from now on. FormatError: its logits have no bias."""
        plan = model.plan
        self.vocab, self.context = plan.vocab, plan.context
        self.max_tokens = max(config.max_batch_tokens, plan.context)
        self.rows = max(config.max_sequences, MOST_BEAMS)  # answers computed in one step
        pages = 2 * self.rows * -(-plan.context // self.page_tokens)  # a source and a target of full length for each
        exact = config.precision == "exact"
        tensors = _silenced(model.checkpoint.tensors, silenced)
        try:
            check_values(plan, model.checkpoint.tensors)
            self._runtime = new_runtime(plan, config, self.max_tokens, pages)
            fill(self._runtime, plan, tensors if exact else eight_bits(plan, tensors, logits=True))
        except ValueError as error:
            raise FormatError(f"{model.checkpoint.path}: {error}") from None
        except MemoryError:
            raise ModelError(
                f"{model.checkpoint.path}: not enough memory for weights and cache; ask for a shorter context"
            ) from None
        self.pages = PageAllocator(pages)

    def close(self) -> None:
        """Gives weights and cache back."""
        self._runtime = CLOSED

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._runtime.isa)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self._runtime.weight_bytes)

    def read(self, texts: Sequence[Sequence[int]]) -> list[Source]:
        """Reads at most `rows` texts of 1 to `context` tokens, many of them in one call. `free` ends their stay."""
        sources = [Source(len(ids), self._take(len(ids))) for ids in texts]
        for group in groups([source.length for source in sources], self.max_tokens):
            tokens = np.fromiter(chain.from_iterable(texts[i] for i in group), np.int32)
            chosen = [sources[i] for i in group]
            lengths = np.asarray([source.length for source in chosen], np.int32)
            self._runtime.read(tokens, lengths, _tables([source.pages for source in chosen]))
        return sources

    def begin(self, source: Source, token: int) -> Row:
        """An answer to `source` of which nothing but the decoder's first token stands."""
        return Row(source, [token], [])

    def fork(self, row: Row) -> Row:
        """The same answer once more, to go on differently: whole pages are shared, the last one is copied."""
        whole = (len(row.tokens) - 1) // self.page_tokens  # of what is computed
        shared, pages = row.pages[:whole], row.pages[whole:]
        self.pages.share(shared)
        copies = self._take(len(pages) * self.page_tokens)
        for page, copy in zip(pages, copies, strict=True):
            self._runtime.copy_page(page, copy)
        return Row(row.source, list(row.tokens), shared + copies)

    def free(self, held: Sequence[Row | Source]) -> None:
        """Gives their pages back."""
        for one in held:
            self.pages.give(one.pages)

    def sampler(self, params: SamplingParams, banned: Sequence[int] = (), best: int | None = None) -> Any:
        """The state of one answer's sampling. banned: ids that are never chosen. best: how many likely ids are told."""
        told = None if best is None else min(best, self.vocab)
        return new_sampler(self.vocab, params, [(token, -np.inf) for token in banned], told)

    def step(self, rows: Sequence[Row], samplers: Sequence[Any]) -> list[Chosen]:
        """Computes the last token of each row and chooses the next one, which is not yet appended."""
        drafted = np.zeros(len(rows), np.int32)
        tokens, starts, lengths, tables, sources, source_tables = self._batch(rows)
        found = self._runtime.step(tokens, starts, lengths, tables, samplers, drafted, None, sources, source_tables)
        if any(one[0][0] < 0 for one in found):
            raise ModelError("the model computed no usable number; its weights may be damaged")
        return [one[0] for one in found]

    def logits(self, row: Row) -> NDArray[np.float32]:
        """[T, vocab] what the model makes of every token of a row of which nothing is computed yet."""
        self._grow(row)
        one = np.asarray([len(row.tokens)], np.int32)
        return self._runtime.logits(
            np.asarray(row.tokens, np.int32), np.zeros(1, np.int32), one, _tables([row.pages]), True, None,
            np.asarray([row.source.length], np.int32), _tables([row.source.pages]),
        )  # fmt: skip

    def _batch(self, rows: Sequence[Row]) -> tuple[NDArray[np.int32], ...]:
        for row in rows:
            self._grow(row)
        return (
            np.asarray([row.tokens[-1] for row in rows], np.int32),
            np.asarray([len(row.tokens) - 1 for row in rows], np.int32),
            np.ones(len(rows), np.int32),
            _tables([row.pages for row in rows]),
            np.asarray([row.source.length for row in rows], np.int32),
            _tables([row.source.pages for row in rows]),
        )

    def _grow(self, row: Row) -> None:
        missing = len(row.tokens) - len(row.pages) * self.page_tokens
        if missing > 0:
            row.pages += self._take(missing)

    def _take(self, tokens: int) -> list[int]:
        found = self.pages.take(-(-tokens // self.page_tokens))
        assert found is not None, "more rows than there are pages for"
        return found


def _silenced(tensors: Mapping[str, Tensor], ids: Sequence[int]) -> Mapping[str, Tensor]:
    """The same tensors, the logits of `ids` at minus infinity."""
    name = "output.bias"
    if not ids:
        return tensors
    if name not in tensors:
        raise FormatError("renormalize_logits with bad_words_ids is supported where logits have a bias, as marian's")
    bias = tensors[name].numpy()
    bias[list(ids)] = -np.inf
    return {**tensors, name: Tensor.from_numpy(name, bias)}


def _tables(pages: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """[S, P] page ids, −1 past the end."""
    out = np.full((len(pages), max(map(len, pages))), -1, np.int32)
    for row, found in zip(out, pages, strict=True):
        row[: len(found)] = found
    return out
