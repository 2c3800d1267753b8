"""A draft model follows requests: what it computes, what it keeps after wrong drafts, and its pages."""

from __future__ import annotations

import pytest

from fake import FakeDraft, continuation
from millis.engine.draft import DraftModel
from millis.engine.request import Request
from millis.types import SamplingParams


def request(tokens: list[int]) -> Request:
    return Request(
        prompt_tokens=len(tokens), tokens=list(tokens), params=SamplingParams(), sampler=object(), limit=99, arrival_s=0
    )


def ask(model: DraftModel, requests: list[Request], count: int) -> list[list[int]]:
    """`count` drafts for each request, as one round makes them."""
    ahead: list[list[int]] = [[] for _ in requests]
    for r in requests:
        model.behind(r)
        assert model.reserve(r, len(r.tokens) + count)
    for _ in range(count):
        for drafts, (token, _) in zip(ahead, model.draft(requests, ahead), strict=True):
            drafts.append(token)
    return ahead


@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 50])
def test_drafts_are_the_models_own_continuation(length: int) -> None:
    model = DraftModel(FakeDraft())
    prompt = [(5 * i) % 97 for i in range(length)]
    assert ask(model, [request(prompt)], 5) == [continuation(prompt, 5)]
    assert sum(map(sum, model.runner.batches)) == length + 4  # the last draft's keys are never needed


def test_several_requests_share_a_forward() -> None:
    model = DraftModel(FakeDraft())
    prompts = [[1, 2, 3], [9], [4] * 20]
    assert ask(model, [request(p) for p in prompts], 3) == [continuation(p, 3) for p in prompts]
    assert max(map(len, model.runner.batches)) == 3


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_wrong_drafts_are_overwritten(kept: int) -> None:
    model = DraftModel(FakeDraft())
    r = request([1, 2, 3])
    (drafts,) = ask(model, [r], 5)
    r.tokens += [*drafts[:kept], 90]
    assert model.behind(r) == len(r.tokens) - min(3 + kept, 3 + 4)
    r.tokens += [91, 92]  # other steps went by without the model
    assert ask(model, [r], 4) == [continuation(r.tokens, 4)]


def test_rare_words_are_looked_at_where_the_text_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millis.engine.draft.LARGE_VOCABULARY", 97)
    model = DraftModel(FakeDraft(), control={95, 96})
    frequent = 97 // 48 * 16
    for tokens, words in (
        ([1, 2, frequent - 1, 95, 96, 96], frequent),  # control tokens are no words
        ([1, frequent, 90, 94, 80], frequent),  # some rare words
        ([1, frequent, 90, 91, 92, 93], 97),
        ([90] * 5 + [1] * 59, 97),
        ([90] * 5 + [1] * 60, frequent),  # that was long ago
    ):
        ask(model, [one := request(tokens)], 1)
        assert model.runner.words[-1] == words
        model.forget(one)
    both = [request([1]), request([90] * 5)]
    ask(model, both, 2)
    assert model.runner.words[-2:] == [97, 97]
    monkeypatch.setattr("millis.engine.draft.LARGE_VOCABULARY", 98)
    small = DraftModel(FakeDraft())
    one = request([1])
    ask(small, [one], 1)
    assert small.runner.words == [97]


def test_pages_are_taken_once_and_given_back() -> None:
    model = DraftModel(FakeDraft(pages=6, context=24))
    first, second = request([1] * 10), request([2] * 10)
    ask(model, [first], 2)
    ask(model, [first], 2)
    assert model.allocator.free == 3
    assert not model.reserve(second, 13)
    assert not model.reserve(first, 25)  # beyond its context
    model.check_integrity()
    model.forget(first)
    model.forget(second)
    model.forget(second)
    model.check_integrity()
    assert model.allocator.free == 6
