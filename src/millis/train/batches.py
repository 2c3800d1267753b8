"""Which samples make up a step: shuffled, batches of like length, cut into micro-batches of bounded size. Pure.

The order follows from seed and epoch alone, so that a resumed run goes on with the very batch it would have had.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from millis.types import RequestError

Sample = TypeVar("Sample")
Micro = list[int]  # numbers of samples that are computed together
Step = list[Micro]  # what one update of the weights is computed from

_POOL = 32  # batches that are sorted together: little padding, and still a new mixture every epoch


def epoch_steps(lengths: Sequence[int], batch: int, micro_tokens: int, seed: int, epoch: int) -> list[Step]:
    """All samples once, `batch` a step; each micro-batch has at most `micro_tokens` tokens, padding counted."""
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(len(lengths))
    sizes = np.asarray(lengths)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch * _POOL):
        pool = order[start : start + batch * _POOL]
        pool = pool[np.argsort(sizes[pool], kind="stable")]
        batches += [pool[i : i + batch].tolist() for i in range(0, len(pool), batch)]
    return [micro_batches(batches[i], lengths, micro_tokens) for i in draw.permutation(len(batches))]


def micro_batches(samples: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> Step:
    """`samples` by length, cut so that count × longest stays within `micro_tokens`; a longer sample stands alone."""
    step: Step = []
    for sample in sorted(samples, key=lambda i: (lengths[i], i)):
        if step and (len(step[-1]) + 1) * lengths[sample] <= micro_tokens:
            step[-1].append(sample)
        else:
            step.append([sample])
    return step


def padding(steps: Sequence[Step], lengths: Sequence[int]) -> float:
    """The share of computed tokens that is padding."""
    used = sum(lengths[i] for step in steps for micro in step for i in micro)
    computed = sum(len(micro) * max(lengths[i] for i in micro) for step in steps for micro in step)
    return 1 - used / computed if computed else 0.0


def split(keys: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places in `keys` at random: to train on, and a `share` to evaluate on; in order. Equal keys stay together."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    alike, most, held = list(groups.values()), round(len(keys) * share), list[int]()
    for group in np.random.default_rng((seed, 0x5EED)).permutation(len(alike)).tolist():
        if len(held) + len(alike[group]) <= most:
            held += alike[group]
    return sorted(set(range(len(keys))) - set(held)), sorted(held)


def divided(
    samples: Sequence[Sample], keys: Sequence[Hashable], share: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and a `share` to evaluate on, as `split` has it. RequestError where either has none."""
    kept, out = split(keys, share, seed)
    if share and not (kept and out):
        raise RequestError(
            f"--eval-split {share:g} of {len(samples)} samples, copies together, leaves none to "
            f"{'evaluate' if kept else 'train'} on; give more data, another share, or --eval FILE"
        )
    return [samples[i] for i in kept], [samples[i] for i in out]
