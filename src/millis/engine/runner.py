"""The border between the engine and whatever computes: a ragged batch of token ids in, sampled ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millis.models.adapter import AdapterWeights
from millis.types import SamplingParams, TokenLogprob


@dataclass(slots=True)
class Batch:
    """One step's work for S sequences and T tokens in all; sequence s brings lengths[s] tokens in a row.

    The last drafted[s] of them are guesses; None stands for none at all.
    """

    tokens: NDArray[np.int32]  # [T] ids, sequence after sequence
    starts: NDArray[np.int32]  # [S] position of each sequence's first token here = tokens already in its pages
    lengths: NDArray[np.int32]  # [S] ≥ 1
    tables: NDArray[np.int32]  # [S, P] page ids in order of position, −1 past the end
    drafted: NDArray[np.int32] | None = None  # [S] < lengths
    parents: NDArray[np.int32] | None = None  # [T] place of each token's parent in its sequence; −1: what is cached
    adapters: list[Any | None] | None = None  # [S] made by `Runner.adapter`, None: the model as it is; or None at all


@dataclass(slots=True)
class Sampled:
    """What a step chose, one list a sequence: its drafts up to the first wrong one, then one token more.

    The list is empty where the sequence had no sampler, and of one token where it had no drafts.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprob | None]]  # None unless its sampler asked


@dataclass(frozen=True, slots=True)
class Ranked:
    """What a model holds of T tokens in their places, and of the n likeliest in each place."""

    logprobs: NDArray[np.float32]  # [T] nats
    ranks: NDArray[np.int32]  # [T] one more than how many tokens are likelier
    best: NDArray[np.int32]  # [T, n] ids, best first; −1 where there are fewer
    best_logprobs: NDArray[np.float32]  # [T, n] nats

    @classmethod
    def join(cls, pieces: Sequence[Ranked]) -> Ranked:
        """One after the other; there is one at least."""
        columns = zip(*((one.logprobs, one.ranks, one.best, one.best_logprobs) for one in pieces), strict=True)
        return cls(*map(np.concatenate, columns))

    def told(self, tokens: Sequence[int]) -> list[TokenLogprob]:
        """The same of each of the T tokens, which are these."""
        columns = tokens, self.logprobs.tolist(), self.best.tolist(), self.best_logprobs.tolist()
        return [
            TokenLogprob(
                token, logprob, tuple((one, value) for one, value in zip(best, values, strict=True) if one >= 0)
            )
            for token, logprob, best, values in zip(*columns, strict=True)
        ]


class Runner(Protocol):
    """Runs batches. The engine owns pages and positions; the runner only obeys them."""

    vocab: int
    context: int  # longest sequence, tokens
    page_tokens: int
    pages: int
    max_tokens: int  # tokens in one batch
    max_sequences: int  # sequences in one batch

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Any:
        """The native state of one request's sampling: penalties' counts and random stream."""
        ...

    def restricted(self, params: SamplingParams, tokens: Sequence[int], allowed: frozenset[int]) -> Any:
        """A sampler as `sampler` makes it, for one token that is one of `allowed`."""
        ...

    def adapter(self, weights: AdapterWeights) -> Any:
        """The native state of an adapter, for batches of this runner."""
        ...

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        """Computes the batch, then samples where a sequence has a sampler: behind its last token and behind its drafts.

        What comes out is what sampling one token a step gives: a draft stands where it is what is sampled there.
        """
        ...

    def score(self, batch: Batch, targets: NDArray[np.int32]) -> NDArray[np.float32]:
        """[T] log-probability (nats) of targets[t] as the token after tokens[t]; 0 where the target is −1."""
        ...

    def score_best(self, batch: Batch, targets: NDArray[np.int32], count: int) -> Ranked:
        """As `score`, with the `count` likeliest tokens of every place; nothing is told where the target is −1."""
        ...

    def score_tree(self, batch: Batch, rows: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float32]:
        """[E] log-probability (nats) of targets[e] as the token after tokens[rows[e]]; rows ascend.

        The sequences are trees: a token follows its parent and sees what is cached and its ancestors. Token i of a
        sequence lies in slot start + i of its pages, whatever its position.
        """
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys and values of page `source` into page `target`."""
        ...

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """[T, width] the final, normed hidden state behind every token; drafts and samplers play no part."""
        ...


class DraftRunner(Protocol):
    """Runs a draft model. Samplers are those of the model that is drafted for."""

    vocab: int
    context: int
    page_tokens: int
    pages: int
    max_tokens: int

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        """As a Runner's."""
        ...

    def propose(
        self, batch: Batch, samplers: Sequence[Any], ahead: Sequence[Sequence[int]], words: int
    ) -> list[tuple[int, float]]:
        """For each sequence (the token that its sampler would choose here, its probability to this model).

        Only the first `words` of the vocabulary are looked at. The last tokens of sequence s, `ahead[s]`, are drafts
        that its sampler does not know yet; it does not change.
        """
        ...
