"""How an answer ends when its time is up: which token is the last, and where it may end before."""

from __future__ import annotations

from typing import Any

import pytest

from millis.engine.landing import Stage, stage
from millis.engine.request import Request
from millis.types import SamplingParams
from simulated import END, SENTENCE_EVERY, engine, in_time


@pytest.mark.parametrize(
    ("left_ms", "margin_ms", "expected"),
    [
        (1000, 0, Stage.FLYING),
        (90, 0, Stage.FLYING),  # this step and eight more
        (89, 0, Stage.WINDOW),
        (100, 20, Stage.WINDOW),
        (20, 0, Stage.WINDOW),  # this step and one more
        (19, 0, Stage.LAST),
        (30, 11, Stage.LAST),
        (5, 0, Stage.LAST),
    ],
)
def test_the_way_down(left_ms: float, margin_ms: float, expected: Stage) -> None:
    assert stage(left_ms, 10, 10, margin_ms, window=8) is expected


def landed(prompt: int, deadline_s: float, minimum: int | None = None, longest: int = 1000, **more: Any) -> Request:
    e = engine(noise=0.0)
    params = SamplingParams(max_tokens=longest, ignore_eos=True)
    request = e.submit([1] * prompt, params, deadline_s=e.clock() + deadline_s, minimum_tokens=minimum, **more)
    while request.finish_reason is None:
        e.step()
    return request


@pytest.mark.parametrize("prompt", range(20, 32))
def test_it_ends_at_a_sentence_end_within_the_window(prompt: int) -> None:
    """Sentences end at every twelfth position; a step takes 2.5 ms."""
    request = landed(prompt, 0.25)
    assert request.finish_reason == "deadline" and in_time(request)
    assert request.output[-1] == END
    assert len(request.tokens) % SENTENCE_EVERY == 1  # a natural end: one lies in any sixteen tokens
    assert request.timings.slack_ms is not None and request.timings.slack_ms < 17 * 2.6


def test_with_no_sentence_end_in_reach_the_last_token_is_made_one() -> None:
    request = landed(25, 0.05, minimum=1)  # position 36 is too far
    assert request.output[-1] == END and request.output.count(END) == 1
    assert in_time(request)


def test_less_than_the_minimum_is_not_an_end() -> None:
    request = landed(34, 0.06, minimum=16)  # a sentence ends at once, and the window is open
    assert len(request.output) >= 16


def test_what_is_wanted_whole_or_not_at_all_does_not_end_before_its_time() -> None:
    cut = landed(25, 0.25)
    longest = len(cut.output) + 2
    assert landed(25, 0.25, longest=longest).finish_reason == "deadline"
    for on_deadline in ("error", "fallback"):
        whole = landed(25, 0.25, longest=longest, on_deadline=on_deadline)
        assert whole.finish_reason == "length" and in_time(whole)
        late = landed(25, 0.25, on_deadline=on_deadline)
        assert late.finish_reason == "deadline" and in_time(late) and len(late.output) > longest


def test_without_a_deadline_nothing_lands() -> None:
    e = engine(noise=0.0)
    request = e.submit([1] * 20, SamplingParams(max_tokens=100, ignore_eos=True))
    while request.finish_reason is None:
        e.step()
    assert len(request.output) == 100 and request.finish_reason == "length"
    assert e.load().counters.landed == 0
