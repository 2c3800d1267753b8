"""Deadlines under load, on simulated time: who is admitted is in time, whoever else comes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from millis.engine.request import Request
from millis.types import DeadlineError, OverloadError, SamplingParams
from simulated import END, Arrival, Outcome, engine, in_time, poisson, run

CAPACITY = 75.0  # requests of 100 + 32 tokens a second, about what the simulated machine does
COUNT = 1000


@pytest.fixture(scope="module")
def loads() -> dict[float, Outcome]:
    """Outcomes by load, in capacities. The machine pauses in three steps of a thousand."""
    return {times: run(engine(pauses=0.003), poisson(times * CAPACITY, COUNT)) for times in (0.5, 1, 2, 4)}


def per_second(out: Outcome) -> float:
    return out.good / (out.engine.clock() - out.admitted[0][0].at_s)


def test_nearly_all_admitted_requests_are_in_time(loads: dict[float, Outcome]) -> None:
    admitted = sum(len(out.admitted) for out in loads.values())
    late = sum(out.late for out in loads.values())
    assert admitted > COUNT
    assert late <= admitted / 1000
    counters = [out.engine.counters for out in loads.values()]
    assert sum(c.met for c in counters) == admitted - late
    assert sum(c.missed for c in counters) == late


def test_goodput_does_not_collapse_under_four_times_the_load(loads: dict[float, Outcome]) -> None:
    best = max(map(per_second, loads.values()))
    assert per_second(loads[4]) >= 0.9 * best
    assert per_second(loads[2]) >= 0.9 * best


def test_half_the_capacity_refuses_nobody_and_cuts_nearly_nothing(loads: dict[float, Outcome]) -> None:
    out = loads[0.5]
    assert not out.refused
    assert sum(len(request.output) == arrival.answer for arrival, request in out.admitted) > 0.95 * COUNT


def test_what_ends_early_ends_a_sentence(loads: dict[float, Outcome]) -> None:
    for out in loads.values():
        for _, request in out.admitted:
            if request.finish_reason == "deadline" and in_time(request):
                assert request.output[-1] == END
            else:
                assert request.finish_reason == "length" or not in_time(request)


def test_no_page_is_lost_and_nobody_is_forgotten(loads: dict[float, Outcome]) -> None:
    for out in loads.values():
        load = out.engine.load()
        assert (load.running, load.waiting, load.free_pages) == (0, 0, load.pages)
        assert len(out.admitted) + len(out.refused) == COUNT
        assert load.counters.admitted == len(out.admitted)
        assert load.counters.refused_deadline + load.counters.refused_overload == len(out.refused)


def test_predictions_are_close(loads: dict[float, Outcome]) -> None:
    for out in loads.values():
        assert out.engine.costs.median_error() < 0.05


def test_steps_stay_short_for_those_that_decode(loads: dict[float, Outcome]) -> None:
    for out in loads.values():
        took = sorted(ms for ms, _ in out.engine.runner.steps)  # type: ignore[attr-defined]
        assert took[-1] < 60 + 25 + 5  # a step's limit, a pause and the noise


def test_a_refusal_says_when_it_would_be_done(loads: dict[float, Outcome]) -> None:
    assert loads[4].refused
    for arrival, error in loads[4].refused:
        assert isinstance(error, DeadlineError) and arrival.deadline_ms is not None
        assert error.predicted_ms > arrival.deadline_ms * 0.9
        assert 0 < error.retry_after_s < 2


def test_the_same_arrivals_give_the_same_outcome() -> None:
    def once() -> list[Any]:
        out = run(engine(pauses=0.003), poisson(150, 300))
        return [(r.output, r.timings.total_ms) for _, r in out.admitted] + [str(error) for _, error in out.refused]

    assert once() == once()


@pytest.mark.parametrize(("speed", "seed"), [(0.5, 2), (3.0, 3)])
def test_a_machine_of_another_speed_keeps_its_word_too(speed: float, seed: int) -> None:
    out = run(engine(speed=speed, seed=seed), poisson(100, 1000, seed))
    assert out.late <= 1
    assert out.good > 100


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    e = engine()
    first = run(e, poisson(60, 600))
    e.runner.speed = 2.0  # type: ignore[attr-defined]
    shift = e.clock()
    second = run(e, [Arrival(a.at_s + shift) for a in poisson(60, 1500, 5)])
    assert not first.late
    assert second.late <= 0.02 * len(second.admitted)  # those of the moment it happened
    assert not any(not in_time(r) for _, r in second.admitted[100:])


SIZES = [(30, 6, 150.0), (300, 64, 900.0), (900, 100, 3000.0), (60, 1, 60.0)]  # prompt, answer, deadline


@pytest.mark.parametrize(("rate", "least"), [(6, 0.8), (15, 0.0)])
def test_mixed_sizes_and_deadlines_are_kept(rate: float, least: float) -> None:
    arrivals = [
        arrival
        for seed, (prompt, answer, deadline) in enumerate(SIZES)
        for arrival in poisson(rate, 250, seed, prompt=prompt, answer=answer, deadline_ms=deadline)
    ]
    out = run(engine(pauses=0.001), arrivals)
    assert out.late <= len(out.admitted) / 500
    for size, _, _ in SIZES:
        assert sum(arrival.prompt == size for arrival, _ in out.admitted) > 250 * least, size


def test_best_effort_work_breaks_no_promise_and_is_not_starved() -> None:
    promised = poisson(200, 1600)
    best_effort = [
        Arrival(0.0, 600, 40, None, {"priority": priority, "tenant": priority})
        for priority in ("standard", "batch", "batch")
    ]
    e = engine()
    out = run(e, [*promised, *best_effort])
    assert out.late <= len(out.admitted) / 1000
    ends = [r.arrival_s + r.timings.total_ms / 1000 for a, r in out.admitted if a.deadline_ms is None]
    assert len(ends) == 3
    assert min(ends) < promised[-1].at_s  # beside a load that would fill the machine twice
    assert all(len(r.output) == a.answer for a, r in out.admitted if a.deadline_ms is None)


def test_a_flood_of_one_tenant_leaves_the_other_its_share(loads: dict[float, Outcome]) -> None:
    flood = poisson(300, 2000, 1, options={"tenant": "flood"})
    guest = poisson(15, 100, 2, options={"tenant": "guest"})
    out = run(engine(), [*flood, *guest])
    served = sum(in_time(r) for a, r in out.admitted if a.options["tenant"] == "guest")
    assert served > 0.6 * len(guest)
    assert per_second(out) > 0.8 * per_second(loads[4])  # 300 a second, too
    assert out.late <= len(out.admitted) / 1000


def test_two_floods_share_alike() -> None:
    arrivals = [a for name in "ab" for a in poisson(200, 1000, ord(name), options={"tenant": name})]
    out = run(engine(), arrivals)
    a, b = (sum(in_time(r) for x, r in out.admitted if x.options["tenant"] == name) for name in "ab")
    assert 0.8 < a / b < 1.25


def test_without_deadlines_tenants_take_turns() -> None:
    e = engine(max_sequences=4)
    many = [Arrival(0.0, 50, 60, None, {"tenant": "many"}) for _ in range(40)]
    one = [Arrival(0.2, 50, 60, None, {"tenant": "one"})]
    out = run(e, [*many, *one])
    total = {a.options["tenant"]: [] for a, _ in out.admitted}
    for a, r in out.admitted:
        total[a.options["tenant"]].append(r.timings.total_ms)
    assert total["one"][0] < sorted(total["many"])[len(total["many"]) // 4]


def test_classes_come_in_their_order_and_batch_keeps_its_pages() -> None:
    e = engine(max_sequences=2)
    batch = [Arrival(0.0, 64, 400, None, {"priority": "batch"}) for _ in range(2)]
    quick = [Arrival(0.3, 64, 100, None, {"priority": "interactive"}) for _ in range(2)]
    out = run(e, [*batch, *quick])
    done = {a.options["priority"]: r.timings for a, r in out.admitted}
    assert done["interactive"].total_ms < 100 * 5
    assert done["interactive"].queue_ms < 20
    for _, r in out.admitted:  # a step a token and one or two for the prompt: nothing was computed twice
        assert r.timings.steps <= len(r.output) + 2


def test_a_waiting_class_grows_older_until_it_is_served() -> None:
    """Interactive requests without end, more than the machine can do; one batch request among them."""
    e = engine(max_sequences=4)
    stream = [Arrival(i * 0.02, 40, 20, None, {"priority": "interactive", "tenant": str(i)}) for i in range(1750)]
    out = run(e, [*stream, Arrival(1.0, 40, 20, None, {"priority": "batch"})], until_s=35)
    (request,) = [r for a, r in out.admitted if a.options["priority"] == "batch"]
    assert request.finish_reason == "length"


def test_prompts_leave_interactive_answers_small_gaps() -> None:
    e = engine(max_gap_ms=15, noise=0.0)
    decode = e.submit([1] * 10, SamplingParams(max_tokens=300, ignore_eos=True), priority="interactive")
    for _ in range(5):
        e.step()
    e.submit([1] * 3000, SamplingParams(max_tokens=5, ignore_eos=True), priority="batch")
    while decode.finish_reason is None:
        e.step()
    steps = e.runner.steps[1:]  # type: ignore[attr-defined]
    assert any(max(lengths) > 32 for _, lengths in steps)
    assert max(ms for ms, _ in steps) < 16


def test_a_long_prompt_is_cut_so_that_a_deadline_beside_it_is_kept() -> None:
    e = engine(noise=0.0, max_gap_ms=math.inf, max_step_ms=None)
    now = e.clock()
    e.submit([1] * 20, SamplingParams(max_tokens=40, ignore_eos=True), deadline_s=now + 0.16)
    e.step()
    e.submit([1] * 4000, SamplingParams(max_tokens=5, ignore_eos=True))
    request = e.scheduler.running[0]
    while request.finish_reason is None:
        e.step()
    assert in_time(request) and len(request.output) >= 16


def test_the_queue_is_bounded() -> None:
    e = engine(max_waiting=3)
    for _ in range(3):
        e.submit([1], SamplingParams())
    with pytest.raises(OverloadError, match="3 requests wait") as caught:
        e.submit([1], SamplingParams())
    assert caught.value.retry_after_s > 0
    assert e.load().counters.refused_overload == 1


def test_a_refusal_with_two_hundred_waiting_is_quick() -> None:
    """Counted in calls of Python functions, not in time: machines are noisy."""
    import sys

    e = engine()
    for i in range(200):
        e.submit([1] * 40, SamplingParams(max_tokens=20), deadline_s=e.clock() + 20 + i / 100)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    prompt = [1] * 1000
    sys.setprofile(count)
    try:
        with pytest.raises(DeadlineError):
            e.submit(prompt, SamplingParams(max_tokens=20), deadline_s=e.clock() + 0.05)
    finally:
        sys.setprofile(None)
    assert calls < 6000


def test_a_promise_waits_for_pages_that_are_promised_to_others() -> None:
    e = engine(pages=8)  # 256 positions
    soon = e.clock() + 2
    e.submit([1] * 100, SamplingParams(max_tokens=60, ignore_eos=True), deadline_s=soon)
    with pytest.raises(DeadlineError, match="KV cache"):
        e.submit([1] * 100, SamplingParams(max_tokens=60, ignore_eos=True), deadline_s=soon)
    e.submit([1] * 20, SamplingParams(max_tokens=10, ignore_eos=True), deadline_s=soon)


def test_delivery_is_part_of_the_deadline() -> None:
    e = engine(delivery_ms=20, noise=0.0)
    request = e.submit([1] * 20, SamplingParams(max_tokens=2000, ignore_eos=True), deadline_s=e.clock() + 0.4)
    while request.finish_reason is None:
        e.step()
    assert request.timings.slack_ms is not None and request.timings.slack_ms >= 20


def test_cancelled_amid_a_long_prompt_it_frees_its_slot_within_a_step() -> None:
    e = engine()
    request = e.submit([1] * 4000, SamplingParams())
    e.step()
    assert 0 < request.computed < 3999
    e.runner.advance = lambda until_s: e.cancel(request, wait=False)  # type: ignore[attr-defined]
    e.step()
    assert request.finish_reason is None
    e.step()
    assert request.finish_reason == "cancelled"
    assert e.scheduler.allocator.free == e.runner.pages and not e.has_work


class Closer:
    """A grammar that is closed by two tokens, or cannot be."""

    def __init__(self, closing: list[int] | None) -> None:
        self.answer = closing
        self.stopped = False

    def check(self) -> None:
        pass

    def advance(self, token: int) -> list[int]:
        return []

    def closing(self) -> list[int] | None:
        return self.answer


@pytest.mark.parametrize("closing", [[7, 8], [], None])
def test_a_grammar_is_closed_without_the_model(closing: list[int] | None) -> None:
    e = engine(noise=0.0)
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    request: Request = e.submit([1] * 20, params, deadline_s=e.clock() + 0.2, minimum_tokens=1)
    request.constraint = Closer(closing)  # type: ignore[assignment]
    while request.finish_reason is None:
        e.step()
    events = list(request.inbox)
    assert [event.token for event in events if event.token is not None] == request.output
    assert request.output[-len(closing) :] == closing if closing else request.output[-1] not in (7, 8)
    assert request.finish_reason == "deadline" and in_time(request)
    assert sum(event.finish_reason is not None for event in events) == 1


def test_scores_are_work_like_any_other() -> None:
    e = engine(noise=0.0)
    decode = e.submit([1] * 10, SamplingParams(max_tokens=60, ignore_eos=True), priority="interactive")
    e.step()
    score = e.submit_score([1] * 700, [[2, 3], [4] * 40], deadline_s=e.clock() + 1)
    while score.finish_reason is None:
        e.step()
        e.scheduler.check_integrity()
    assert score.score is not None and len(score.score.values) == 2
    assert in_time(score) and list(score.inbox)[-1].finish_reason == "stop"
    assert decode.timings.steps >= 3  # it went on beside
    with pytest.raises(DeadlineError):
        e.submit_score([1] * 3000, [[2]], deadline_s=e.clock() + 0.05)


def test_scores_that_run_out_of_time_keep_what_there_is() -> None:
    e = engine(calibrated=False)  # nothing is known yet, so it is tried
    score = e.submit_score([1] * 50, [[i % 90] * (300 + i) for i in range(100)], deadline_s=e.clock() + 0.1)
    while score.finish_reason is None:
        e.step()
    assert score.finish_reason == "deadline" and score.score is not None
    assert 0 < len(score.score.values) < 100
    assert e.scheduler.allocator.free == e.runner.pages


def test_admission_counts_on_what_is_cached() -> None:
    """A deadline too short for a whole prompt is promised once all but the prompt's end is cached."""
    e = engine(noise=0.0, prefix_cache=True)
    prompt = [2 + i % 7 for i in range(960)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    within_s = 0.5 * e.costs.prefill_ms(len(prompt), e.runner.max_tokens) / 1000
    with pytest.raises(DeadlineError):
        e.submit([*prompt, 9], params, deadline_s=e.clock() + within_s, minimum_tokens=1)
    first = e.submit([*prompt, 8], params)
    while first.finish_reason is None:
        e.step()
    again = e.submit([*prompt, 9], params, deadline_s=e.clock() + within_s, minimum_tokens=1)
    while again.finish_reason is None:
        e.step()
    assert again.finish_reason == "length" and again.timings.cached_tokens >= 900
    assert in_time(again)
