"""The prefix cache in the engine, on a fake model whose answers show every wrong page: same answers, less computed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake import FakeRunner, continuation
from millis.engine.engine import Engine
from millis.engine.prefix import RadixCache
from millis.engine.request import Request
from millis.engine.speculate import Speculator
from millis.types import DeadlineError, RequestError, SamplingParams
from simulated import Clock

PAGE = 8
SYSTEM = [(5 * i) % 89 for i in range(29)]  # three pages and five tokens


class Runner(FakeRunner):
    page_tokens = PAGE


def engine(cached: bool = True, speculator: Speculator | None = None, **sizes: int) -> Engine:
    return Engine(Runner(**{"max_tokens": 64, **sizes}), frozenset(), speculator=speculator, prefix_cache=cached)


def cache_of(e: Engine) -> RadixCache:
    assert e.scheduler.prefix is not None
    return e.scheduler.prefix


def ask(e: Engine, prompt: list[int], tokens: int = 6, tenant: str = "") -> Request:
    request = e.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), tenant=tenant)
    for _ in e.events(request):
        pass
    assert request.output == continuation(prompt, tokens)
    at_rest(e)
    return request


def at_rest(e: Engine) -> None:
    e.scheduler.check_integrity()
    assert not e.scheduler.copies
    assert e.scheduler.allocator.free == e.runner.pages - cache_of(e).pinned_pages


def computed(e: Engine) -> int:
    return sum(sum(lengths) for lengths in e.runner.batches)


def test_what_was_computed_is_not_computed_again() -> None:
    e = engine()
    assert ask(e, SYSTEM + [1, 2, 3]).timings.cached_tokens == 0
    before = computed(e)
    second = ask(e, SYSTEM + [4, 5])
    assert second.timings.cached_tokens == len(SYSTEM)
    assert computed(e) - before == 2 + 5  # the new tokens of the prompt, then all but the last of the answer
    assert (cache_of(e).queries, cache_of(e).hit_tokens) == (2, len(SYSTEM))
    assert cache_of(e).queried_tokens == 2 * len(SYSTEM) + 5


def test_without_it_nothing_is_kept() -> None:
    e = engine(cached=False)
    for _ in range(2):
        request = e.submit(SYSTEM, SamplingParams(max_tokens=3, ignore_eos=True))
        list(e.events(request))
        assert request.timings.cached_tokens == 0
    assert e.scheduler.prefix is None
    e.scheduler.check_integrity()


def test_the_next_turn_of_a_conversation_reuses_the_answer() -> None:
    e = engine()
    first = ask(e, SYSTEM, tokens=20)
    turn = [*first.tokens, 7, 8, 9]
    assert ask(e, turn).timings.cached_tokens == len(first.tokens) - 1  # the last token was never computed


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    e = engine()
    ask(e, SYSTEM)
    assert ask(e, SYSTEM).timings.cached_tokens == len(SYSTEM) - 1
    one_page = SYSTEM[:PAGE]
    assert ask(e, one_page).timings.cached_tokens == PAGE - 1


def test_a_running_prompt_serves_those_behind_it() -> None:
    e = engine()
    first = e.submit(SYSTEM + [1], SamplingParams(max_tokens=20, ignore_eos=True))
    e.step()
    e.step()
    second = e.submit(SYSTEM + [2], SamplingParams(max_tokens=20, ignore_eos=True))
    e.step()
    assert second.timings.cached_tokens == 3 * PAGE
    assert first.pages[:3] == second.pages[:3]
    while second.finish_reason is None:
        e.step()
        e.scheduler.check_integrity()
    assert first.output == continuation(SYSTEM + [1], 20)
    assert second.output == continuation(SYSTEM + [2], 20)
    at_rest(e)


def test_tenants_learn_nothing_of_each_other() -> None:
    e = engine()
    ask(e, SYSTEM, tenant="a")
    assert ask(e, SYSTEM, tenant="b").timings.cached_tokens == 0
    assert ask(e, SYSTEM).timings.cached_tokens == 0
    assert ask(e, SYSTEM, tenant="a").timings.cached_tokens == len(SYSTEM) - 1


def test_a_pinned_prefix_serves_all_and_stays() -> None:
    e = engine(pages=20, context=64)
    assert e.pin(SYSTEM) == len(SYSTEM)
    assert e.pin(SYSTEM) == len(SYSTEM)
    assert cache_of(e).pinned_pages == 4
    for i in range(12):  # much more than there are pages
        ask(e, [i] * 40, tenant=f"tenant {i}")
    for tenant in ("", "a", "b"):
        assert ask(e, SYSTEM + [1, 2], tenant=tenant).timings.cached_tokens == len(SYSTEM)
    assert cache_of(e).evictions > 0


def test_a_tenants_pin_is_its_own() -> None:
    e = engine()
    e.pin(SYSTEM, "a")
    assert ask(e, SYSTEM + [1], tenant="a").timings.cached_tokens == len(SYSTEM)
    assert ask(e, SYSTEM + [1], tenant="b").timings.cached_tokens == 0
    assert ask(e, SYSTEM + [1]).timings.cached_tokens == 0


def test_pins_leave_room_for_the_longest_request() -> None:
    e = engine(pages=20, context=128)
    assert cache_of(e).most_pinned == 4
    e.pin(SYSTEM)
    with pytest.raises(RequestError, match="would take 5 pages of 8 tokens; 4 may be pinned: raise cache_tokens"):
        e.pin([3] * 8)
    longest = ask(e, [9] * 100, tokens=28)
    assert len(longest.tokens) == 128
    assert cache_of(engine(pages=100, context=64)).most_pinned == 50
    assert cache_of(engine(pages=16, context=128)).most_pinned == 0


def test_bad_pins_are_refused_by_name() -> None:
    e = engine(context=32)
    for tokens, message in (([], "empty"), ([97], "97"), ([1] * 32, "context of 32")):
        with pytest.raises(RequestError, match=message):
            e.pin(tokens)
    with pytest.raises(RequestError, match="prefix_cache=True"):
        engine(cached=False).pin([1])
    at_rest(e)


def test_a_pin_that_fails_keeps_nothing() -> None:
    e = engine()
    fail = RuntimeError("boom")

    def score(*_: Any) -> None:
        raise fail

    e.runner.score = score
    with pytest.raises(RuntimeError, match="boom"):
        e.pin(SYSTEM)
    assert cache_of(e).cached_pages == 0
    at_rest(e)


def test_scores_use_and_fill_the_cache() -> None:
    e, plain = engine(), engine(cached=False)
    good = continuation(SYSTEM, 5)
    off = [*good[:-1], (good[-1] + 1) % 97]
    want = plain.score(SYSTEM, [good, off, good[:1]])
    assert e.score(SYSTEM, [good, off, good[:1]]) == want
    assert computed(e) == len(SYSTEM) + 4  # the continuations share all but their ends, which are only asked for
    assert e.score(SYSTEM, [good, off, good[:1]]) == want
    assert computed(e) == len(SYSTEM) + 4 + 4 + 5  # what is not worth a copy, the last token and the tree
    assert e.score(SYSTEM, [good], tenant="a") == want[:1]
    assert cache_of(e).hit_tokens == 3 * PAGE
    at_rest(e)
    assert ask(e, SYSTEM + [5]).timings.cached_tokens == len(SYSTEM) - 1
    assert e.score(SYSTEM + [5], [[6]]) == plain.score(SYSTEM + [5], [[6]])


def test_scores_short_of_pages_evict_and_preempt() -> None:
    e = engine(pages=8, context=64)
    ask(e, SYSTEM)
    request = e.submit([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
    events = e.events(request)
    head = [next(events).token for _ in range(8)]
    prompt = [9] * 50
    assert e.score(prompt, [continuation(prompt, 10)]) == [0]
    assert head + [event.token for event in events] == continuation([1, 2, 3], 20)
    at_rest(e)


def test_a_preempted_request_takes_up_what_is_left_of_it() -> None:
    e = engine(pages=12, context=64, max_sequences=3)
    prompts = [[i + 1] * 10 for i in range(3)]
    requests = [e.submit(p, SamplingParams(max_tokens=40, ignore_eos=True)) for p in prompts]
    for _ in range(1000):
        if all(r.finish_reason for r in requests):
            break
        e.step()
        e.scheduler.check_integrity()
    assert [r.output for r in requests] == [continuation(p, 40) for p in prompts]
    assert all(r.timings.cached_tokens == 0 for r in requests), "its own pages are not a hit"
    assert cache_of(e).queries == 3
    at_rest(e)


def test_cancelled_in_the_middle_of_a_prompt_its_pages_stay_useful() -> None:
    e = engine(max_tokens=16)
    long = [(3 * i) % 97 for i in range(60)]
    request = e.submit(long, SamplingParams(max_tokens=5, ignore_eos=True))
    e.step()
    e.step()
    e.cancel(request)
    at_rest(e)
    assert ask(e, long).timings.cached_tokens == 32


def test_a_failed_or_interrupted_step_leaves_only_true_pages() -> None:
    e = engine()
    ask(e, SYSTEM)
    for error in (RuntimeError("boom"), KeyboardInterrupt()):
        e.runner.fail = error
        request = e.submit(SYSTEM + [4], SamplingParams(max_tokens=5, ignore_eos=True))
        with pytest.raises(type(error)):
            list(e.events(request))
        e.runner.fail = None
        at_rest(e)
        assert ask(e, SYSTEM + [4]).output == continuation(SYSTEM + [4], 6)


def test_a_copy_that_was_interrupted_is_made_before_the_next_step() -> None:
    e = engine()
    ask(e, SYSTEM)
    copy, calls = e.runner.copy_page, []

    def interrupted(source: int, target: int) -> None:
        calls.append((source, target))
        if len(calls) == 1:
            raise KeyboardInterrupt
        copy(source, target)

    e.runner.copy_page = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(e.events(e.submit(SYSTEM + [4], SamplingParams(max_tokens=5, ignore_eos=True))))
    e.scheduler.check_integrity()
    ask(e, SYSTEM + [4])
    assert calls[0] == calls[1]


def test_drafts_and_cached_prefixes_go_together() -> None:
    now = [0.0]
    e = engine(speculator=Speculator(lambda: now[0]))
    e.clock = lambda: now[0]
    e.runner.on_step = lambda: now.__setitem__(0, now[0] + 0.01)
    e.runner.say = lambda tokens: (tokens[-1] + 1) % 4  # repeats itself: drafts are right
    for _ in range(3):
        request = e.submit([0, 1, 2, 3] * 5, SamplingParams(max_tokens=40, ignore_eos=True))
        list(e.events(request))
        assert request.output == [i % 4 for i in range(40)]
        at_rest(e)
    assert request.timings.accepted_tokens > 0 and request.timings.cached_tokens == 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_traffic_gets_the_answers_of_the_model_alone(data: st.DataObject) -> None:
    e = engine(
        pages=data.draw(st.integers(9, 24)),
        context=64,
        max_tokens=data.draw(st.integers(3, 40)),
        max_sequences=data.draw(st.integers(1, 4)),
    )
    if data.draw(st.booleans()):
        e.pin(SYSTEM[: data.draw(st.integers(1, cache_of(e).most_pinned * PAGE))])
    beginnings = [[], SYSTEM, SYSTEM[:20], [2] * 20]
    live: list[Request] = []
    for _ in range(data.draw(st.integers(5, 60))):
        action = data.draw(st.sampled_from(("submit", "submit", "step", "step", "step", "cancel", "score", "repeat")))
        prompt = data.draw(st.sampled_from(beginnings)) + data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
        tenant = data.draw(st.sampled_from(("", "a")))
        if action == "repeat" and live:
            prompt = live[-1].tokens[:50]
        if action in ("submit", "repeat"):
            count = data.draw(st.integers(1, 14))
            live.append(e.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True), tenant=tenant))
        elif action == "cancel" and live:
            e.cancel(live[data.draw(st.integers(0, len(live) - 1))])
        elif action == "score":
            assert e.score(prompt, [continuation(prompt, 3)], tenant=tenant) == [0]
        else:
            e.step()
        e.scheduler.check_integrity()
    for _ in range(3000):
        if all(r.finish_reason for r in live):
            break
        e.step()
    for r in live:
        assert r.finish_reason in ("length", "cancelled")
        assert r.output == continuation(r.tokens[: r.prompt_tokens], len(r.output))
    at_rest(e)


def test_what_refused_prompts_begin_with_is_computed_beforehand() -> None:
    clock = Clock()
    runner = Runner(max_tokens=4)

    def tick() -> None:
        clock.now += 0.001

    runner.on_step = tick
    e = Engine(runner, frozenset(), clock, prefix_cache=True)
    e.calibrate()
    params = SamplingParams(max_tokens=1, ignore_eos=True)

    def refused(text: int, tenant: str = "") -> None:
        with pytest.raises(DeadlineError):
            e.submit([*SYSTEM, text], params, deadline_s=clock.now + 0.006, tenant=tenant)

    refused(1)
    e.probe()  # of what steps take
    refused(2, "other")  # no tenant learns what another asked
    assert not e.wants_probe
    refused(3)
    assert e.wants_probe and e.probe() and not e.wants_probe
    request = e.submit([*SYSTEM, 4], params, deadline_s=clock.now + 0.006)
    assert [event.token for event in e.events(request)] == continuation([*SYSTEM, 4], 1)
    assert request.timings.cached_tokens == len(SYSTEM)
    refused(5, "other")
    at_rest(e)
