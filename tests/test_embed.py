"""Embeddings: against the hidden states of transformers, however texts are put together, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import millis
from millis.engine.pooling import groups
from millis.tasks.model import LanguageModel
from millis.types import DeadlineError, RequestError
from reference import reference_model
from shell import millis as shell

TEXTS = [
    "The cat sat on the mat.",
    "A kitten lay on the rug.",
    "Stock markets fell sharply after the central bank raised its rates.",
    "股市今天大幅下跌。",
    "word " * 150,
]


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> LanguageModel:
    return millis.load(model_path("smollm2"), threads=2, context=256, max_batch_tokens=64)


def test_vectors_are_the_mean_hidden_states_of_transformers(lm: LanguageModel) -> None:
    got = lm.embed(TEXTS)
    assert got.shape == (5, 576) and got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    model = reference_model(lm.path)
    for text, vector in zip(TEXTS, got, strict=True):
        with torch.inference_mode():
            states = model.base_model(torch.tensor([lm.tokenizer.encode(text)])).last_hidden_state[0].numpy()
        want = states.mean(axis=0)
        assert float(vector @ want) / np.linalg.norm(want) > 0.995


def test_a_text_has_the_same_vector_whatever_stands_beside_it(lm: LanguageModel) -> None:
    together = lm.embed(TEXTS * 3)
    for i, text in enumerate(TEXTS):
        alone = lm.embed([text])[0]
        for copy in range(3):
            assert float(together[i + copy * len(TEXTS)] @ alone) > 0.999
    assert lm.engine.scheduler.allocator.free == lm.engine.runner.pages


def test_texts_of_one_meaning_are_nearer(lm: LanguageModel) -> None:
    cat, kitten, market = lm.embed(TEXTS[:3])
    assert cat @ kitten > max(cat @ market, kitten @ market)


def test_embedding_beside_an_answer_changes_neither(lm: LanguageModel) -> None:
    want = lm.generate("Once upon a time", max_tokens=20).tokens
    stream = lm.stream("Once upon a time", max_tokens=20)
    next(stream)
    np.testing.assert_array_equal(lm.embed(TEXTS[:2]), lm.embed(TEXTS[:2]))
    assert stream.result().tokens == want


def test_what_cannot_be_embedded_is_refused(lm: LanguageModel) -> None:
    for texts, word in (
        ([], "no text"), (["a", " \n"], "text 1 is empty"), (["a", "word " * 400], "text 1 has 400|text 1 has 401"),
        ("a", "must be a list"), ([3], "text 0 must be a str"), (["\ud800"], "surrogate"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=word):
            lm.embed(texts)  # type: ignore[arg-type]
    assert lm.engine.scheduler.allocator.free == lm.engine.runner.pages


def test_with_a_deadline_vectors_are_the_same_or_it_is_refused(lm: LanguageModel) -> None:
    together, timed = lm.embed(TEXTS), lm.embed(TEXTS, deadline_ms=120_000)
    assert (together * timed).sum(axis=1).min() > 0.999
    with pytest.raises(DeadlineError, match="would take") as found:
        lm.embed(TEXTS, deadline_ms=0.01)
    assert found.value.predicted_ms > 0.01 and found.value.retry_after_s > 0
    assert lm.embed(TEXTS[:1]).shape == (1, 576)


def test_the_commands_take_a_deadline(model_path: Callable[[str], Path]) -> None:
    arguments = ("embed", "-m", model_path("minilm"), "--threads", "1", "--deadline-ms")
    assert len(json.loads(shell(*arguments, "60000", "a card").stdout)) == 384
    done = shell(*arguments, "0.001", "-", stdin="a card\na loan\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and [row["line"] for row in rows] == [1, 2]
    assert all("would take" in row["error"] for row in rows)


class Sizes:
    page_tokens, max_tokens, max_sequences = 4, 16, 3


def test_groups_fit_a_step_and_the_pages() -> None:
    prompts = [[1] * length for length in (5, 5, 5, 1, 1, 1, 1, 40, 16, 1, 3, 3, 3)]
    found = list(groups(prompts, Sizes(), 4))  # type: ignore[arg-type]
    assert [prompt for group in found for prompt in group] == prompts
    for group in found:
        assert len(group) <= 3
        assert len(group) == 1 or sum(map(len, group)) <= 16 and sum(-(-len(p) // 4) for p in group) <= 4
    assert [len(group) for group in found] == [2, 3, 2, 1, 1, 3, 1]
