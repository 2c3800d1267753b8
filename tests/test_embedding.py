"""Vectors by models that write, a piece at a time between steps: what they are, who waits, deadlines, pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fake import FakeRunner, continuation, next_token
from millis.engine.engine import Engine
from millis.server.messages import Batch, Cancel, Embed, Refused, Stats, Vectors
from millis.server.worker import Worker
from millis.types import DeadlineError, SamplingParams
from simulated import engine as simulated_engine

PROMPTS = [[1, 2, 3], [4], list(range(40)), [5, 6], [7] * 17, [8] * 16]
LONG = [1] * 2000


def mean(prompt: list[int]) -> list[float]:
    """Of the fake model's states, without engine."""
    return [float(np.mean([next_token(prompt[: i + 1]) for i in range(len(prompt))])), 1.0]


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)


class Desk:
    """A worker on simulated time, and what it said."""

    def __init__(self, **options: Any) -> None:
        self.sent: list[Any] = []
        self.engine = simulated_engine(noise=0, **options)
        tokenizer = SimpleNamespace(vocab_size=0, eos=frozenset(), control=frozenset(), token_bytes=None)
        parts = {"engine": self.engine, "tokenizer": tokenizer, "grammars": SimpleNamespace(compiled=0)}
        lm = SimpleNamespace(**parts, adapters=None, config=SimpleNamespace(max_waiting=8))
        self.worker = Worker(lm, self)  # type: ignore[arg-type]
        self.runner: Any = self.engine.runner

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def embed(self, number: int, *prompts: list[int], deadline_ms: float | None = None) -> None:
        now = self.engine.clock()
        deadline_s = None if deadline_ms is None else now + deadline_ms / 1000
        work = Embed(id=number, prompts=tuple(map(tuple, prompts)), arrival_s=now, deadline_s=deadline_s)
        self.worker.take(work)

    def said(self, kind: type[Any]) -> list[Any]:
        return [item for batch in self.sent if isinstance(batch, Batch) for item in batch.items if type(item) is kind]

    def work(self) -> None:
        while self.worker._embeds:
            self.worker.work()


def test_vectors_are_the_means_of_the_states_however_steps_come_between() -> None:
    engine = Engine(FakeRunner(pages=32), frozenset())
    request = engine.submit([3, 1, 4], greedy(30))
    embedding = engine.embedding(PROMPTS)
    while not embedding.whole:
        assert embedding.step()
        engine.step()
    np.testing.assert_allclose(embedding.vectors, [mean(prompt) for prompt in PROMPTS], rtol=1e-6)
    np.testing.assert_allclose(engine.embed(PROMPTS), embedding.vectors, rtol=1e-6)
    while request.finish_reason is None:
        engine.step()
    assert request.output == continuation([3, 1, 4], 30)
    engine.scheduler.check_integrity()


def test_an_answer_takes_its_steps_between_the_pieces_of_long_texts() -> None:
    desk = Desk(max_gap_ms=10)
    answer = desk.engine.submit([1, 2], greedy(300), priority="interactive")
    desk.embed(1, *[LONG] * 2)
    desk.worker.work()
    pieces = len(desk.runner.hidden_ms)
    assert pieces == 1 and any(isinstance(message, Stats) for message in desk.sent) and not desk.said(Vectors)
    lengths = []
    while desk.worker._embeds:
        before = len(answer.output)
        desk.worker.work()
        lengths.append(len(answer.output) - before)
    assert set(lengths) == {1} and len(lengths) > 20
    assert max(desk.runner.hidden_ms[1:]) <= 10 * 1.01  # as long as prompts beside the answer may take
    (found,) = desk.said(Vectors)
    assert found.id == 1 and found.shape == (2, 1) and found.timings.prompt_tokens == 2 * len(LONG)


def test_signs_of_life_come_while_texts_are_read_and_nothing_else_runs() -> None:
    desk = Desk()
    desk.embed(1, *[LONG] * 4)
    stats = []
    while desk.worker._embeds:
        desk.worker._stats_s = 0.0  # the latest was long ago
        desk.worker.work()
        stats.append(sum(isinstance(message, Stats) for message in desk.sent))
    assert len(stats) > 8 and stats == list(range(1, len(stats) + 1))


def test_where_time_is_short_no_step_comes_between() -> None:
    desk = Desk()
    answers = [desk.engine.submit([1, 2], greedy(300)) for _ in range(60)]  # long steps
    desk.engine.step()
    needed_ms = desk.engine.embedding([LONG] * 2).left_ms()
    begin = desk.engine.clock()
    desk.embed(1, *[LONG] * 2, deadline_ms=needed_ms + 15)
    desk.work()
    assert desk.said(Vectors) and 1000 * (desk.engine.clock() - begin) <= needed_ms + 15
    assert 1 <= len(answers[0].output) - 1 < len(desk.runner.hidden_ms) - 2


@pytest.mark.parametrize("deadline_ms", [None, 400.0])
def test_what_was_promised_its_deadline_takes_its_steps_all_the_same(deadline_ms: float | None) -> None:
    desk = Desk()
    answers = []
    with pytest.raises(DeadlineError):  # there is no time for more
        while True:
            answers.append(desk.engine.submit([1, 2], greedy(300), deadline_s=0.9, minimum_tokens=70))
    desk.engine.step()
    desk.embed(1, *[LONG] * 2, deadline_ms=deadline_ms)
    while desk.engine.has_work:
        desk.worker.work()
    assert all(len(answer.output) >= 70 and (answer.timings.slack_ms or -1) >= 0 for answer in answers)
    desk.work()
    assert (len(desk.said(Vectors)), len(desk.said(Refused))) == ((1, 0) if deadline_ms is None else (0, 1))


def test_a_deadline_that_cannot_be_kept_is_refused_before_anything_is_read() -> None:
    desk = Desk()
    desk.embed(1, *[LONG] * 4, deadline_ms=50)
    desk.work()
    (refused,) = desk.said(Refused)
    assert refused.kind == "deadline_unmeetable" and refused.predicted_ms > 200 and "send less" in refused.message
    assert not desk.runner.hidden_ms


def test_what_is_due_sooner_is_read_between_the_pieces_of_others() -> None:
    desk = Desk()
    desk.embed(1, *[LONG] * 4)
    desk.worker.work()
    desk.embed(2, [1] * 20, deadline_ms=30)
    desk.work()
    assert [found.id for found in desk.said(Vectors)] == [2, 1]


def test_one_that_is_cancelled_gives_its_pages_back() -> None:
    desk = Desk()
    desk.embed(1, LONG)
    desk.worker.work()
    assert desk.engine.scheduler.allocator.free < desk.runner.pages
    desk.worker.take(Cancel(1))
    desk.worker.work()
    desk.engine.scheduler.check_integrity()
    assert desk.engine.scheduler.allocator.free == desk.runner.pages and not desk.said(Vectors)


def test_two_that_do_not_fit_the_cache_together_are_read_one_behind_the_other() -> None:
    desk = Desk(pages=100)  # of 32 tokens
    desk.embed(1, LONG)
    desk.worker.work()
    desk.embed(2, LONG, deadline_ms=60_000)
    desk.work()
    assert [found.id for found in desk.said(Vectors)] == [1, 2] and not desk.said(Refused)
    desk.engine.scheduler.check_integrity()
