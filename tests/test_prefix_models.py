"""The prefix cache on real models: the same greedy text, less computed, windows of Gemma included."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millis
from millis.tasks.model import LanguageModel
from millis.types import Completion
from prompts import CHINESE, CODE, ENGLISH

TIE = 0.1  # nats: what steps of another shape may turn round
BEGINNING = "\n\n".join([*ENGLISH, *CODE, *CHINESE])
ENDS = ["In short,", "The next day she", "Q: What is the capital of France?\nA:"]


class Pair:
    """A model with the cache and without."""

    def __init__(self, path: Path) -> None:
        options: dict[str, Any] = {"threads": 2, "context": 1024, "speculation": "off"}
        self.cached = millis.load(path, prefix_cache=True, **options)
        self.plain = millis.load(path, **options)
        ids = self.plain.tokenizer.encode(BEGINNING)
        self.beginning = (ids + ids)[:600]  # past a window of 512

    def ends(self) -> list[list[int]]:
        return [self.plain.tokenizer.encode(text, add_special=False) for text in ENDS]


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def pair(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> Iterator[Pair]:
    yield Pair(model_path(request.param))
    gc.collect()


@pytest.fixture(autouse=True)
def no_page_is_lost(pair: Pair) -> Iterator[None]:
    prefix = pair.cached.engine.scheduler.prefix
    assert prefix is not None
    prefix.evict(prefix.cached_pages)
    yield
    scheduler = pair.cached.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.allocator.free == pair.cached.runner.pages - prefix.pinned_pages
    assert not scheduler.copies


def ask(lm: LanguageModel, prompt: list[int], tokens: int = 16) -> Completion:
    return lm.generate(prompt, max_tokens=tokens, ignore_eos=True, logprobs=8)


def assert_same(a: Completion, b: Completion) -> None:
    """The same tokens, up to a choice between two that were all but equally likely."""
    assert a.logprobs is not None and b.logprobs is not None
    for mine, other in zip(a.logprobs, b.logprobs, strict=True):
        if mine.token != other.token:
            assert abs(mine.logprob - dict(mine.top)[other.token]) < TIE
            return
        assert mine.logprob == pytest.approx(other.logprob, abs=TIE)


@pytest.mark.parametrize("length", [75, 600])
def test_a_beginning_seen_before_is_not_computed_again(pair: Pair, length: int) -> None:
    prefix = pair.beginning[:length]
    for i, end in enumerate(pair.ends()):
        prompt = prefix + end
        with_cache, without = ask(pair.cached, prompt), ask(pair.plain, prompt)
        assert_same(with_cache, without)
        assert without.timings.cached_tokens == 0
        assert with_cache.timings.cached_tokens == (length if i else 0)
        assert with_cache.timings.prompt_tokens == len(prompt)


def test_turns_of_a_conversation(pair: Pair) -> None:
    turns = pair.beginning[:90]
    for end in pair.ends():
        before = len(turns) if len(turns) > 90 else 0
        turns = turns + end
        with_cache = ask(pair.cached, turns)
        assert_same(with_cache, ask(pair.plain, turns))
        assert with_cache.timings.cached_tokens == max(0, before - 1)
        turns = turns + with_cache.tokens


def test_scores_are_the_same(pair: Pair) -> None:
    prompt = pair.beginning[:570]
    want = pair.plain.score(prompt, pair.ends())
    for _ in range(2):
        assert pair.cached.score(prompt, pair.ends()) == pytest.approx(want, abs=TIE * 4)
    prefix = pair.cached.engine.scheduler.prefix
    assert prefix is not None and prefix.match_length("", prompt) == len(prompt) - 1


def test_cancelled_within_the_prompt_and_asked_again(pair: Pair) -> None:
    prompt = pair.beginning[:590]
    engine = pair.cached.engine
    request = engine.submit(prompt, millis.SamplingParams(max_tokens=4))
    engine.step()  # 512 tokens of it
    engine.cancel(request)
    engine.scheduler.check_integrity()
    again = ask(pair.cached, prompt)
    assert again.timings.cached_tokens == 512
    assert_same(again, ask(pair.plain, prompt))


def test_preempted_in_the_middle(pair: Pair) -> None:
    engine, prompt = pair.cached.engine, pair.beginning[:100]
    request = engine.submit(prompt, millis.SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.scheduler.preempt(request)
    engine.scheduler.check_integrity()
    while request.finish_reason is None:
        engine.step()
    want = ask(pair.plain, prompt, 12)
    assert request.timings.cached_tokens == 0
    assert want.logprobs is not None
    for mine, other in zip(request.output, want.logprobs, strict=True):
        if mine != other.token:
            assert abs(other.logprob - dict(other.top)[mine]) < TIE
            break


def test_a_pinned_prefix_serves_every_tenant(pair: Pair) -> None:
    engine = pair.cached.engine
    text = pair.beginning[37:137]
    assert engine.pin(text) == 100
    request = engine.submit(text + pair.ends()[0], millis.SamplingParams(max_tokens=2, ignore_eos=True), tenant="x")
    assert len(list(engine.events(request))) == 2
    assert request.timings.cached_tokens == 100


def test_the_pool_holds_more_than_one_context(pair: Pair) -> None:
    assert pair.plain.runner.pages * 32 == 1024
    assert 1024 <= pair.cached.runner.pages * 32 <= 8 * 1024
