"""A text's final hidden states in a decoder as one vector: their mean, or the last of them."""

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


def groups(prompts: Prompts, runner: HiddenRunner, pages: int, rows: int | None = None) -> Iterator[Prompts]:
    """Consecutive prompts that may run together: in one step, of `rows` tokens at most, and in `pages` pages, or alone.

    rows: as many as a step may have, unless given.
    """
    rows = runner.max_tokens if rows is None else rows
    group: list[Sequence[int]] = []
    tokens = held = 0
    for prompt in prompts:
        need = -(-len(prompt) // runner.page_tokens)
        full = tokens + len(prompt) > rows or held + need > pages or len(group) == runner.max_sequences
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
        total = sum(states.sum(axis=0) for states in _pieces(runner, group[0], pages))
        return np.asarray(total, np.float32)[None] / np.float32(len(group[0]))
    states, ends = _together(runner, group, pages)
    begins = np.concatenate([[0], ends[:-1]])
    sums = np.add.reduceat(states, begins, axis=0, dtype=np.float32)
    return np.asarray(sums / (ends - begins)[:, None], np.float32)


def last_hidden(runner: HiddenRunner, group: Prompts, pages: Sequence[int]) -> NDArray[np.float32]:
    """[N, width] the hidden state behind the last token of each prompt of a group, run as `mean_hidden` does."""
    if len(group) == 1:
        *_, states = _pieces(runner, group[0], pages)
        return states[-1:]
    states, ends = _together(runner, group, pages)
    return states[ends - 1]


def _together(
    runner: HiddenRunner, group: Prompts, pages: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The states of all prompts in a row, and where each prompt's end."""
    counts = [-(-len(prompt) // runner.page_tokens) for prompt in group]
    tables = np.full((len(group), max(counts)), -1, np.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = pages[taken : taken + count]
        taken += count
    lengths = np.asarray([len(prompt) for prompt in group], np.int32)
    tokens = np.asarray([token for prompt in group for token in prompt], np.int32)
    states = runner.hidden(Batch(tokens, np.zeros(len(group), np.int32), lengths, tables))
    return states, np.cumsum(lengths, dtype=np.int32)


def hidden_part(
    runner: HiddenRunner, prompt: Sequence[int], start: int, rows: int, pages: Sequence[int]
) -> NDArray[np.float32]:
    """[rows, width] the states of a prompt's next tokens; [0, start) ran before, in the same pages."""
    part = np.asarray(prompt[start : start + rows], np.int32)
    table = np.asarray([pages], np.int32)
    return runner.hidden(Batch(part, np.asarray([start], np.int32), np.asarray([len(part)], np.int32), table))


def _pieces(runner: HiddenRunner, prompt: Sequence[int], pages: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """The states of a prompt, in as many steps as it takes."""
    for start in range(0, len(prompt), runner.max_tokens):
        yield hidden_part(runner, prompt, start, runner.max_tokens, pages)
