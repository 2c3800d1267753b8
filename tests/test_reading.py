"""Readings alone: order, steps, promises kept. Costs are given, the clock is simulated."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millis.engine.predict import StepModel
from millis.engine.reading import Reading, Readings, calibrate
from millis.types import DeadlineError, OverloadError

BASE, ROW = 1.0, 0.1  # milliseconds of a step, and of a token in it


def made(max_waiting: int = 100) -> Readings:
    costs = StepModel()
    costs.calibrate({n: BASE + ROW * n for n in (1, 8, 32, 64, 128)}, {1: 0.0}, 0.0, 0.0)
    return Readings(costs, max_tokens=64, max_waiting=max_waiting)


def reading(number: int, lengths: list[int], *, due_s: float = math.inf, **more: Any) -> Reading:
    return Reading(
        id=number, texts=[[0] * n for n in lengths], arrival_s=more.pop("arrival_s", 0.0), due_s=due_s, **more
    )


def ids(chosen: list[tuple[Reading, int]]) -> list[tuple[int, int]]:
    return [(one.id, at) for one, at in chosen]


def test_deadlines_go_first_then_classes_then_arrival() -> None:
    queue = made()
    queue.add(reading(1, [40], priority="batch"), 0.0)
    queue.add(reading(2, [40], arrival_s=0.2), 0.2)
    queue.add(reading(3, [40], arrival_s=0.1), 0.2)
    queue.add(reading(4, [40], priority="interactive", arrival_s=0.2), 0.2)
    queue.add(reading(5, [40], due_s=9.0, priority="batch"), 0.2)
    queue.add(reading(6, [40], due_s=5.0), 0.2)
    assert [ids(queue.step(1.0)) for _ in range(7)] == [[(n, 0)] for n in (6, 5, 4, 3, 2, 1)] + [[]]


def test_short_texts_share_a_step_and_long_lists_take_several() -> None:
    queue = made()
    queue.add(reading(1, [14] * 5), 0.0)
    queue.add(reading(2, [4], arrival_s=0.1), 0.1)
    assert ids(queue.step(1.0)) == [(1, 0), (1, 1)]  # 32 tokens are a step: more would save little
    queue.add(reading(3, [4], due_s=2.0), 1.0)
    assert ids(queue.step(1.0)) == [(3, 0), (1, 2), (1, 3)]  # what is due goes between the steps of a list
    assert ids(queue.step(1.0)) == [(1, 4), (2, 0)] and len(queue) == 0
    queue.add(reading(4, [8], head=True), 1.0)
    queue.add(reading(5, [8], arrival_s=1.0), 1.0)
    assert ids(queue.step(1.0)) == [(4, 0)] and ids(queue.step(1.0)) == [(5, 0)]  # logits and vectors are two calls


def test_a_text_is_not_taken_along_where_that_makes_the_first_late() -> None:
    queue = made()
    queue.add(reading(1, [8], due_s=1.003), 1.0)  # alone 1.8 ms, with the other 5.8
    queue.add(reading(2, [40]), 1.0)
    assert ids(queue.step(1.0)) == [(1, 0)]


def test_what_cannot_be_in_time_is_refused_with_what_it_would_take() -> None:
    queue = made()
    late = "the deadline of {} ms cannot be met: the answer would take {}"
    with pytest.raises(DeadlineError, match=late.format("11.0", "16")) as found:
        queue.add(reading(1, [64, 64], due_s=1.010, arrival_s=0.999), 1.0)  # 2 · 7.4 ms, and 1 ms since it came
    with pytest.raises(DeadlineError, match=late.format("14.0", "19")):
        queue.add(reading(1, [64, 64], due_s=1.010, arrival_s=0.999, asked_ms=14.0), 1.0)
    assert 15.8 <= found.value.predicted_ms <= 16.5 and found.value.retry_after_s > 0 and len(queue) == 0
    queue.add(reading(2, [64, 64], due_s=1.017), 1.0)
    with pytest.raises(DeadlineError, match="requests before it would be late"):
        queue.add(reading(3, [64], due_s=1.016, arrival_s=1.0), 1.0)
    queue.add(reading(4, [64], arrival_s=1.0), 1.0)  # without a deadline it waits its turn
    assert [ids(queue.step(1.0)) for _ in range(3)] == [[(2, 0)], [(2, 1)], [(4, 0)]]


def test_it_forgets_what_is_late_and_what_nobody_waits_for() -> None:
    queue = made(max_waiting=3)
    for number in range(3):
        queue.add(reading(number, [8], due_s=5.0 + number), 1.0)
    with pytest.raises(OverloadError, match="3 requests wait"):
        queue.add(reading(9, [8]), 1.0)
    queue.drop(1)
    assert [one.id for one in queue.late(6.5)] == [0] and ids(queue.step(6.5)) == [(2, 0)]


arrivals = st.lists(
    st.tuples(
        st.floats(0, 0.1), st.lists(st.integers(1, 64), min_size=1, max_size=6), st.none() | st.floats(0.002, 0.2)
    ),
    max_size=30,
)


@given(arrivals)
def test_whoever_is_admitted_is_in_time_where_steps_take_what_was_predicted(given: Any) -> None:
    queue, now = made(), 0.0
    coming = sorted(((at, i, lengths, limit) for i, (at, lengths, limit) in enumerate(given)), key=lambda one: one[0])
    read: dict[int, list[int]] = {}
    admitted: dict[int, Reading] = {}
    while coming or len(queue):
        if not len(queue) and coming:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            at, i, lengths, limit = coming.pop(0)
            one = reading(i, lengths, arrival_s=at, due_s=math.inf if limit is None else at + limit)
            try:
                queue.add(one, now)
                admitted[i] = one
            except DeadlineError:
                pass
        assert queue.late(now) == []
        chosen = queue.step(now)
        if chosen:
            now += (BASE + ROW * sum(len(one.texts[at]) for one, at in chosen)) / 1000
        for one, at in chosen:
            read.setdefault(one.id, []).append(at)
            assert now <= one.due_s + 1e-9
    assert read == {i: list(range(len(one.texts))) for i, one in admitted.items()}


def test_measuring_finds_the_costs_of_a_simulated_machine() -> None:
    now = 0.0

    def read(texts: list[list[int]]) -> None:
        nonlocal now
        now += (BASE + ROW * sum(map(len, texts)) + 1e-4 * sum(len(text) ** 2 for text in texts)) / 1000

    for quick in (False, True):
        costs = StepModel()
        calibrate(costs, read, lambda: now, 512, quick)
        queue = Readings(costs, max_tokens=512, max_waiting=9)
        queue.add(reading(1, [100]), 0.0)
        assert queue.backlog_ms(0.0) == pytest.approx(BASE + ROW * 100 + 1e-4 * 100**2, rel=0.1)
