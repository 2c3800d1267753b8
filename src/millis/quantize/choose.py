"""Which type each tensor takes: least loss within so many bytes, or fewest bytes within so much loss. Pure.

Losses and bytes of tensors add up, so that it is a knapsack of groups. On the lower convex hull of each tensor's
options, taking upgrades in the order of loss saved a byte is optimal for every total that it passes (Sinha and
Zoltners, 1979); between two totals it is off by less than one upgrade.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from millis.models.tensor import GgmlType


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a tensor: what it adds to the predicted loss, and to the total that is limited."""

    type: GgmlType
    size: float  # bytes
    loss: float  # nats a token, ≥ 0


Choice = dict[str, Option]


def within_size(options: Mapping[str, Sequence[Option]], limit: float) -> Choice | None:
    """Least loss whose sizes add up to `limit` at most; None where even the smallest options take more."""
    chosen = smallest(options)
    left = limit - sum(option.size for option in chosen.values())
    if left < 0:
        return None
    full = set()
    for name, option in _upgrades(options):
        more = option.size - chosen[name].size
        if name in full or more > left:
            full.add(name)  # a later upgrade of this tensor starts from the one that did not fit
            continue
        chosen[name] = option
        left -= more
    return chosen


def within_loss(options: Mapping[str, Sequence[Option]], limit: float) -> Choice | None:
    """Fewest bytes whose losses add up to `limit` at most; None where even the best options lose more."""
    chosen = smallest(options)
    loss = sum(option.loss for option in chosen.values())
    for name, option in _upgrades(options):
        if loss <= limit:
            break
        loss += option.loss - chosen[name].loss
        chosen[name] = option
    return chosen if sum(option.loss for option in chosen.values()) <= limit else None


def smallest(options: Mapping[str, Sequence[Option]]) -> Choice:
    return {name: hull(found)[0] for name, found in options.items()}


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, from the smallest to the one of least loss."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.loss)):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _gain(smaller: Option, larger: Option) -> float:
    """Loss saved a byte."""
    return (smaller.loss - larger.loss) / max(larger.size - smaller.size, 1e-9)


def _upgrades(options: Mapping[str, Sequence[Option]]) -> Iterator[tuple[str, Option]]:
    """Every step along every hull, the most gain a byte first."""
    hulls = {name: hull(found) for name, found in options.items()}
    heap = [(-_gain(steps[0], steps[1]), name, 1) for name, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(heap)
    while heap:
        _, name, at = heapq.heappop(heap)
        steps = hulls[name]
        yield name, steps[at]
        if at + 1 < len(steps):
            heapq.heappush(heap, (-_gain(steps[at], steps[at + 1]), name, at + 1))
