"""Any mixture of classes, tenants, deadlines, scores and cancellations: answers stay the model's, no page is lost."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fake import FakeRunner, continuation
from millis.engine.engine import Engine
from millis.engine.request import Request
from millis.types import DeadlineError, SamplingParams


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


shapes = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 30),
        "answer": st.integers(1, 10),
        "priority": st.sampled_from(["interactive", "standard", "batch"]),
        "tenant": st.sampled_from(["", "a", "b"]),
        "deadline_ms": st.one_of(st.none(), st.integers(20, 3000)),
        "scores": st.integers(0, 3),
        "cancel_after": st.one_of(st.none(), st.integers(0, 20)),
        "wait": st.integers(0, 5),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    traffic=st.lists(shapes, min_size=1, max_size=14),
    pages=st.integers(10, 24),
    max_tokens=st.integers(1, 20),
    max_sequences=st.integers(1, 6),
    calibrated=st.booleans(),
)
def test_any_traffic_is_answered_as_alone(
    traffic: list[dict[str, Any]], pages: int, max_tokens: int, max_sequences: int, calibrated: bool
) -> None:
    clock = Clock()
    runner = FakeRunner(pages=pages, context=40, max_tokens=max_tokens, max_sequences=max_sequences)

    def tick() -> None:
        clock.now += 0.002

    runner.on_step = tick
    e = Engine(runner, frozenset(), clock, max_gap_ms=10, max_step_ms=20)
    if calibrated:
        e.calibrate()
    runner.batches.clear()
    coming, asked = list(traffic), []
    steps = 0
    while coming or e.has_work:
        while coming and coming[0]["wait"] <= steps:
            asked += submit(e, coming.pop(0), steps)
        for request, _, stop in asked:
            if stop is not None and steps >= stop:
                e.cancel(request)
        if not e.step() and coming:
            coming[0]["wait"] = steps
        steps += 1
        e.scheduler.check_integrity()
        assert steps < 5000, "traffic never finished"
    assert e.scheduler.allocator.free == pages
    for request, want, stop in asked:
        if request.score is not None:
            assert request.score.values == want[: len(request.score.values)]
            complete = len(request.score.values) == len(want)
        else:
            assert request.output == want[: len(request.output)]
            complete = len(request.output) == len(want)
        assert complete or stop is not None or request.due_s is not None
        assert request.finish_reason in ("stop", "length", "deadline", "cancelled")
        assert sum(event.finish_reason is not None for event in request.inbox) == 1
    assert e.counters.admitted == len(asked)


def submit(e: Engine, shape: dict[str, Any], steps: int) -> list[tuple[Request, list[Any], int | None]]:
    """Asks for what `shape` says; what is to come of it, and the step before which it is cancelled."""
    prompt = [(7 * i + shape["prompt"]) % 97 for i in range(shape["prompt"])]
    deadline = None if shape["deadline_ms"] is None else e.clock() + shape["deadline_ms"] / 1000
    options = {"deadline_s": deadline, "priority": shape["priority"], "tenant": shape["tenant"]}
    stop = None if shape["cancel_after"] is None else steps + shape["cancel_after"]
    good = continuation(prompt, shape["answer"])
    try:
        if shape["scores"]:
            off = [*good[:-1], good[-1] + 1 if good[-1] < 96 else good[-1] - 1]
            asked = [good, off, good[:1]][: shape["scores"]]
            return [(e.submit_score(prompt, asked, **options), [0.0, -1.0, 0.0][: shape["scores"]], stop)]
        params = SamplingParams(max_tokens=shape["answer"], ignore_eos=True)
        return [(e.submit(prompt, params, **options), good, stop)]
    except DeadlineError:
        assert deadline is not None
        return []
