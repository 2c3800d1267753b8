"""Speculation on a fake model: answers stay what they were, in fewer steps where the text repeats itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake import FakeDraft, FakeRunner, next_token
from millis.engine.draft import DraftModel
from millis.engine.engine import Engine
from millis.engine.request import Request
from millis.engine.runner import Batch, Sampled
from millis.engine.speculate import MOST_ROWS, Speculator
from millis.types import SamplingParams

Say = Callable[[Sequence[int]], int]


def repeating(tokens: Sequence[int]) -> int:
    """A model whose text goes round in circles."""
    return (3 * tokens[-1] + sum(tokens[-2:])) % 11


def alone(say: Say, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(say(tokens))
    return tokens[len(prompt) :]


class Timed(FakeRunner):
    """Moves the clock by what a step of so many rows costs."""

    def __init__(self, clock: Clock, row_ms: float, **sizes: int) -> None:
        super().__init__(**sizes)
        self.clock, self.row_ms = clock, row_ms

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        self.clock.now += (10 + self.row_ms * (len(batch.tokens) - 1)) / 1000
        return super().step(batch, samplers)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def engine(
    say: Say = repeating, *, row_ms: float = 0.5, guess: Say | None = None, guess_ms: float = 2.0,
    eos: frozenset[int] = frozenset(), **sizes: int,
) -> Engine:  # fmt: skip
    """An engine with speculation on; `guess` is what its draft model says."""
    clock = Clock()
    runner = Timed(clock, row_ms, **sizes)
    runner.say = say
    draft = None
    if guess is not None:
        fake = FakeDraft(**sizes)
        fake.say = guess

        def tick() -> None:
            clock.now += guess_ms / 1000

        fake.on_step = tick
        draft = DraftModel(fake)
    return Engine(runner, eos, clock, Speculator(clock, draft))


def ask(e: Engine, prompt: list[int], **params: Any) -> Request:
    request = e.submit(prompt, SamplingParams(**{"max_tokens": 60, "ignore_eos": True, **params}))
    for _ in e.events(request):
        pass
    check_empty(e)
    return request


def check_empty(e: Engine) -> None:
    e.scheduler.check_integrity()
    assert e.scheduler.allocator.free == e.runner.pages
    assert e.speculator is not None
    if e.speculator.model is not None:
        e.speculator.model.check_integrity()
        assert e.speculator.model.allocator.free == e.runner.pages


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    request = ask(engine(), [1, 2, 3])
    t = request.timings
    assert request.output == alone(repeating, [1, 2, 3], 60)
    assert t.steps < 35
    assert t.completion_tokens == t.steps + t.accepted_tokens == 60
    assert t.accepted_tokens <= t.drafted_tokens


def test_switched_off_it_drafts_nothing() -> None:
    e = engine()
    assert e.speculator is not None
    e.speculator.enabled = False
    request = ask(e, [1, 2, 3])
    assert request.output == alone(repeating, [1, 2, 3], 60)
    assert (request.timings.steps, request.timings.drafted_tokens) == (60, 0)


def test_a_text_that_never_repeats_costs_nothing_more() -> None:
    prompt = [1, 2, 3, 1, 2, 3]
    request = ask(engine(next_token), prompt, max_tokens=100)
    assert request.output == alone(next_token, prompt, 100)
    assert request.timings.decode_ms < 1.02 * 10 * 99


def test_matches_that_mislead_are_soon_left_alone() -> None:
    """After 1 2 comes 3 in the prompt, always, and never in the answer."""

    def contrary(tokens: Sequence[int]) -> int:
        return len(tokens) // 3 % 80 + 10 if len(tokens) % 3 == 2 else 1 + len(tokens) % 3

    prompt = [1, 2, 3] * 5
    request = ask(engine(contrary, row_ms=5), prompt, max_tokens=100)
    assert request.output == alone(contrary, prompt, 100)
    assert request.timings.decode_ms < 1.03 * 10 * 99


@pytest.mark.parametrize(("row_ms", "most"), [(0.2, 25), (4.0, 50), (30.0, 60)])
def test_dear_rows_mean_fewer_drafts(row_ms: float, most: int) -> None:
    e = engine(row_ms=row_ms)
    ask(e, [1, 2, 3])  # learns what a row costs
    request = ask(e, [1, 2, 3])
    assert request.timings.steps <= most
    assert request.timings.decode_ms < 1.02 * 10 * 59


def test_a_model_that_is_right_and_cheap_is_used() -> None:
    request = ask(engine(next_token, guess=next_token), [5, 6, 7])
    assert request.output == alone(next_token, [5, 6, 7], 60)
    assert request.timings.steps < 25
    assert request.timings.decode_ms < 10 * 59 / 1.5


@pytest.mark.parametrize(
    ("guess", "guess_ms"), [(lambda tokens: 0, 2.0), (next_token, 30.0)], ids=["always wrong", "too slow"]
)
def test_a_model_that_does_not_pay_is_left_alone(guess: Say, guess_ms: float) -> None:
    e = engine(next_token, guess=guess, guess_ms=guess_ms)
    first = ask(e, [5, 6, 7], max_tokens=100)
    second = ask(e, [9, 6, 7], max_tokens=100)
    assert first.output == alone(next_token, [5, 6, 7], 100)
    assert first.timings.decode_ms < 1.20 * 10 * 99
    assert second.timings.decode_ms < 1.03 * 10 * 99


def test_a_model_that_is_sometimes_right() -> None:
    def guess(tokens: Sequence[int]) -> int:
        return next_token(tokens) if len(tokens) % 5 else 0

    request = ask(engine(next_token, guess=guess), [5, 6, 7], max_tokens=90)
    assert request.output == alone(next_token, [5, 6, 7], 90)
    assert 0 < request.timings.accepted_tokens < request.timings.drafted_tokens


@pytest.mark.parametrize("every", [2, 3])
def test_a_text_that_the_model_does_not_know_keeps_it_from_no_other(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first text it knows one token of `every`, of the second all; it is never sure."""

    def guess(tokens: Sequence[int]) -> int:
        return next_token(tokens) if tokens[0] != 50 or len(tokens) % every == 0 else 0

    e = engine(next_token, guess=guess)
    assert e.speculator is not None and e.speculator.model is not None
    runner = e.speculator.model.runner
    propose = runner.propose
    monkeypatch.setattr(runner, "propose", lambda *given: [(token, 0.5) for token, _ in propose(*given)])
    unknown = ask(e, [50, 6, 7], max_tokens=100)
    known = ask(e, [5, 6, 7], max_tokens=100)
    assert unknown.timings.decode_ms < 1.1 * 10 * 99
    assert known.timings.decode_ms < 10 * 99 / 1.5


def test_text_and_model_take_turns() -> None:
    """The text repeats for a while, then it does not: both have their use."""

    def say(tokens: Sequence[int]) -> int:
        return repeating(tokens) if len(tokens) < 50 else next_token(tokens)

    request = ask(engine(say, guess=next_token), [1, 2, 3], max_tokens=100)
    assert request.output == alone(say, [1, 2, 3], 100)
    assert request.timings.steps < 75


@pytest.mark.parametrize("draft", [None, next_token], ids=["text", "model"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 30])
def test_the_limit_is_exact(limit: int, draft: Say | None) -> None:
    say = next_token if draft else repeating
    request = ask(engine(say, guess=draft), [1, 2, 3], max_tokens=limit)
    assert request.output == alone(say, [1, 2, 3], limit)
    assert request.finish_reason == "length"


def test_the_context_bounds_drafts() -> None:
    request = ask(engine(context=30), [1, 2, 3], max_tokens=100)
    assert len(request.tokens) == 30
    assert request.output == alone(repeating, [1, 2, 3], 27)


@pytest.mark.parametrize("at", range(20, 30))
def test_an_end_inside_accepted_drafts_ends_the_answer(at: int) -> None:
    """The end token is a new one, so that any of the drafts before it may be the last of its step."""

    def say(tokens: Sequence[int]) -> int:
        return 96 if len(tokens) == at else repeating(tokens)

    eos = frozenset({96})
    e = engine(say, eos=eos)
    events = list(e.events(e.submit([1, 2, 3], SamplingParams(max_tokens=60))))
    assert [event.token for event in events] == [*alone(say, [1, 2, 3], at - 3), None]
    assert events[-1].finish_reason == "stop"
    check_empty(e)
    assert ask(engine(say, eos=eos), [1, 2, 3], ignore_eos=True).output == alone(say, [1, 2, 3], 60)


def test_end_tokens_that_the_text_holds_may_be_drafted() -> None:
    prompt = [*alone(repeating, [1, 2, 3], 25)]
    eos = frozenset({alone(repeating, prompt, 8)[-1]})
    want = alone(repeating, prompt, 8)
    stop = next(i for i, token in enumerate(want) if token in eos)
    request = ask(engine(eos=eos), prompt, ignore_eos=False)
    assert request.output == want[:stop] and request.finish_reason == "stop"


def test_closing_the_events_amid_accepted_tokens_frees_everything() -> None:
    e = engine(next_token, guess=next_token)
    events = e.events(e.submit([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(9):
        next(events)
    events.close()
    check_empty(e)
    assert ask(e, [4]).output == alone(next_token, [4], 60)


@pytest.mark.parametrize("say", [next_token, repeating])
def test_a_deadline_gets_no_fewer_tokens(say: Say) -> None:
    """Ten milliseconds a step: 250 ms after the prefill are 25 tokens without guesses."""
    for guess in (None, next_token):
        e = engine(say, guess=guess, row_ms=0.5)
        for _ in range(3):
            ask(e, [3, 4], max_tokens=40)
        now = e.clock()
        request = e.submit(
            [1, 2, 3], SamplingParams(max_tokens=90, ignore_eos=True), arrival_s=now, deadline_s=now + 0.26
        )
        tokens = [event.token for event in e.events(request) if event.token is not None]
        assert len(tokens) >= 24
        assert tokens == alone(say, [1, 2, 3], len(tokens))
        assert request.finish_reason == ("deadline" if len(tokens) < 90 else "length")
        assert request.timings.slack_ms is not None and request.timings.slack_ms >= -1e-6


def test_a_failing_step_leaves_nothing_behind() -> None:
    e = engine(next_token, guess=next_token)
    events = e.events(e.submit([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(5):
        next(events)
    e.runner.fail = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        list(events)
    e.runner.fail = None
    check_empty(e)


def test_an_interrupt_amid_drafts_is_computed_anew() -> None:
    e = engine(next_token, guess=next_token, max_sequences=4)
    mine, other = (e.submit([i, 2], SamplingParams(max_tokens=30, ignore_eos=True)) for i in (1, 2))
    events = e.events(mine)
    for _ in range(6):
        next(events)
    e.runner.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        list(events)
    e.runner.fail = None
    assert [event.token for event in e.events(other)] == alone(next_token, [2, 2], 30)
    check_empty(e)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_traffic_answers_as_without(data: st.DataObject) -> None:
    say = data.draw(st.sampled_from([next_token, repeating]))
    guess = data.draw(st.sampled_from([None, next_token, repeating, lambda tokens: (next_token(tokens) // 2) * 2]))
    e = engine(
        say, guess=guess, row_ms=data.draw(st.sampled_from([0.1, 3.0])), pages=data.draw(st.integers(10, 30)),
        context=40, max_tokens=data.draw(st.integers(1, 12)), max_sequences=data.draw(st.integers(1, 9)),
    )  # fmt: skip
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=8))
    wanted: list[tuple[Request, list[int]]] = []
    for at in range(2000):
        if at % 3 == 0 and shapes:
            length, count = shapes.pop()
            prompt = [(at + i * i) % 11 for i in range(length)]
            request = e.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
            wanted.append((request, alone(say, prompt, count)))
        e.step()
        e.scheduler.check_integrity()
        if not shapes and all(request.finish_reason for request, _ in wanted):
            break
    assert [request.output for request, _ in wanted] == [want for _, want in wanted]
    check_empty(e)


def test_a_step_with_drafts_keeps_to_its_rows_and_every_sequence_goes_on() -> None:
    e = engine(max_sequences=6, max_tokens=32, pages=200)
    requests = [e.submit([i, i + 1], SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(5)]
    while any(request.finish_reason is None for request in requests):
        before = [len(request.tokens) for request in requests]
        e.step()
        assert all(len(r.tokens) > n for r, n in zip(requests, before, strict=True) if r.finish_reason is None)
    decodes = [lengths for lengths in e.runner.batches[1:] if max(lengths) > 1]
    assert decodes and all(sum(lengths) <= MOST_ROWS for lengths in decodes)
    assert [r.output for r in requests] == [alone(repeating, [i, i + 1], 40) for i in range(5)]
