"""How even decoding is: thousands of single steps, the slow ones beside what the operating system did meanwhile.

Plain reads of as many bytes take turns with the steps: what the machine itself is capable of, without an engine.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.tasks.model import LanguageModel
from millis.types import SamplingParams

OUTLIER = 1.5  # a step is slow that takes this many times the median
CAUSES = ("crowded", "preempted", "stolen", "page_fault")  # as far as the system can tell
CROWDED_MS = 0.3  # a step whose threads waited that long, ready, for a core that something else used


@dataclass(slots=True)
class Counters:
    """What the system has counted since the process or the machine began."""

    preempted: int  # involuntary context switches of this process, all threads
    waited: int  # voluntary ones: a thread slept
    minor: int  # page faults without I/O
    major: int  # page faults with I/O
    stolen: int  # clock ticks that the host gave to others; 0 where it does not say
    ready_ms: float = 0.0  # that all threads together were ready to run and waited for a core; 0 where it does not say

    @classmethod
    def now(cls) -> Counters:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        switches = usage.ru_nivcsw, usage.ru_nvcsw
        return cls(*switches, usage.ru_minflt, usage.ru_majflt, _stolen_ticks(), _ready_ms())

    def minus(self, before: Counters) -> dict[str, float]:
        """What was counted since; a thread that ended meanwhile takes its waiting with it."""
        return {field.name: max(0, getattr(self, field.name) - getattr(before, field.name)) for field in fields(self)}


@dataclass(slots=True)
class Step:
    """One decode step: one token."""

    ms: float
    depth: int  # tokens in the cache before it
    counted: dict[str, float]

    def causes(self) -> list[str]:
        """What happened during the step, of what can hold it up; "unexplained" where nothing did."""
        counted = self.counted
        crowded = counted["ready_ms"] >= CROWDED_MS
        happened = (crowded, counted["preempted"], counted["stolen"], counted["minor"] + counted["major"])
        return [cause for cause, count in zip(CAUSES, happened, strict=True) if count] or ["unexplained"]


def decode_steps(
    lm: LanguageModel,
    *,
    steps: int,
    depth: int,
    prompt_tokens: int = 16,
    tell: Callable[[int], None] = lambda done: None,
    read: Callable[[int], list[float]] = lambda count: [],
) -> tuple[list[Step], list[float]]:
    """`steps` decode steps of a sequence that starts anew whenever `depth` tokens are in the cache; what reads took.

    Steps that hold a prompt are not counted, nor is the first sequence: it warms up. `tell` is told the steps so far
    between two sequences, where it holds up none that is counted, and there `read` makes as many plain reads as there
    were steps.
    """
    random = np.random.default_rng(0)
    found: list[Step] = []
    reads: list[float] = []
    params = SamplingParams(max_tokens=depth - prompt_tokens, temperature=0, ignore_eos=True)
    warm = False
    while len(found) < steps:
        tell(len(found))
        ids = [int(token) for token in random.integers(0, lm.runner.vocab, prompt_tokens)]
        request = lm.engine.submit(ids, params)
        events = lm.engine.events(request)
        next(events)  # the prompt
        at, counters = time.perf_counter(), Counters.now()
        length = prompt_tokens
        for _ in events:
            now, counted = time.perf_counter(), Counters.now()
            if warm:
                found.append(Step(1000 * (now - at), length, counted.minus(counters)))
            length += 1
            at, counters = time.perf_counter(), counted
            if len(found) >= steps:
                break
        lm.engine.cancel(request)
        reads += read(len(found) - len(reads))
        warm = True
    return found, reads


def report(steps: list[Step], reads: list[float]) -> dict[str, Any]:
    """Percentiles of steps and of plain reads, the slow steps by cause, and the slowest one by one; milliseconds."""
    ms = np.array([step.ms for step in steps])
    median = float(np.median(ms))
    slow = [step for step in steps if step.ms > OUTLIER * median]
    by_cause: dict[str, int] = {}
    for step in slow:
        for cause in step.causes():
            by_cause[cause] = by_cause.get(cause, 0) + 1
    return {
        "steps": len(steps),
        **_spread(ms),
        "reads": _spread(np.array(reads)) if reads else None,
        "slow_over_ms": OUTLIER * median,
        "slow_steps": len(slow),
        "slow_by_cause": by_cause,
        # how often the same happened at all: a cause that is as common among quick steps explains nothing
        "all_by_cause": {cause: sum(cause in step.causes() for step in steps) for cause in CAUSES},
        "slowest": [
            {"ms": step.ms, "depth": step.depth, "causes": step.causes(), **step.counted}
            for step in sorted(slow, key=lambda step: -step.ms)[:10]
        ],
        "histogram": _histogram(ms),
    }


PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p99_9_ms": 99.9}


def _spread(ms: NDArray[np.float64]) -> dict[str, float]:
    marks = {name: float(np.percentile(ms, share)) for name, share in PERCENTILES.items()}
    return {"mean_ms": float(ms.mean()), **marks, "min_ms": float(ms.min()), "max_ms": float(ms.max())}


def _histogram(ms: NDArray[np.float64]) -> dict[str, list[float]]:
    """Counts between edges that grow by the same factor; the last edge is the maximum."""
    low, high = float(ms.min()), float(ms.max())
    edges = np.geomspace(low, max(high, low * 1.001), 61)
    edges[0], edges[-1] = low, max(high, edges[-1])
    counts, _ = np.histogram(ms, edges)
    return {"edges_ms": edges.tolist(), "counts": counts.astype(float).tolist()}


def _stolen_ticks() -> int:
    """Of all processors, from the first line of /proc/stat."""
    try:
        with open("/proc/stat") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


def _ready_ms() -> float:
    """Of every thread of this process, from the second number of its schedstat."""
    total = 0
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):  # not Linux, not counted there, or a thread that ended
        return 0.0
    return total / 1e6
