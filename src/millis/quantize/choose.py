"""Which type each tensor takes: least loss within so many bytes, or fewest bytes within so much loss. Pure.

Losses and bytes of tensors add up, so that it is a knapsack of groups. On the lower convex hull of each tensor's
options, taking upgrades in the order of loss saved a byte is optimal for every total that it passes (Sinha and
Zoltners, 1979); between two totals it is off by less than one upgrade. That of a vocabulary may be a tenth of the file:
so what it leaves of the limit is spent on others.
"""

from __future__ import annotations

import heapq
import math
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
    loss, size = _total_loss(chosen), total_size(chosen)
    best, best_size = (chosen, size) if loss <= limit else (None, math.inf)
    left_out = set()
    for name, option in _upgrades(options) if best is None else ():
        if name in left_out:
            continue
        fewer, more = chosen[name].loss - option.loss, option.size - chosen[name].size
        if loss - fewer > limit:
            chosen[name] = option
            loss, size = loss - fewer, size + more
            continue
        if size + more < best_size:  # what is enough with this one; the next ones may be with less
            best, best_size = chosen | {name: option}, size + more
        left_out.add(name)
    return None if best is None else _spent(options, best, limit)


def total_size(choice: Choice) -> float:
    """Of a choice."""
    return sum(option.size for option in choice.values())


def _total_loss(choice: Choice) -> float:
    return sum(option.loss for option in choice.values())


def _spent(options: Mapping[str, Sequence[Option]], choice: Choice, limit: float) -> Choice:
    """Smaller options where what is left of the limit allows them, those first that save most bytes for their loss."""
    chosen = dict(choice)
    left = limit - _total_loss(chosen)
    while found := _downgrade(options, chosen, left):
        name, option = found
        left -= option.loss - chosen[name].loss
        chosen[name] = option
    return chosen


def _downgrade(
    options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], left: float
) -> tuple[str, Option] | None:
    """Of the smaller options whose losses fit in `left`, the one that saves most bytes for its loss."""
    fitting = (
        (name, option)
        for name, found in options.items()
        for option in found
        if option.size < chosen[name].size and option.loss - chosen[name].loss <= left
    )
    return min(fitting, key=lambda one: _gain(one[1], chosen[one[0]]), default=None)


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
