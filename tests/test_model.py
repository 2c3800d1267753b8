"""LanguageModel and Stream as Python programs use them: on real models, against transformers, and on a fake engine."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import millis
from fake import FakeRunner, continuation
from millis.engine.engine import Engine
from millis.engine.timely import TimelyReader
from millis.tasks.model import LanguageModel, Stream
from millis.tasks.sentences import sentence_ends
from millis.tasks.text import TextStream
from millis.types import Completion, DeadlineError, ModelError, RequestError, SamplingParams
from reference import next_logits, reference_model

STORY = "Once upon a time, there was"
QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> LanguageModel:
    return millis.load(model_path("smollm2"), threads=2, context=1024)


@pytest.fixture(autouse=True)
def no_page_is_lost(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test with the real model, its cache is as empty as before."""
    yield
    if "lm" in request.fixturenames:
        engine = request.getfixturevalue("lm").engine
        engine.scheduler.check_integrity()
        assert engine.scheduler.allocator.free == engine.runner.pages
        assert not engine.scheduler.waiting


def log_probabilities(path: Path, prompt: list[int], following: list[int]) -> list[float]:
    """transformers' log-probability, in nats, of each following token after all before it."""
    logits = next_logits(reference_model(path), prompt + following[:-1])[len(prompt) - 1 :].astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return [float(row[token]) for row, token in zip(logs, following, strict=True)]


# Answers


def test_an_answer_is_text_tokens_reason_and_timings(lm: LanguageModel) -> None:
    out = lm.generate(STORY, max_tokens=12, ignore_eos=True)
    assert isinstance(out, Completion)
    assert len(out.tokens) == 12 == out.timings.completion_tokens
    assert out.text == str(out) == lm.tokenizer.decode(out.tokens)
    assert out.finish_reason == "length"
    assert out.logprobs is None
    t = out.timings
    assert t.prompt_tokens == len(lm.tokenizer.encode(STORY))
    assert 0 < t.prefill_ms <= t.first_token_ms <= t.total_ms
    assert t.tokens_per_second == pytest.approx(1000 * 11 / t.decode_ms)
    assert "deadline_ms" not in t.asdict() and "slack_ms" not in t.asdict()


def test_stream_pieces_join_to_the_text(lm: LanguageModel) -> None:
    stream = lm.stream(STORY, max_tokens=24)
    pieces = list(stream)
    assert len(pieces) > 4 and all(pieces)
    assert stream.completion is not None
    assert "".join(pieces) == stream.completion.text == lm.generate(STORY, max_tokens=24).text


def test_a_prompt_may_be_ids(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(STORY)
    text = lm.generate(STORY, max_tokens=8)
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert lm.generate(prompt, max_tokens=8).tokens == text.tokens


def test_chat_is_generate_after_the_models_own_template(lm: LanguageModel) -> None:
    out = lm.chat(QUESTION, max_tokens=64)
    ids = lm.tokenizer.encode_chat(QUESTION)
    assert out.tokens == lm.generate(ids, max_tokens=64).tokens
    assert out.timings.prompt_tokens == len(ids)
    assert out.finish_reason == "stop" and not set(out.tokens) & lm.tokenizer.eos
    stream = lm.chat_stream(QUESTION, max_tokens=64)
    assert "".join(stream) == out.text == stream.result().text


def test_ignore_eos_goes_on_past_the_end(lm: LanguageModel) -> None:
    """The end is not forbidden: it is chosen as without the option, and the answer goes on after it."""
    short = lm.chat(QUESTION, max_tokens=100)
    long = lm.chat(QUESTION, max_tokens=len(short.tokens) + 20, ignore_eos=True)
    assert short.finish_reason == "stop" and long.finish_reason == "length"
    assert long.tokens[: len(short.tokens)] == short.tokens
    assert long.tokens[len(short.tokens)] in lm.tokenizer.eos
    assert len(long.tokens) == len(short.tokens) + 20


def test_the_smallest_top_p_is_greedy(lm: LanguageModel) -> None:
    """It is 0 in single precision, which no sampler takes."""
    small = lm.generate("Once upon a time", max_tokens=8, temperature=1.0, top_p=5e-324)
    assert small.tokens == lm.generate("Once upon a time", max_tokens=8).tokens


def test_the_context_ends_an_answer(lm: LanguageModel) -> None:
    ids = (lm.tokenizer.encode(STORY) * 200)[:1000]
    out = lm.generate(ids, max_tokens=100, ignore_eos=True)
    assert (len(out.tokens), out.finish_reason) == (24, "length")
    with pytest.raises(RequestError, match="1024 tokens; the context holds 1024"):
        lm.generate((ids * 2)[:1024])


def test_chinese_comes_in_whole_characters(model_path: Callable[[str], Path]) -> None:
    qwen = millis.load(model_path("qwen2.5-0.5b"), threads=2, context=256)
    stream = qwen.chat_stream([{"role": "user", "content": "写一首关于秋天的短诗，并加上表情符号。"}], max_tokens=60)
    pieces = list(stream)
    assert stream.completion is not None
    text = stream.completion.text
    assert "".join(pieces) == text
    assert "\ufffd" not in text
    assert sum("\u4e00" <= character <= "\u9fff" for character in text) > 20
    rare = qwen.tokenizer.encode("𠮷🙂龘", add_special=False)
    assert len(rare) > 3  # so that pushing them one by one cuts characters
    stream_of_rare = TextStream(qwen.tokenizer.detokenizer())
    assert all("\ufffd" not in stream_of_rare.push(token) for token in rare)
    assert stream_of_rare.text == "𠮷🙂龘"


# Sampling


def test_stop_strings_wherever_tokens_end(lm: LanguageModel) -> None:
    whole = lm.generate(STORY, max_tokens=32)
    for begin in range(1, 25, 4):
        stop = whole.text[begin : begin + 7]
        out = lm.generate(STORY, max_tokens=32, stop=[stop, "never said"])
        assert out.text == whole.text[: whole.text.index(stop)]
        assert out.finish_reason == "stop"
        assert whole.tokens[: len(out.tokens)] == out.tokens
    assert lm.generate(STORY, max_tokens=32, stop="never said").text == whole.text


def test_a_stop_string_across_tokens(lm: LanguageModel) -> None:
    whole = lm.generate(STORY, max_tokens=8)
    first = lm.tokenizer.decode(whole.tokens[:3])
    stop = whole.text[len(first) - 2 : len(first) + 2]
    stream = lm.stream(STORY, max_tokens=8, stop=stop)
    assert "".join(stream) == whole.text[: whole.text.index(stop)]


def test_seeds_reproduce(lm: LanguageModel) -> None:
    def draw(seed: int | None) -> list[int]:
        return lm.generate(STORY, max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True).tokens

    assert draw(7) == draw(7)
    assert draw(2**64 - 1) == draw(2**64 - 1)
    assert len({tuple(draw(seed)) for seed in (None, None, None, 7, 8)}) == 5


def test_greedy_by_any_name(lm: LanguageModel) -> None:
    greedy = lm.generate(STORY, max_tokens=8).tokens
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert lm.generate(STORY, max_tokens=8, temperature=1.0, **params).tokens == greedy


def test_penalties_and_biases_change_the_text(lm: LanguageModel) -> None:
    prompt = "one two one two one two one two one two"
    plain = lm.generate(prompt, max_tokens=24, ignore_eos=True).tokens
    for params in ({"repetition_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        out = lm.generate(prompt, max_tokens=24, ignore_eos=True, **params).tokens
        assert len(set(out)) > len(set(plain)), params
    without = lm.generate(prompt, max_tokens=24, logit_bias={plain[0]: -np.inf}, ignore_eos=True).tokens
    assert plain[0] not in without
    assert set(lm.generate(prompt, max_tokens=4, logit_bias={99: 1e4}).tokens) == {99}


def test_unknown_and_impossible_parameters_are_named(lm: LanguageModel) -> None:
    with pytest.raises(RequestError, match="unknown sampling parameter 'max_token'; there are max_tokens, temperature"):
        lm.generate(STORY, max_token=8)
    with pytest.raises(RequestError, match="unknown sampling parameter 'n'"):
        lm.chat_stream(QUESTION, n=2)
    with pytest.raises(RequestError, match="temperature must lie in"):
        lm.generate(STORY, temperature=float("nan"))
    with pytest.raises(RequestError, match="names token 999999"):
        lm.generate(STORY, logit_bias={999999: 1.0})
    for deadline in (0, -5, float("inf"), float("nan"), True, "100"):
        with pytest.raises(RequestError, match="deadline_ms must be a positive number"):
            lm.generate(STORY, deadline_ms=deadline)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [None, 5, b"bytes", [1.5], ["word"], [None]])
def test_what_is_no_prompt_is_refused(prompt: Any, lm: LanguageModel) -> None:
    with pytest.raises(RequestError, match=r"prompt is a text or a sequence|token ids must be whole numbers"):
        lm.generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "expected"), [("", "empty"), ([], "empty"), ([-1], "token -1"), ([1 << 40], "token")]
)
def test_prompts_that_cannot_run(prompt: Any, expected: str, lm: LanguageModel) -> None:
    with pytest.raises(RequestError, match=expected):
        lm.generate(prompt)


# Scores


def test_score_equals_transformers(model_path: Callable[[str], Path]) -> None:
    path = model_path("smollm2")
    exact = millis.load(path, threads=2, context=128, precision="exact")
    prompt = exact.tokenizer.encode("The capital of France is")
    for text in (" Paris, the city of light.", " Rome"):
        ids = exact.tokenizer.encode(text, add_special=False)
        expected = log_probabilities(path, prompt, ids)
        ours = [exact.score(prompt + ids[:i], [ids[i : i + 1]])[0] for i in range(len(ids))]
        assert ours == pytest.approx(expected, abs=1e-3)
        assert exact.score("The capital of France is", [text, ids]) == pytest.approx([sum(expected)] * 2, abs=1e-3)


def test_logprobs_sum_to_the_score(lm: LanguageModel) -> None:
    out = lm.generate(STORY, max_tokens=10, logprobs=2, ignore_eos=True)
    assert out.logprobs is not None
    assert [entry.token for entry in out.logprobs] == out.tokens
    assert all(entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 2 for entry in out.logprobs)
    (score,) = lm.score(STORY, [out.tokens])
    assert sum(entry.logprob for entry in out.logprobs) == pytest.approx(score, abs=0.05)


def test_sampled_logprobs_are_before_the_temperature(lm: LanguageModel) -> None:
    out = lm.generate(STORY, max_tokens=6, temperature=2.0, seed=3, logprobs=0, ignore_eos=True)
    assert out.logprobs is not None and not any(entry.top for entry in out.logprobs)
    (score,) = lm.score(STORY, [out.tokens])
    assert sum(entry.logprob for entry in out.logprobs) == pytest.approx(score, abs=0.1)


def test_score_prefers_what_is_true_and_refuses_what_is_empty(lm: LanguageModel) -> None:
    paris, stone = lm.score("The capital of France is", [" Paris", " stone"])
    assert stone < paris < 0
    assert lm.score(STORY, []) == []
    with pytest.raises(RequestError, match="must be a list"):
        lm.score(STORY, " Paris")
    with pytest.raises(RequestError, match="continuation 1 is empty"):
        lm.score(STORY, [" a", ""])
    with pytest.raises(RequestError, match="the context holds 1024"):
        lm.score(STORY, [[5] * 1024])


# Ends before the end


def test_a_deadline_ends_the_answer(lm: LanguageModel) -> None:
    out = lm.generate(STORY, max_tokens=1000, deadline_ms=600, ignore_eos=True)
    assert out.finish_reason == "deadline"
    assert len(out.tokens) < 1000
    assert out.text == lm.tokenizer.decode(out.tokens)
    assert out.tokens[-1] in lm.engine.sentence_ends
    assert out.timings.deadline_ms == pytest.approx(600)
    assert out.timings.slack_ms == pytest.approx(600 - out.timings.total_ms)


def test_a_deadline_too_short_for_anything_is_refused_with_the_time_it_takes(lm: LanguageModel) -> None:
    with pytest.raises(DeadlineError, match="cannot be met") as caught:
        lm.generate(STORY, deadline_ms=1e-3)
    assert caught.value.predicted_ms > 1e-3
    assert caught.value.retry_after_s > 0
    assert not lm.engine.has_work


def test_a_deadline_that_is_far_changes_no_token(lm: LanguageModel) -> None:
    plain = lm.generate(STORY, max_tokens=12, ignore_eos=True)
    assert lm.generate(STORY, max_tokens=12, ignore_eos=True, deadline_ms=1e6).tokens == plain.tokens


def test_the_tokens_that_end_a_sentence(lm: LanguageModel) -> None:
    encode = lm.tokenizer.encode
    ends = sentence_ends(lm.tokenizer)
    for text in ("It is so.", "Really?", "Stop!", "a line\n", "他走了。"):
        assert encode(text, add_special=False)[-1] in ends, text
    for text in ("and", "Mr", "one,", "12", "(", "<|im_end|>"):
        assert encode(text, add_special=False, parse_special=True)[-1] not in ends, text


def test_closing_a_stream_keeps_what_was_written(lm: LanguageModel) -> None:
    with lm.stream(STORY, max_tokens=500, ignore_eos=True) as stream:
        pieces = [next(stream) for _ in range(5)]
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text == "".join(pieces)
    assert 5 <= len(stream.completion.tokens) < 20
    assert stream.result() is stream.completion
    assert list(stream) == []


def test_a_stream_closed_before_it_began_computes_nothing(lm: LanguageModel) -> None:
    stream = lm.stream(STORY)
    stream.close()
    assert stream.result().finish_reason == "cancelled"
    assert stream.timings.steps == 0


def test_a_stream_that_nobody_holds_ends_at_once(lm: LanguageModel) -> None:
    gc.disable()
    try:
        for text in lm.stream("Once upon a time", max_tokens=500, ignore_eos=True):
            assert text
            break
        lm.stream("Never read", max_tokens=500)
        lm.generate("Hi", max_tokens=1)
        assert lm.engine.load().running == lm.engine.load().waiting == 0
    finally:
        gc.enable()


def test_stop_soon_ends_within_a_step(lm: LanguageModel) -> None:
    stream = lm.stream(STORY, max_tokens=500, ignore_eos=True)
    for _ in range(3):
        next(stream)
    before = stream.timings.steps
    stream.stop_soon()
    rest = list(stream)
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert stream.timings.steps <= before + 1
    assert len(rest) <= 1


def test_threads_share_a_stream_and_any_may_close_it(lm: LanguageModel) -> None:
    whole = lm.generate(STORY, max_tokens=60, ignore_eos=True)
    stream = lm.stream(STORY, max_tokens=60, ignore_eos=True)
    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(lambda _: "".join(stream), range(3), timeout=60))
    assert stream.result().tokens == whole.tokens and stream.result().text == whole.text
    assert sorted("".join(taken)) == sorted(whole.text)
    stream = lm.stream(STORY, max_tokens=500, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        begin = next(stream)
        rest = pool.submit(lambda: "".join(stream))
        stream.close()
        assert stream.result().text == begin + rest.result(timeout=60)
    assert stream.result().finish_reason == "cancelled"


def test_threads_share_the_engine(lm: LanguageModel) -> None:
    prompts = [STORY, "The three primary colours are", "def add(a, b):"]
    alone = [lm.generate(prompt, max_tokens=24, ignore_eos=True).text for prompt in prompts]
    got: dict[int, str] = {}
    gate = threading.Barrier(3)

    def ask(i: int) -> None:
        gate.wait()
        got[i] = lm.generate(prompts[i], max_tokens=24, ignore_eos=True).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [got[i] for i in range(3)] == alone


# On an engine without weights: a child forked in the middle of a step, a stream that is forgotten


class Letters:
    def push(self, token: int) -> str:
        return chr(65 + token % 26)


def fake_stream(engine: Engine, prompt: list[int], count: int = 9) -> Stream:
    request = engine.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
    return Stream(engine, request, TextStream(Letters()), 0.0)


@pytest.mark.parametrize("asked", ["an answer", "vectors in time"])
def test_a_child_forked_in_the_middle_of_a_step_is_told(asked: str) -> None:
    """Nobody in the child will give back what the parent's thread holds."""
    runner = FakeRunner()
    if asked == "an answer":
        engine = Engine(runner, frozenset())
        run = lambda: fake_stream(engine, [1]).result()  # noqa: E731
    else:
        reader = TimelyReader(lambda ids: (runner.on_step(), np.zeros((len(ids), 2)))[1], context=8, max_tokens=8)
        run = lambda: reader.prepare(quick=True)  # noqa: E731
    begun, end = threading.Event(), threading.Event()
    runner.on_step = lambda: (begun.set(), end.wait())
    worker = threading.Thread(target=run)
    worker.start()
    begun.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later versions of Python warn of forks beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            run()
        except RuntimeError as error:
            os._exit(7 if "after the fork" in str(error) else 1)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end.set()
    worker.join()
    assert code == 7


def test_a_forgotten_stream_is_swept_up_even_in_the_middle_of_a_step() -> None:
    """The garbage collector may find it on the very thread that runs the step; waiting for the step would never end."""
    gc.collect()
    gc.freeze()  # what other tests left is not looked at again in every step
    engine = Engine(FakeRunner(), frozenset())
    forgotten = [fake_stream(engine, [1, 2]), fake_stream(engine, [3])]
    next(forgotten[0])  # one has begun, the other not
    gc.collect()
    gc.disable()
    try:
        forgotten.clear()
        engine.runner.on_step = gc.collect
        worker = threading.Thread(target=lambda: fake_stream(engine, [4]).result(), daemon=True)
        worker.start()
        worker.join(timeout=20)
        assert not worker.is_alive(), "the step waits for itself"
    finally:
        gc.unfreeze()
        gc.enable()
    engine.runner.on_step = None
    assert fake_stream(engine, [5]).result().tokens == continuation([5], 9)
    engine.scheduler.check_integrity()
    assert engine.scheduler.allocator.free == engine.runner.pages and not engine.scheduler.running


def test_a_failing_step_is_raised_and_the_stream_is_over() -> None:
    engine = Engine(FakeRunner(), frozenset())
    stream = fake_stream(engine, [1])
    piece = next(stream)
    engine.runner.fail = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        next(stream)
    engine.runner.fail = None
    assert stream.result().text == piece
    assert stream.result().finish_reason == "cancelled"


# Loading


def test_unknown_options_are_named(model_path: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="unknown option 'thread'; there are threads, isa, precision"):
        millis.load(model_path("smollm2"), thread=2)
    with pytest.raises(RequestError, match="precision must be 'fast', 'int8' or 'exact'"):
        millis.load(model_path("smollm2"), precision="half")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="context must lie in"):
        millis.load(model_path("smollm2"), context=1 << 20)


def test_an_instruction_set_that_is_not_here(
    model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLIS_ISA", "nonsense")
    with pytest.raises(RequestError, match="no instruction set 'nonsense'; it has scalar.*unset MILLIS_ISA"):
        millis.load(model_path("smollm2"))


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        millis.load(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="did you mean smollm2"):
        millis.load("smolm2")


def test_the_models_facts(lm: LanguageModel, model_path: Callable[[str], Path]) -> None:
    assert lm.path == model_path("smollm2")
    assert lm.config.threads == 2
    assert lm.runner.context == 1024
    assert lm.tokenizer.decode(lm.tokenizer.encode("Grüße, 世界!")) == "Grüße, 世界!"
