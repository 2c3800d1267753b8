"""Learning rate over a run: linear warm-up, then a cosine (Loshchilov and Hutter, 2017). Pure."""

from __future__ import annotations

import math


def progress(step: float, steps: int | None, elapsed_s: float, limit_s: float | None) -> float:
    """The share of a run that is done, in [0, 1]: by steps or by time, whichever is further."""
    by_steps = step / steps if steps else 0.0
    by_time = elapsed_s / limit_s if limit_s else 0.0
    return min(1.0, max(by_steps, by_time))


def rate(done: float, warmup: float, floor: float = 0.0) -> float:
    """The factor of the learning rate at share `done`: from 0 to 1 over `warmup`, then down to `floor` at the end."""
    if done < warmup:
        return done / warmup
    along = (done - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, along)))
