"""Steps that score trees of continuations: how much of a tree there is time for, and what it says. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millis.engine.predict import StepModel, Work
from millis.engine.request import Score
from millis.engine.tree import TokenTree, parts

if TYPE_CHECKING:
    from millis.engine.scheduler import Chunk

LEAST_NODES = 8  # a tree is not cut into smaller ones than this for a shorter step


@dataclass(frozen=True, slots=True)
class TreePlan:
    """What a request brings to a step: `length` rows, of them the rest of its prompt and a tree cut at `depth`."""

    tree: TokenTree
    depth: int
    length: int
    work: Work  # of the step, with this


def plan_tree(
    score: Score, start: int, begin: int, most: int, work: Work, costs: StepModel, left_ms: float, limit_ms: float
) -> TreePlan | None:
    """The next tree of a request beside `work`, behind `begin` rows of its prompt at position `start`.

    left_ms: until its own deadline: where all of its trees take longer, one of all continuations is cut at the depth
    that there is time for. limit_ms: what the step may take for others' sake: a tree that takes longer is divided.
    None: it had better wait for a later step.
    """

    def plan(tree: TokenTree, depth: int) -> TreePlan:
        nodes, _, asked = tree.levels[depth - 1]
        return TreePlan(tree, depth, begin + nodes, work.add(start, begin + nodes, asked))

    def ms(tree: TokenTree, depth: int) -> float:
        return costs.ms(plan(tree, depth).work)

    trees = [tree for _, tree in score.parts]
    if None in trees:
        first = trees[0]
        return None if first is None else plan(first, first.depth)
    whole = [tree for tree in trees if tree is not None]
    if sum(ms(tree, tree.depth) for tree in whole) > left_ms and not score.values and not work.rows:
        tree = whole[0] if len(whole) == 1 else parts(score.continuations, 1 << 30)[0][1]
        assert tree is not None
        fits = [d for d in range(1, tree.depth + 1) if plan(tree, d).length <= most and ms(tree, d) <= left_ms]
        return plan(tree, max(fits, default=1))
    tree = whole[0]
    if ms(tree, tree.depth) > limit_ms and work.rows:
        return None
    while ms(tree, tree.depth) > limit_ms and len(tree.tokens) > LEAST_NODES and score.parts[0][0] > 1:
        waiting = score.continuations[len(score.values) :]
        score.parts[:] = parts(waiting, max(LEAST_NODES, len(tree.tokens) // 2))
        divided = score.parts[0][1]
        if divided is None:
            return None
        tree = divided
    return plan(tree, tree.depth)


def edges_of(chunks: Sequence[Chunk], values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Each chunk's share of what a step of trees found."""
    at = 0
    for chunk in chunks:
        assert chunk.tree is not None
        edges = chunk.tree.levels[chunk.depth - 1][1]
        yield values[at : at + edges]
        at += edges


def path_sums(tree: TokenTree, values: NDArray[np.float32], depth: int) -> list[float]:
    """For each continuation the sum over its first `depth` tokens, nats."""
    found = values.astype(np.float64).tolist()
    return [sum(found[edge] for edge in path[:depth]) for path in tree.paths]
