"""Continuations of one prompt as a tree of tokens, so that one forward scores them all. Pure.

Continuations that begin alike share the nodes of their common beginning (Miao et al., 2024, SpecInfer, computes a
tree of guesses likewise). A node is a token that others follow: the last token of a continuation is only asked for,
never computed. Nodes and edges are in order of level, so that a tree cut at a depth is the beginning of the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

LARGE = 16  # times as many tokens as fit a step: no use to see whether all of them do


@dataclass(slots=True)
class TokenTree:
    """`tokens[i]` follows node `parents[i]`, −1 being the prompt's last token. Edge e asks for `targets[e]` behind node
    `rows[e]`; `paths[c]` are the edges of continuation c, in order."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    levels: list[tuple[int, int, int]] = field(default_factory=list)  # nodes, edges and asked rows up to each depth

    @property
    def depth(self) -> int:
        """Tokens of the longest continuation."""
        return len(self.levels)


Part = tuple[int, TokenTree | None]  # so many continuations, in one tree


def token_tree(continuations: Sequence[Sequence[int]]) -> TokenTree:
    """The tree of `continuations`, of which none is empty."""
    tree = TokenTree(paths=[[] for _ in continuations])
    at = [-1] * len(continuations)  # the node each stands at
    level, asked = 0, 0
    while going := [c for c, tokens in enumerate(continuations) if len(tokens) > level]:
        edges: dict[tuple[int, int], int] = {}
        for c in sorted(going, key=lambda c: at[c]):
            key = at[c], continuations[c][level]
            if key not in edges:
                edges[key] = len(tree.targets)
                tree.rows.append(key[0])
                tree.targets.append(key[1])
            tree.paths[c].append(edges[key])
        asked += len({row for row, _ in edges})
        nodes: dict[int, int] = {}
        for c in going:
            edge = tree.paths[c][level]
            if len(continuations[c]) == level + 1:
                continue
            if edge not in nodes:
                nodes[edge] = len(tree.tokens)
                tree.tokens.append(tree.targets[edge])
                tree.parents.append(tree.rows[edge])
            at[c] = nodes[edge]
        level += 1
        # Cut here, the tree computes the nodes of the levels before: those of this one are asked for only.
        tree.levels.append((len(tree.tokens) - len(nodes), len(tree.targets), asked))
    return tree


@lru_cache(maxsize=32)  # labels stay the same from text to text
def parts(continuations: tuple[tuple[int, ...], ...], most: int) -> tuple[Part, ...]:
    """Trees of at most `most` nodes for all continuations, in their order; None for one that is longer alone."""
    if len(continuations) == 1 and len(continuations[0]) > 1:
        return ((1, None),)  # a chain: nothing to share, and no mask needed
    if sum(map(len, continuations)) <= LARGE * max(1, most):
        whole = token_tree(continuations)
        if len(whole.tokens) <= most:
            return ((len(continuations), whole),) if continuations else ()
    found: list[Part] = []
    first = 0
    while first < len(continuations):
        last, size, tree = first, 0, None
        seen: set[tuple[int, ...]] = set()
        while last < len(continuations) and len(continuations[last]) <= most + 1:
            own = {tuple(continuations[last][:n]) for n in range(1, len(continuations[last]))} - seen
            if size + len(own) > most:
                break
            seen |= own
            size += len(own)
            last += 1
        if last > first:
            tree = token_tree(continuations[first:last])
        found.append((max(1, last - first), tree))
        first += max(1, last - first)
    return tuple(found)
