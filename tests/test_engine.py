"""The engine on a fake model: what comes out is what the model says alone, however the steps are cut and shared."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from fake import FakeRunner, continuation, next_token
from millis.engine.engine import Engine
from millis.engine.request import Request
from millis.engine.runner import Ranked
from millis.types import DeadlineError, GrammarError, ModelError, RequestError, SamplingParams


def engine(eos: frozenset[int] = frozenset(), clock: Any = None, **sizes: int) -> Engine:
    runner = FakeRunner(**sizes)
    return Engine(runner, eos, clock) if clock else Engine(runner, eos)


def answer(e: Engine, prompt: list[int], **params: Any) -> Request:
    request = e.submit(prompt, SamplingParams(**{"max_tokens": 10, "ignore_eos": True, **params}))
    for _ in e.events(request):
        pass
    e.scheduler.check_integrity()
    return request


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 33, 64])
def test_answer_equals_the_model_alone(length: int) -> None:
    prompt = [(7 * i) % 97 for i in range(length)]
    request = answer(engine(), prompt)
    assert request.output == continuation(prompt, 10)
    assert request.finish_reason == "length"
    assert request.timings.steps == -(-length // 16) + 9
    assert (request.timings.prompt_tokens, request.timings.completion_tokens) == (length, 10)


def test_events_carry_every_token_and_one_end() -> None:
    e = engine()
    events = list(e.events(e.submit([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))))
    assert [event.token for event in events] == continuation([1, 2, 3], 5)
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"]


def test_end_of_sequence_stops_and_is_not_part_of_the_answer() -> None:
    want = continuation([5], 10)
    eos = frozenset({want[3]})
    stop = want.index(want[3])
    assert answer(engine(eos), [5], ignore_eos=False).output == want[:stop]
    assert answer(engine(eos), [5], ignore_eos=False).finish_reason == "stop"
    assert answer(engine(eos), [5], ignore_eos=True).output == want


def test_many_requests_share_steps_and_do_not_touch_each_other() -> None:
    e = engine(max_tokens=16, max_sequences=4)
    prompts = [[i, 2 * i, 3 * i + 1] * (i + 1) for i in range(7)]
    requests = [e.submit(p, SamplingParams(max_tokens=12, ignore_eos=True)) for p in prompts]
    while any(r.finish_reason is None for r in requests):
        e.step()
        e.scheduler.check_integrity()
    assert [r.output for r in requests] == [continuation(p, 12) for p in prompts]
    assert max(len(lengths) for lengths in e.runner.batches) == 4
    assert max(sum(lengths) for lengths in e.runner.batches) <= 16
    assert e.scheduler.allocator.free == e.runner.pages


def test_short_of_pages_the_latest_waits_and_still_answers_right() -> None:
    e = engine(pages=10, context=40, max_sequences=4)
    prompts = [[i + 1] * 6 for i in range(4)]
    requests = [e.submit(p, SamplingParams(max_tokens=25, ignore_eos=True)) for p in prompts]
    for _ in range(1000):
        if all(r.finish_reason for r in requests):
            break
        e.step()
        e.scheduler.check_integrity()
    assert [r.output for r in requests] == [continuation(p, 25) for p in prompts]


def test_the_context_bounds_the_answer() -> None:
    request = answer(engine(context=20), [1, 2, 3], max_tokens=100)
    assert len(request.tokens) == 20
    assert request.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty"), ([97], "97"), ([-1], "-1"), ([1] * 128, "context holds 128")]
)
def test_bad_prompts_are_refused(prompt: list[int], message: str) -> None:
    e = engine()
    with pytest.raises(RequestError, match=message):
        e.submit(prompt, SamplingParams())
    with pytest.raises(RequestError):
        e.score(prompt, [[1]])
    e.scheduler.check_integrity()
    assert e.scheduler.allocator.free == e.runner.pages


def test_threads_take_turns() -> None:
    e = engine()
    prompts = [[i, i + 1] for i in range(12)]
    answers: dict[int, list[int | None]] = {}
    e.runner.on_step = lambda: time.sleep(0.001)  # lets the others arrive

    def ask(i: int) -> None:
        request = e.submit(prompts[i], SamplingParams(max_tokens=20, ignore_eos=True))
        answers[i] = [event.token for event in e.events(request)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert answers == {i: continuation(p, 20) for i, p in enumerate(prompts)}
    assert any(len(lengths) > 1 for lengths in e.runner.batches), "no step was shared"


def test_closing_the_events_cancels_and_frees() -> None:
    e = engine()
    request = e.submit([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
    events = e.events(request)
    next(events)
    next(events)
    events.close()
    assert request.finish_reason == "cancelled"
    assert e.scheduler.allocator.free == e.runner.pages
    assert answer(e, [3]).output == continuation([3], 10)


def test_a_failing_step_ends_its_requests_and_leaves_the_engine_usable() -> None:
    e = engine()
    e.runner.fail = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        answer(e, [1])
    e.runner.fail = None
    assert e.scheduler.allocator.free == e.runner.pages
    assert answer(e, [1]).output == continuation([1], 10)


def test_an_interrupt_cancels_only_the_request_that_led() -> None:
    e = engine()
    mine = e.submit([1], SamplingParams(max_tokens=9, ignore_eos=True))
    other = e.submit([2], SamplingParams(max_tokens=9, ignore_eos=True))
    events = e.events(mine)
    next(events)
    e.runner.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(events)
    e.runner.fail = None
    e.scheduler.check_integrity()
    assert mine.finish_reason == "cancelled"
    assert [event.token for event in e.events(other)] == continuation([2], 9)


class Clock:
    """Time that only steps move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 0.010


def test_timings_and_deadline_on_simulated_time() -> None:
    clock = Clock()
    e = engine(clock=clock)
    e.runner.on_step = clock.tick
    request = e.submit([1] * 20, SamplingParams(max_tokens=50, ignore_eos=True), arrival_s=-0.005, deadline_s=0.1)
    tokens = [event.token for event in e.events(request) if event.token is not None]
    t = request.timings
    assert request.finish_reason == "deadline"
    assert tokens == continuation([1] * 20, 9)  # ten steps of 10 ms, the first of them prefill alone
    assert t.queue_ms == pytest.approx(5)
    assert t.prefill_ms == pytest.approx(20)
    assert t.first_token_ms == pytest.approx(25)
    assert t.decode_ms == pytest.approx(80)
    assert t.total_ms == pytest.approx(105)
    assert t.deadline_ms == pytest.approx(105)
    assert t.slack_ms == pytest.approx(0, abs=1e-6)
    assert t.tokens_per_second == pytest.approx(100)


def test_a_deadline_already_past_is_refused_and_computes_nothing() -> None:
    clock = Clock()
    e = engine(clock=clock)
    with pytest.raises(DeadlineError, match="cannot be met"):
        e.submit([1], SamplingParams(), deadline_s=-1.0)
    assert e.runner.batches == [] and not e.has_work


def test_a_refusal_names_the_deadline_that_was_asked_for() -> None:
    """A server keeps some milliseconds of it for itself; they are a part of what the answer would take."""
    took_ms = []
    for asked_ms in (None, 5.0):
        with pytest.raises(DeadlineError, match=f"the deadline of {asked_ms or 2:.0f} ms cannot be met") as refused:
            engine(clock=Clock()).submit(
                [1] * 20, SamplingParams(), arrival_s=-0.003, deadline_s=-0.001, asked_ms=asked_ms
            )
        took_ms.append(refused.value.predicted_ms)
    assert took_ms[1] - took_ms[0] == pytest.approx(3)


def test_a_busy_moment_is_not_believed_for_ever() -> None:
    """Steps take ten times as long for a while; deadlines that were kept before are kept again soon after."""
    clock = Clock()
    e = engine(clock=clock, pages=256, context=256)
    slow = 1

    def tick() -> None:
        clock.now += 0.002 * slow

    def ask() -> bool:
        try:
            request = e.submit([5] * 20, SamplingParams(max_tokens=20, ignore_eos=True), deadline_s=clock.now + 0.1)
        except DeadlineError:
            e.probe()
            clock.now += 0.1
            return False
        return [event for event in e.events(request)][-1].finish_reason == "length"

    e.runner.on_step = tick
    e.calibrate()
    assert all(ask() for _ in range(20))
    slow = 10
    asked = [ask() for _ in range(100)]
    assert not any(asked)
    assert e.counters.refused_deadline >= 50
    slow = 1
    again = [ask() for _ in range(150)]
    assert all(again[-20:]), again
    assert e.scheduler.promises.caution.factor < 2
    assert not e.has_work
    e.scheduler.check_integrity()


def test_a_probe_follows_a_refusal_of_an_idle_engine_and_gives_way() -> None:
    clock = Clock()
    e = engine(clock=clock)
    e.runner.on_step = clock.tick
    e.calibrate()
    assert not e.probe()  # nothing was refused
    steps = e.counters.steps
    with pytest.raises(DeadlineError):
        e.submit([1] * 20, SamplingParams(max_tokens=20), deadline_s=clock.now + 0.001)
    other: list[Request] = []

    def arrive() -> None:
        clock.tick()
        if not other:
            other.append(e.submit([3], SamplingParams(max_tokens=1, ignore_eos=True)))

    e.runner.on_step = arrive
    assert e.probe()
    assert not e.probe()  # once for each refusal
    assert e.counters.steps == steps + 1 and other[0].finish_reason is None
    assert [event.token for event in e.events(other[0])] == continuation([3], 1)
    with pytest.raises(DeadlineError):
        e.submit([1] * 20, SamplingParams(max_tokens=20), deadline_s=clock.now + 0.001)
    assert not e.probe()  # too soon after the other
    clock.now += 1
    assert e.probe() and not e.has_work
    e.scheduler.check_integrity()


def test_score_sums_the_continuations_tokens_only() -> None:
    e = engine(max_tokens=4)
    prompt = list(range(11))
    good = continuation(prompt, 6)
    off = [*good[:-1], good[-1] + 1 if good[-1] < 96 else good[-1] - 1]
    assert e.score(prompt, [good, off, good[:1]]) == [0, -1, 0]
    assert e.score([4], [[next_token([4])]]) == [0]
    assert e.scheduler.allocator.free == e.runner.pages


def test_a_text_is_ranked_in_pieces_and_cached_for_what_goes_on_from_it() -> None:
    e = Engine(FakeRunner(max_tokens=4), frozenset(), prefix_cache=True)
    text = [3, 1, 4, *continuation([3, 1, 4], 6), 9, 9]
    asked = e.submit_score(text[:1], [text[1:]], best=2)
    e.wait(asked)
    assert asked.score is not None and len(asked.score.ranked) == 3
    found = Ranked.join(asked.score.ranked).told(text[1:])
    assert [one.top[0][0] for one in found] == [next_token(text[:i]) for i in range(1, len(text))]
    assert [one.logprob for one in found[2:8]] == [0] * 6
    after = e.submit(text, SamplingParams(max_tokens=3, ignore_eos=True))
    assert [event.token for event in e.events(after)] == continuation(text, 3)
    assert after.timings.cached_tokens >= len(text) - 4
    e.scheduler.check_integrity()


def test_a_ranked_text_that_lost_its_pages_is_ranked_anew() -> None:
    e = engine(pages=8, max_tokens=4)
    text = [5, *continuation([5], 20)]
    asked = e.submit_score(text[:1], [text[1:]], best=1, priority="batch")
    e.step()
    assert asked.score is not None and asked.score.done == 4
    e.scheduler.preempt(asked)
    e.wait(asked)
    assert Ranked.join(asked.score.ranked).best[:, 0].tolist() == text[1:]
    assert asked.score.values == [0] and e.scheduler.allocator.free == e.runner.pages


def test_score_beside_running_requests_takes_pages_and_gives_them_back() -> None:
    e = engine(pages=8, context=32)
    request = e.submit([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
    events = e.events(request)
    head = [next(events).token for _ in range(8)]
    prompt = [9] * 20
    assert e.score(prompt, [continuation(prompt, 10)]) == [0]
    assert head + [event.token for event in events] == continuation([1, 2, 3], 20)
    with pytest.raises(RequestError, match="context"):
        e.score([1] * 30, [[1, 2, 3]])
    with pytest.raises(RequestError, match="cache"):
        engine(pages=2, context=32).score([1] * 20, [[1]])


def test_whoever_came_first_uses_the_runner_next() -> None:
    """A thread that reads an answer takes its next step behind those that wait already."""
    e = engine(context=2000, pages=600)
    long, other = (e.submit([i], SamplingParams(max_tokens=1500, ignore_eos=True)) for i in (1, 2))
    served: list[int] = []

    def cancel() -> None:
        e.cancel(other)
        served.append(len(e.runner.batches))

    waiter = threading.Thread(target=cancel)
    queued: list[int] = []

    def on_step() -> None:
        if len(e.runner.batches) == 10:
            waiter.start()
        while len(e.runner.batches) == 10 and not e.turn.awaited:
            time.sleep(0.001)
        if e.turn.awaited and not queued:
            queued.append(len(e.runner.batches))

    e.runner.on_step = on_step
    e.wait(long)
    waiter.join()
    assert queued and served[0] <= queued[0] + 1
    assert other.finish_reason == "cancelled" and len(long.output) == 1500


def test_an_ended_request_is_cancelled_without_waiting() -> None:
    e = engine()
    done = answer(e, [1])
    e.turn.taken = True  # a step that never ends
    e.cancel(done)
    assert done.finish_reason == "length"


def test_a_request_without_a_usable_logit_ends_alone() -> None:
    e = engine()
    e.runner.say = lambda tokens: -1 if tokens[0] == 5 else next_token(tokens)
    bad, late, good = (e.submit([i, 1, 2], SamplingParams(max_tokens=4, ignore_eos=True)) for i in (5, 5, 6))
    e.wait(good)
    assert good.output == continuation([6, 1, 2], 4)
    for request in (bad, late):
        with pytest.raises(ModelError, match="no usable number"):
            e.wait(request)
    assert e.scheduler.allocator.free == e.runner.pages
    e.runner.say = lambda tokens: -2
    with pytest.raises(GrammarError, match="too long"):
        answer(e, [1])


def until(holds: Any) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_kept_request_goes_on_while_its_reader_does_something_else() -> None:
    e = engine()
    kept, other = (
        e.submit([i], SamplingParams(max_tokens=20, ignore_eos=True), deadline_s=time.perf_counter() + deadline)
        for i, deadline in ((1, 60), (2, 60))
    )
    e.keep(kept)
    until(lambda: kept.finish_reason is not None)
    assert [event.token for event in e.events(kept)] == continuation([1], 20)
    e.wait(other)
    assert other.output == continuation([2], 20)
    until(lambda: all(thread.name != "keeper" for thread in threading.enumerate()))
    again = e.submit([3], SamplingParams(max_tokens=3, ignore_eos=True), deadline_s=time.perf_counter() + 60)
    e.keep(again)
    until(lambda: again.finish_reason is not None)
    assert e.scheduler.allocator.free == e.runner.pages


def test_a_kept_request_whose_step_fails_tells_its_reader() -> None:
    e = engine()
    e.runner.fail = RuntimeError("broken")
    kept = e.submit([1], SamplingParams(max_tokens=20), deadline_s=time.perf_counter() + 60)
    e.keep(kept)
    until(lambda: kept.error is not None)
    with pytest.raises(RuntimeError, match="broken"):
        e.wait(kept)
