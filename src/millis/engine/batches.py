"""The arrays of a step, from what the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from millis.engine.adapters import natives
from millis.engine.runner import Batch, Ranked, Runner
from millis.engine.scheduler import Chunk


def batch_of(chunks: Sequence[Chunk]) -> Batch:
    """Tokens and the guesses behind them, one sequence a chunk."""
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.length]
        tokens += chunk.drafts
    batch = _batch(tokens, chunks, [chunk.length + len(chunk.drafts) for chunk in chunks])
    batch.drafted = ints([len(chunk.drafts) for chunk in chunks])
    return batch


def tree_batch(chunks: Sequence[Chunk]) -> tuple[Batch, NDArray[np.int32], NDArray[np.int32]]:
    """Prompts' ends and trees of continuations: the batch, and the row and target of every edge."""
    tokens: list[int] = []
    parents: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for chunk in chunks:
        assert chunk.tree is not None
        trunk = chunk.request.tokens[chunk.start :]
        nodes, edges, _ = chunk.tree.levels[chunk.depth - 1]
        last = len(trunk) - 1
        rows += [len(tokens) + len(trunk) + row for row in chunk.tree.rows[:edges]]
        tokens += trunk + chunk.tree.tokens[:nodes]
        parents += [*range(-1, last), *(len(trunk) + parent for parent in chunk.tree.parents[:nodes])]
        targets += chunk.tree.targets[:edges]
    batch = _batch(tokens, chunks, [chunk.length for chunk in chunks])
    batch.parents = ints(parents)
    return batch, ints(rows), ints(targets)


def score_part(runner: Runner, chunk: Chunk) -> NDArray[np.float32] | Ranked:
    """Runs a part of the continuation that is scored now, which no tree holds; what is found of each of its tokens."""
    request, score = chunk.request, chunk.request.score
    assert score is not None
    targets = score.continuations[len(score.values)]
    inputs = [request.tokens[-1], *targets[:-1]]
    part = slice(score.done, score.done + chunk.length)
    batch, asked = _batch(inputs[part], [chunk], [chunk.length]), ints(targets[part])
    return runner.score(batch, asked) if score.best is None else runner.score_best(batch, asked, score.best)


def _batch(tokens: Sequence[int], chunks: Sequence[Chunk], lengths: Sequence[int]) -> Batch:
    """One sequence a chunk; page tables are padded with −1."""
    tables = np.full((len(chunks), max(len(chunk.request.pages) for chunk in chunks)), -1, np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.request.pages)] = chunk.request.pages
    return Batch(
        ints(tokens),
        ints([chunk.start for chunk in chunks]),
        ints(lengths),
        tables,
        adapters=natives([chunk.request.adapter for chunk in chunks]),
    )


def ints(values: Sequence[int] | Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """Token ids, positions, rows, pages: as the native runtime takes them."""
    return np.asarray(values, np.int32)
