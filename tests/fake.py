"""A runner without weights: the next token is a fixed function of the tokens whose keys the cache holds.

It keeps a real paged store, so a wrong page, position or order of chunks changes what it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from millis.engine.runner import Batch, Ranked, Sampled
from millis.types import SamplingParams

VOCAB = 97


def next_token(tokens: Sequence[int]) -> int:
    """What the fake model says after `tokens`."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """The fake model's greedy answer, without engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    vocab = VOCAB
    page_tokens = 4

    def __init__(self, *, pages: int = 64, context: int = 128, max_tokens: int = 16, max_sequences: int = 4) -> None:
        self.pages, self.context = pages, context
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        self.memory = np.full((pages, self.page_tokens), -1)
        self.batches: list[list[int]] = []  # lengths of every step
        self.words: list[int] = []  # that were looked at by every proposal
        self.fail: BaseException | None = None
        self.on_step: Any = None
        self.say: Callable[[Sequence[int]], int] = next_token

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Any:
        return frozenset()

    def restricted(self, params: SamplingParams, tokens: Sequence[int], allowed: frozenset[int]) -> Any:
        return allowed

    def _sequences(self, batch: Batch) -> list[list[int]]:
        assert len(batch.tokens) == sum(batch.lengths) <= self.max_tokens
        assert len(batch.starts) <= self.max_sequences
        found, at = [], 0
        for start, length, table in zip(batch.starts, batch.lengths, batch.tables, strict=True):
            for position in range(start, start + length):
                self.memory[table[position // self.page_tokens], position % self.page_tokens] = batch.tokens[at]
                at += 1
            found.append(
                [int(self.memory[table[p // self.page_tokens], p % self.page_tokens]) for p in range(start + length)]
            )
        return found

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        if self.on_step:
            self.on_step()
        if self.fail:
            raise self.fail
        self.batches.append([int(n) for n in batch.lengths])
        drafted = [0] * len(samplers) if batch.drafted is None else [int(n) for n in batch.drafted]
        tokens: list[list[int]] = []
        for sequence, count, sampler in zip(self._sequences(batch), drafted, samplers, strict=True):
            assert count == 0 or sampler is not None
            tokens.append([])
            for end in range(len(sequence) - count, len(sequence) + 1) if sampler is not None else ():
                said = self.say(sequence[:end])
                tokens[-1].append(said if not sampler or said in sampler else min(sampler))
                if tokens[-1][-1:] != sequence[end : end + 1]:
                    break
        return Sampled(tokens, [[None] * len(one) for one in tokens])

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        """−(distance of the target from the fake model's choice), so that sums tell which tokens were asked."""
        (sequence,) = self._sequences(batch)
        start = int(batch.starts[0])
        said = [next_token(sequence[: start + i + 1]) for i in range(len(targets))]
        return np.array([0 if t < 0 else -abs(int(t) - s) for t, s in zip(targets, said, strict=True)], np.float32)

    def score_best(self, batch: Batch, targets: np.ndarray, count: int) -> Ranked:
        """As `score`; what the fake model says is the likeliest, all others are equally unlikely."""
        values = self.score(batch, targets)
        (sequence,) = self._sequences(batch)
        start = int(batch.starts[0])
        said = [next_token(sequence[: start + i + 1]) for i in range(len(targets))]
        best = np.array([[(one + n) % VOCAB for n in range(count)] for one in said], np.int32)
        return Ranked(values, 1 + (values < 0), best, -np.ones(best.shape, np.float32).cumsum(1) + 1)

    def score_tree(self, batch: Batch, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """As `score`, of trees: a token's text is what the cache holds before its sequence and its ancestors."""
        assert batch.parents is not None and list(rows) == sorted(rows)
        self.batches.append([int(n) for n in batch.lengths])
        texts: list[list[int]] = []
        first = 0
        for sequence, start, length in zip(self._sequences(batch), batch.starts, batch.lengths, strict=True):
            for i, parent in enumerate(batch.parents[first : first + length]):
                before = sequence[:start] if parent < 0 else texts[first + int(parent)]
                texts.append([*before, int(batch.tokens[first + i])])
            first += int(length)
        said = [next_token(texts[int(row)]) for row in rows]
        return np.array([-abs(int(t) - s) for t, s in zip(targets, said, strict=True)], np.float32)

    def hidden(self, batch: Batch) -> np.ndarray:
        """[T, 2] behind every token what the fake model says next, and 1."""
        self.batches.append([int(n) for n in batch.lengths])
        said = [
            next_token(sequence[: start + i + 1])
            for sequence, start, length in zip(self._sequences(batch), batch.starts, batch.lengths, strict=True)
            for i in range(length)
        ]
        return np.array([[one, 1] for one in said], np.float32)

    def copy_page(self, source: int, target: int) -> None:
        self.memory[target] = self.memory[source]


class FakeDraft(FakeRunner):
    """Proposes what `say` says, sure of it; it holds no opinion on samplers."""

    def propose(
        self, batch: Batch, samplers: Sequence[Any], ahead: Sequence[Sequence[int]], words: int
    ) -> list[tuple[int, float]]:
        self.words.append(words)
        if self.on_step:
            self.on_step()
        self.batches.append([int(n) for n in batch.lengths])
        sequences = self._sequences(batch)
        for sequence, drafts, sampler in zip(sequences, ahead, samplers, strict=True):
            assert sampler is not None and sequence[len(sequence) - len(drafts) :] == list(drafts)
        return [(self.say(sequence), 0.95) for sequence in sequences]
