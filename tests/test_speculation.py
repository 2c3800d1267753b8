"""Speculation on real models: the answers are those without it, and the bench that says what it is worth."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import millis
from gguf_files import DROP, write_tiny
from millis.bench.speculation import PROMPTS, Row, measure, summary
from millis.engine.cost import StepCosts
from millis.types import ModelError, RequestError
from shell import millis as shell
from tokenizer_tiny import bpe

TEXT = "The red boat left the harbour at seven. The blue boat left the harbour at nine."
COPY = [{"role": "user", "content": f"Repeat this text three times:\n\n{TEXT}"}]
ASK = [{"role": "user", "content": "Name three colours of the rainbow."}]


class FixedCosts(StepCosts):
    """Rows that cost little, whatever is measured: what is guessed then does not depend on how busy the machine is."""

    def add(self, rows: int, ms: float) -> None:
        pass

    def known(self, rows: int) -> bool:
        return True

    def ms(self, rows: int) -> float:
        return 1 + 0.05 * rows

    @property
    def reach(self) -> int:
        return 8


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> millis.LanguageModel:
    """A model that drafts for itself, in four bits: mostly right, not always."""
    path = model_path("smollm2")
    model = millis.load(path, threads=2, context=512, draft=str(path), max_sequences=4)
    assert model.engine.speculator is not None
    model.engine.speculator.costs = FixedCosts()
    return model


@contextmanager
def plainly(lm: millis.LanguageModel, *, model: bool = True) -> Iterator[None]:
    """Without speculation, or only without the draft model."""
    speculator = lm.engine.speculator
    assert speculator is not None
    kept = speculator.model
    if model:
        speculator.enabled = False
    else:
        speculator.model = None
    try:
        yield
    finally:
        speculator.enabled, speculator.model = True, kept


def check_empty(lm: millis.LanguageModel) -> None:
    speculator = lm.engine.speculator
    assert speculator is not None and speculator.model is not None
    for allocator in (lm.engine.scheduler.allocator, speculator.model.allocator):
        allocator.check_integrity([])


@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 0.8, "seed": 4}, {"temperature": 1.0, "seed": 5, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3}, {"temperature": 1.0, "seed": 1, "min_p": 0.1, "top_k": 9}
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("messages", [COPY, ASK], ids=["copy", "ask"])
def test_answers_are_those_without(lm: millis.LanguageModel, messages: Any, params: dict[str, Any]) -> None:
    with plainly(lm):
        want = lm.chat(messages, max_tokens=70, **params)
    assert want.timings.drafted_tokens == 0
    with plainly(lm, model=False):
        text = lm.chat(messages, max_tokens=70, **params)
    both = lm.chat(messages, max_tokens=70, **params)
    for got in (text, both):
        assert (got.tokens, got.text, got.finish_reason) == (want.tokens, want.text, want.finish_reason)
        if want.logprobs:
            assert got.logprobs is not None
            close = [pytest.approx(one.logprob, abs=1e-3) for one in want.logprobs]
            assert [one.logprob for one in got.logprobs] == close
    check_empty(lm)


def test_the_text_and_the_model_are_used(lm: millis.LanguageModel) -> None:
    with plainly(lm, model=False):
        t = lm.chat(COPY, max_tokens=70).timings
    assert t.accepted_tokens > 4 and t.steps < t.completion_tokens
    assert t.completion_tokens <= t.steps + t.accepted_tokens
    assert lm.engine.speculator is not None and lm.engine.speculator.model is not None
    drafts = lm.engine.speculator.model
    request = lm.engine.submit(lm.tokenizer.encode_chat(ASK), millis.SamplingParams(max_tokens=40))
    drafts.behind(request)
    assert drafts.reserve(request, len(request.tokens) + 1)
    ((token, probability),) = drafts.draft([request], [[]])
    lm.engine.cancel(request)
    assert 0 < probability <= 1
    assert lm.tokenizer.decode([token]).strip()
    check_empty(lm)


@pytest.mark.parametrize("stop", ["harbour at n", "boat", ". The", "seven"])
def test_a_stop_string_that_accepted_tokens_complete(lm: millis.LanguageModel, stop: str) -> None:
    prompt = f"{TEXT} {TEXT} The red boat left the"
    with plainly(lm):
        want = lm.generate(prompt, max_tokens=60, stop=[stop])
    got = lm.generate(prompt, max_tokens=60, stop=[stop])
    assert (got.text, got.tokens, got.finish_reason) == (want.text, want.tokens, want.finish_reason)
    assert stop not in got.text and got.timings.completion_tokens == len(got.tokens)
    check_empty(lm)


def test_closing_a_stream_frees_both_caches(lm: millis.LanguageModel) -> None:
    with lm.chat_stream(COPY, max_tokens=60) as stream:
        for _ in range(12):
            next(stream)
    assert stream.completion is not None and stream.completion.finish_reason == "cancelled"
    check_empty(lm)


def test_threads_share_steps_with_drafts(lm: millis.LanguageModel) -> None:
    prompts = [f"{TEXT} {TEXT} The {colour} boat" for colour in ("red", "blue", "green")]
    with plainly(lm):
        want = [lm.generate(p, max_tokens=40, ignore_eos=True).tokens for p in prompts]
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        got[i] = lm.generate(prompts[i], max_tokens=40, ignore_eos=True).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [got[i] for i in range(3)] == want
    check_empty(lm)


def test_a_draft_model_of_another_vocabulary_is_refused(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    metadata = bpe()
    size = len(metadata["tokenizer.ggml.tokens"])
    write_tiny(path, "llama", metadata | {"tokenizer.ggml.scores": DROP}, {"token_embd.weight": (size, 64)})
    with pytest.raises(ModelError, match=r"other\.gguf cannot draft for .*vocabularies differ.*same family"):
        millis.load(model_path("smollm2"), draft=path)
    with pytest.raises(ModelError, match="did you mean smollm2"):
        millis.load(model_path("smollm2"), draft="smolm2")


def test_off_means_off(model_path: Callable[[str], Path]) -> None:
    off = millis.load(model_path("smollm2"), context=128, speculation="off")
    assert off.generate(f"{TEXT} {TEXT} The red", max_tokens=12).timings.drafted_tokens == 0
    with pytest.raises(RequestError, match="speculation is off"):
        measure(off, ["chat"], new_tokens=2, rounds=1)


# The bench


def test_bench_asks_both_ways_and_compares(lm: millis.LanguageModel) -> None:
    ticks: list[int] = []
    rows = measure(lm, ["edit"], new_tokens=24, rounds=2, limit=1, advance=lambda: ticks.append(1))
    assert len(ticks) == 4
    (row,) = rows
    assert (row.kind, row.prompt, row.same) == ("edit", PROMPTS["edit"][0], True)
    assert row.tokens <= 24 and row.plain_ms > 0 and row.speculated_ms > 0
    assert lm.engine.speculator is not None and lm.engine.speculator.enabled


def test_summary_weighs_prompts_by_their_tokens() -> None:
    rows = [Row("a", "", 100, 10.0, 5.0, 50, 60, 50, True), Row("b", "", 300, 10.0, 10.0, 300, 20, 0, False)]
    found = summary(rows)
    assert found["a"]["ratio"] == 2 and found["b"]["ratio"] == 1
    assert found["all"]["ratio"] == pytest.approx(4.0 / 3.5)
    assert found["all"]["plain_tokens_per_s"] == pytest.approx(100)
    assert found["all"]["median_ratio"] == 1.5 and found["all"]["least_ratio"] == 1
    assert found["all"]["right"] == pytest.approx(50 / 80)
    assert (found["all"]["same"], found["b"]["same"]) == (1, 0)


def test_the_command_prints_both_and_names_unknown_kinds(model_path: Callable[[str], Path]) -> None:
    arguments = ("bench", "speculation", "-m", model_path("smollm2"), "--new-tokens", "8", "--prompts", "1")
    done = shell(*arguments, "--kinds", "edit", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["same"] is True
    assert "guesses right" in shell(*arguments, "--kinds", "edit").stdout
    assert shell(*arguments, "--kinds", "edit,prose").returncode == 2


def test_run_takes_a_draft_model(model_path: Callable[[str], Path]) -> None:
    path = model_path("smollm2")
    plain = shell("run", "-m", path, "Say hello.", "--max-tokens", "8", "--speculation", "off")
    drafted = shell("run", "-m", path, "Say hello.", "--max-tokens", "8", "--draft", path)
    assert plain.returncode == drafted.returncode == 0, drafted.stderr
    assert plain.stdout == drafted.stdout
    wrong = shell("run", "-m", path, "Say hello.", "--draft", path, "--speculation", "off")
    assert wrong.returncode != 0 and "a draft model needs speculation='auto'" in wrong.stderr
