"""Jitter: steps counted on an engine without weights, percentiles in closed form, causes against what was caused."""

from __future__ import annotations

import mmap
import os
from types import SimpleNamespace
from typing import Any

import pytest

from fake import FakeRunner
from millis.bench.jitter import Counters, Step, decode_steps, report
from millis.engine.engine import Engine

QUIET = {"preempted": 0, "waited": 3, "minor": 0, "major": 0, "stolen": 0, "ready_ms": 0.1}


def model() -> Any:
    runner = FakeRunner(max_tokens=64)
    return SimpleNamespace(runner=runner, engine=Engine(runner, frozenset()))


def test_only_single_decode_steps_are_counted() -> None:
    lm, told = model(), list[int]()
    steps, reads = decode_steps(
        lm, steps=50, depth=32, prompt_tokens=16, tell=told.append, read=lambda count: [float(count)] * count
    )
    assert len(steps) == 50 and told == [0, 0, 15, 30, 45]
    assert reads == [15.0] * 45 + [5.0] * 5  # as many as steps, between two sequences
    assert all(step.ms > 0 for step in steps)
    # A sequence gives 16 tokens: the first with its prompt, 15 in steps of their own. The first sequence warms up.
    assert [step.depth for step in steps] == [*range(16, 31)] * 3 + [*range(16, 21)]
    assert lm.runner.batches.count([16]) == 5
    assert not lm.engine.scheduler.running and not lm.engine.scheduler.waiting


def test_percentiles_and_slow_steps() -> None:
    steps = [Step(1.0, 20, QUIET) for _ in range(989)]
    steps += [Step(10.0, 30, QUIET | {"preempted": 2}) for _ in range(8)]
    steps += [Step(30.0, 31, QUIET | {"ready_ms": 28.0})]
    steps += [Step(40.0, 31, QUIET | {"minor": 1, "stolen": 1}), Step(50.0, 32, QUIET)]
    result = report(steps, [2.0, 4.0])
    assert (result["p50_ms"], result["p90_ms"], result["max_ms"], result["min_ms"]) == (1, 1, 50, 1)
    assert result["p99_ms"] == 10  # the 990th of 1,000
    assert result["mean_ms"] == pytest.approx((989 + 80 + 30 + 90) / 1000)
    assert (result["slow_over_ms"], result["slow_steps"]) == (1.5, 11)
    assert result["slow_by_cause"] == {"crowded": 1, "preempted": 8, "stolen": 1, "page_fault": 1, "unexplained": 1}
    assert [(step["ms"], step["causes"]) for step in result["slowest"][:2]] == [
        (50, ["unexplained"]),
        (40, ["stolen", "page_fault"]),
    ]
    assert sum(result["histogram"]["counts"]) == 1000
    assert (result["reads"]["p50_ms"], result["reads"]["max_ms"]) == (3, 4)


def test_a_cause_is_also_counted_among_quick_steps() -> None:
    steps = [Step(1.0, 20, QUIET | {"preempted": 1}) for _ in range(30)] + [Step(9.0, 20, QUIET | {"preempted": 1})]
    result = report(steps, [2.0, 4.0])
    assert result["slow_by_cause"] == {"preempted": 1}
    assert result["all_by_cause"] == {"crowded": 0, "preempted": 31, "stolen": 0, "page_fault": 0}


def test_steps_that_all_took_the_same_time() -> None:
    result = report([Step(2.0, 20, QUIET)] * 10, [])
    assert result["reads"] is None
    assert (result["slow_steps"], result["slowest"]) == (0, [])
    assert sum(result["histogram"]["counts"]) == 10


def test_counters_see_page_faults_and_switches() -> None:
    before = Counters.now()
    with mmap.mmap(-1, 256 * mmap.PAGESIZE) as fresh:
        fresh.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(256):
            fresh[page * mmap.PAGESIZE] = 1
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.read(read, 1)
        os._exit(0)
    os.write(write, b"x")
    os.waitpid(child, 0)  # sleeps: a voluntary switch
    counted = Counters.now().minus(before)
    assert counted["minor"] >= 256
    assert counted["waited"] >= 1
    assert min(counted.values()) >= 0
