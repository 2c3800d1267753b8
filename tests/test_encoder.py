"""Encoder as Python programs use it: embeddings and labels against transformers, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import millis
from encoders import CONTEXT, LABELS, save, tiny
from millis.types import DeadlineError, ModelError, RequestError

TEXTS = ["Where is my parcel?", "Please help, my new card is lost.", "LOAN", "a b c d", "the card the card?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny("bert"), tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> millis.Encoder:
    found = millis.load(folder, threads=2, precision="exact")
    assert isinstance(found, millis.Encoder)
    return found


def expected(folder: Path, texts: list[str]) -> torch.Tensor:
    """[N, labels] the logits of transformers, tokenizer and all."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer_of(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_labels_and_scores_are_those_of_transformers(folder: Path, encoder: millis.Encoder) -> None:
    logits = expected(folder, TEXTS)
    np.testing.assert_allclose(encoder.logits(TEXTS), logits.numpy(), atol=2e-5)
    assert encoder.labels == tuple(LABELS.values())
    for text, row, found in zip(TEXTS, logits.softmax(1), encoder.classify(TEXTS), strict=True):
        assert found.label == LABELS[int(row.argmax())] == str(found)
        assert list(found.scores.values()) == sorted(found.scores.values(), reverse=True)
        assert sum(found.scores.values()) == pytest.approx(1)
        for i, label in LABELS.items():
            assert found.scores[label] == pytest.approx(float(row[i]), abs=1e-5)
        assert encoder.classify(text).scores == pytest.approx(found.scores, abs=1e-6)


def test_top_and_timings(encoder: millis.Encoder) -> None:
    found = encoder.classify(TEXTS[0], top=2)
    assert len(found.scores) == 2 and next(iter(found.scores)) == found.label
    timings = found.timings
    assert timings.prompt_tokens == len(encoder.tokenizer.encode(TEXTS[0])) and timings.steps == 1
    assert 0 < timings.tokenize_ms < timings.total_ms and 0 < timings.prefill_ms < timings.total_ms
    assert timings.total_ms == pytest.approx(timings.tokenize_ms + timings.prefill_ms)


def test_several_labels_at_once(tmp_path: Path) -> None:
    folder = save(tiny("bert", problem_type="multi_label_classification"), tmp_path)
    found = millis.Encoder(folder, precision="exact").classify(TEXTS[1])
    wanted = expected(folder, TEXTS[1:2]).sigmoid()[0]
    assert found.scores == pytest.approx({label: float(wanted[i]) for i, label in LABELS.items()}, abs=1e-5)


def test_a_head_of_one_number(tmp_path: Path) -> None:
    folder = save(tiny("bert", id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}), tmp_path)
    encoder = millis.Encoder(folder, precision="exact")
    np.testing.assert_allclose(encoder.logits(TEXTS), expected(folder, TEXTS).numpy(), atol=2e-5)
    with pytest.raises(RequestError, match="gives a number and no label"):
        encoder.classify(TEXTS[0])


QUERY, DOCUMENTS = "where is my parcel", ["The parcel is late.", "a new card", "lost lost lost ?"]


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_a_cross_encoder_relates_texts_as_transformers_does(family: str, tmp_path: Path) -> None:
    """One number of two texts read together, those of the second of another kind where the model knows kinds."""
    folder = save(tiny(family, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}), tmp_path)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer_of(folder)
    wanted = []
    for document in DOCUMENTS:
        given = tokenizer(QUERY, document, return_tensors="pt", return_token_type_ids=family == "bert")
        with torch.no_grad():
            found = model(**given)
        wanted.append(float(found.logits[0, 0].sigmoid()))
    encoder = millis.Encoder(folder, threads=2, precision="exact")
    np.testing.assert_allclose(encoder.relevance(QUERY, DOCUMENTS), wanted, atol=2e-5)
    np.testing.assert_allclose(encoder.relevance(QUERY, DOCUMENTS, deadline_ms=60_000), wanted, atol=2e-5)
    long = " ".join(["card"] * CONTEXT)
    with pytest.raises(RequestError, match=rf"document 1 and the query have {CONTEXT + 7} tokens"):
        encoder.relevance(QUERY, ["a", long])
    cut = " ".join(["card"] * (CONTEXT - 7))
    np.testing.assert_allclose(
        encoder.relevance(QUERY, [long], truncate=True), encoder.relevance(QUERY, [cut]), atol=1e-6
    )
    with pytest.raises(RequestError, match="the first text leaves no room"):
        encoder.relevance(long, ["a"], truncate=True)


def test_texts_are_related_by_what_was_trained_to(encoder: millis.Encoder) -> None:
    assert not encoder.relates
    with pytest.raises(RequestError, match=r"was not trained to relate two texts; compare the vectors of \.embed"):
        encoder.relevance("a", ["b"])


def test_the_real_model_embeds_as_transformers_does(model_path: Callable[[str], Path]) -> None:
    path = model_path("minilm")
    texts = ["Where is my parcel?", "My package has not arrived yet.", "Zinsen für Kredite 利率", "cat " * 200]
    model, tokenizer = AutoModel.from_pretrained(path).eval(), tokenizer_of(path)
    with torch.no_grad():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    wanted = torch.nn.functional.normalize(torch.stack(means), dim=1).numpy()
    exact, fast = (millis.Encoder(path, precision=precision, threads=2).embed(texts) for precision in ("exact", "fast"))
    assert exact.shape == (4, 384) and exact.dtype == np.float32
    np.testing.assert_allclose(exact, wanted, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(fast, axis=1), 1, atol=1e-6)
    assert (fast * wanted).sum(axis=1).min() > 0.999
    assert fast[0] @ fast[1] > fast[0] @ fast[2] + 0.3


def test_with_a_deadline_answers_are_the_same_and_timings_say_how_it_was_kept(encoder: millis.Encoder) -> None:
    np.testing.assert_allclose(encoder.embed(TEXTS, deadline_ms=60_000), encoder.embed(TEXTS), atol=1e-6)
    plain, found = encoder.classify(TEXTS), encoder.classify(TEXTS, deadline_ms=60_000)
    for one, other in zip(plain, found, strict=True):
        assert one.label == other.label and one.scores == pytest.approx(other.scores, abs=1e-6)
        assert one.timings.deadline_ms is None and other.timings.deadline_ms == 60_000
        assert other.timings.slack_ms == pytest.approx(60_000 - other.timings.total_ms)
    assert encoder.classify(TEXTS[0], deadline_ms=60_000).label == plain[0].label


def test_deadlines_that_cannot_be_kept_or_are_none(encoder: millis.Encoder) -> None:
    for call in (encoder.embed, encoder.classify):
        with pytest.raises(DeadlineError, match="would take") as found:
            call(TEXTS, deadline_ms=1e-3)
        assert found.value.predicted_ms > 1e-3 and found.value.retry_after_s > 0
        for wrong in ("x", 0, True, float("nan")):
            with pytest.raises(RequestError, match="deadline_ms must be"):
                call(TEXTS, deadline_ms=wrong)  # type: ignore[operator]
    with pytest.raises(RequestError, match="deadline_ms must be"):
        encoder.prepare_deadlines(-1)


def test_long_texts_are_refused_or_cut(folder: Path, encoder: millis.Encoder) -> None:
    long = "card " * 100
    for call in (encoder.embed, encoder.logits, encoder.classify):
        with pytest.raises(RequestError, match=f"text 1 has 102 tokens; the context holds {CONTEXT}: cut it"):
            call(["a", long])
    ids = tokenizer_of(folder)(long, truncation=True, max_length=CONTEXT)["input_ids"]
    wanted = encoder.runner.logits([ids])
    np.testing.assert_allclose(encoder.logits([long], truncate=True), wanted, atol=1e-6)


def test_special_tokens_in_a_text_are_text(encoder: millis.Encoder) -> None:
    ids = encoder.tokenizer.encode("a [SEP] b")
    assert ids.count(3) == 1 and ids[0] == 2 and ids[-1] == 3


@pytest.mark.parametrize(
    ("texts", "fault"),
    [([], "no text"), ("a", "must be a list"), ([" "], "text 0 is empty"), (["a", 3], "text 1 must be a str")],
)
def test_what_is_no_list_of_texts(texts: Any, fault: str, encoder: millis.Encoder) -> None:
    with pytest.raises(RequestError, match=fault):
        encoder.embed(texts)


@pytest.mark.parametrize("top", [0, -1, True, 1.5])
def test_tops_that_make_no_sense(top: Any, encoder: millis.Encoder) -> None:
    with pytest.raises(RequestError, match="top must be a whole number"):
        encoder.classify("card", top=top)


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "chat_stream", "score"])
def test_an_encoder_writes_nothing(method: str, encoder: millis.Encoder) -> None:
    assert hasattr(millis.LanguageModel, method)
    with pytest.raises(RequestError, match="is an encoder, which writes no text"):
        getattr(encoder, method)("card", max_tokens=3)


def test_a_model_without_a_head_says_so(tmp_path: Path) -> None:
    encoder = millis.Encoder(save(tiny("bert", head=False), tmp_path))
    assert encoder.labels == () and encoder.embed(["card"]).shape == (1, 64)
    for call in (encoder.classify, encoder.logits):
        with pytest.raises(RequestError, match="not trained to classify"):
            call(["card"])


def test_the_wrong_class_and_wrong_options_are_named(folder: Path, model_path: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="is an encoder, which writes no text"):
        millis.LanguageModel(folder)
    with pytest.raises(ModelError, match="is no encoder"):
        millis.Encoder(model_path("smollm2"))
    with pytest.raises(RequestError, match="has no option 'speculation'; it has threads"):
        millis.load(folder, speculation="off")
    with pytest.raises(RequestError, match="no instruction set"):
        millis.load(folder, isa="z80")


def test_threads_may_share_an_encoder(encoder: millis.Encoder) -> None:
    wanted = encoder.embed(TEXTS)
    found: list[np.ndarray] = []

    def work() -> None:
        found.extend(encoder.embed(TEXTS) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80 and all(np.array_equal(one, wanted) for one in found)
