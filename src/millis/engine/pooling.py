"""The mean of a text's final hidden states: its embedding by a model that was made to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from millis.engine.runner import Batch

Prompts = Sequence[Sequence[int]]


class HiddenRunner(Protocol):
    """What pooling needs of a runner."""

    page_tokens: int
    max_tokens: int
    max_sequences: int

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """[T, width] the final, normed hidden state behind every token of the batch."""
        ...


def groups(prompts: Prompts, runner: HiddenRunner, pages: int) -> Iterator[Prompts]:
    """Consecutive prompts that may run together: in one step and in `pages` pages, or alone."""
    group: list[Sequence[int]] = []
    tokens = held = 0
    for prompt in prompts:
        need = -(-len(prompt) // runner.page_tokens)
        full = tokens + len(prompt) > runner.max_tokens or held + need > pages or len(group) == runner.max_sequences
        if group and full:
            yield group
            group, tokens, held = [], 0, 0
        group.append(prompt)
        tokens, held = tokens + len(prompt), held + need
    if group:
        yield group


def mean_hidden(runner: HiddenRunner, group: Prompts, pages: Sequence[int]) -> NDArray[np.float32]:
    """[N, width] the mean hidden state of each prompt of a group; one that is longer than a step runs in pieces."""
    if len(group) == 1:
        return _sum_alone(runner, group[0], pages)[None] / np.float32(len(group[0]))
    counts = [-(-len(prompt) // runner.page_tokens) for prompt in group]
    tables = np.full((len(group), max(counts)), -1, np.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = pages[taken : taken + count]
        taken += count
    lengths = np.asarray([len(prompt) for prompt in group], np.int32)
    tokens = np.asarray([token for prompt in group for token in prompt], np.int32)
    states = runner.hidden(Batch(tokens, np.zeros(len(group), np.int32), lengths, tables))
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sums = np.add.reduceat(states, begins, axis=0, dtype=np.float32)
    return np.asarray(sums / lengths[:, None], np.float32)


def _sum_alone(runner: HiddenRunner, prompt: Sequence[int], pages: Sequence[int]) -> NDArray[np.float32]:
    table = np.asarray([pages], np.int32)
    total: NDArray[np.float32] | None = None
    for at in range(0, len(prompt), runner.max_tokens):
        part = np.asarray(prompt[at : at + runner.max_tokens], np.int32)
        batch = Batch(part, np.asarray([at], np.int32), np.asarray([len(part)], np.int32), table)
        summed = runner.hidden(batch).sum(axis=0)
        total = summed if total is None else total + summed
    assert total is not None
    return total
