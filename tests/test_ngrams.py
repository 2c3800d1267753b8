"""N-grams beside a classifier's head: what they compute, how they are learned, written and read, and hostile files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import ElectraConfig, ElectraModel

import millis
from encoders import CONTEXT, LABELS, VOCAB, save, tiny
from millis.models.ngrams import FILE, TOKENS, Ngrams, as_tensors, ngrams_of, read_ngrams
from millis.train import ngrams as learn
from millis.types import FormatError, RequestError
from serving import Server
from test_train_classify import run
from training import WORDS, bert_folder, chat_gguf, jsonl, labelled_csv

RNG = np.random.default_rng(3)


def some(labels: int = 4) -> Ngrams:
    keys = ngrams_of([5, 7, 5, 9])
    return Ngrams(
        keys,
        RNG.uniform(1, 5, len(keys)).astype(np.float32),
        RNG.normal(0, 2, (len(keys), labels)).astype(np.float32),
        RNG.normal(0, 1, labels).astype(np.float32),
    )


def test_a_text_is_its_tokens_and_pairs_each_once() -> None:
    assert ngrams_of([5, 7, 5, 7]).tolist() == [5, 7, 6 << 32 | 7, 8 << 32 | 5]
    assert ngrams_of([3]).tolist() == [3]
    assert len(ngrams_of(list(range(2 * TOKENS)))) == 2 * TOKENS - 1  # of the first TOKENS


def test_logits_are_a_sum_over_what_is_known_at_unit_length() -> None:
    one = some()
    number = {key: i for i, key in enumerate(one.keys.tolist())}
    rows = [number[5], number[9], number[6 << 32 | 9]]  # 5, 9 and the pair; 11 and its pair are unknown
    length = math.sqrt(sum(float(one.idf[i]) ** 2 for i in rows))
    wanted = one.bias + sum(one.idf[i] / length * one.weights[i] for i in rows)
    np.testing.assert_allclose(one.logits([5, 9, 11]), wanted, rtol=1e-5)
    np.testing.assert_array_equal(one.logits([50, 51]), one.bias)


def test_what_is_learned_tells_labels_apart_by_order_too() -> None:
    """The labels' words are the same; only who comes first differs."""
    texts = [
        [int(RNG.integers(20, 60)), *pair, int(RNG.integers(20, 60))] for _ in range(60) for pair in ((5, 6), (6, 5))
    ]
    labels = [0, 1] * 60
    one = learn.fit(texts, labels, 2)
    assert [int(one.logits([30, a, b, 41]).argmax()) for a, b in ((5, 6), (6, 5))] == [0, 1]
    assert (np.diff(one.keys) > 0).all() and (one.idf >= 1).all()
    assert 6 << 32 | 6 in one.keys and 61 not in one.keys


def test_few_texts_and_many_labels() -> None:
    one = learn.fit([[5, 6], [7, 8], [9]], [0, 1, 2], 3)  # every n-gram in one text only
    assert [int(one.logits(ids).argmax()) for ids in ([5, 6], [7, 8], [9])] == [0, 1, 2]


def test_of_very_many_texts_some_and_of_very_many_ngrams_the_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[5, 6, 20 + i] if i % 2 else [7, 8, 60 + i] for i in range(40)]
    labels = [i % 2 for i in range(40)]
    monkeypatch.setattr(learn, "MOST_WEIGHTS", 12)
    one = learn.fit(texts, labels, 2)
    assert sorted(one.keys.tolist()) == [5, 6, 7, 8, 6 << 32 | 6, 8 << 32 | 8]
    monkeypatch.setattr(learn, "MOST_TEXTS", 8)  # every fifth: both labels are among them
    few = learn.fit(texts, labels, 2)
    assert [int(few.logits(ids).argmax()) for ids in ([7, 8], [5, 6])] == [0, 1]
    assert few.idf.max() < one.idf.max()


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    one = some()
    learn.write(one, tmp_path)
    again = read_ngrams(tmp_path, VOCAB, 4)
    assert again is not None
    for name in ("keys", "idf", "weights", "bias"):
        np.testing.assert_array_equal(getattr(again, name), getattr(one, name))
    assert read_ngrams(tmp_path / "nothing", VOCAB, 4) is None


def with_value(name: str, value: Any, at: Any = 0) -> dict[str, np.ndarray]:
    tensors = {key: array.copy() for key, array in as_tensors(some()).items()}
    tensors[name][at] = value
    return tensors


FAULTS = {
    "no bias": ({k: v for k, v in as_tensors(some()).items() if k != "bias"}, "must hold bias, idf, ngrams, weights"),
    "another": (as_tensors(some()) | {"x": np.zeros(1, np.float32)}, "must hold bias, idf"),
    "half": (as_tensors(some()) | {"idf": np.ones(5, np.float16)}, "idf is F16"),
    "labels": (as_tensors(some(3)), r"a model of 4 labels has F32 \(4,\)"),
    "none": (
        as_tensors(some()) | {"ngrams": np.zeros((0, 2), np.float32), "idf": np.zeros(0, np.float32)},
        "a table of two columns and a row or more",
    ),
    "not finite": (with_value("weights", np.nan), "not finite"),
    "idf": (with_value("idf", 0), "an idf not above 0"),
    "vocabulary": (with_value("ngrams", VOCAB, (-1, 1)), "outside the vocabulary of 120"),
    "negative": (with_value("ngrams", -2, (0, 0)), "outside the vocabulary"),
    "no whole": (with_value("ngrams", 6.5, (0, 1)), "outside the vocabulary"),
    "order": (with_value("ngrams", (-1, 100), 0), "not in order"),
    "flat": (as_tensors(some()) | {"ngrams": np.zeros(10, np.float32)}, "a table of two columns"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_file_is_refused(fault: str, tmp_path: Path) -> None:
    tensors, message = FAULTS[fault]
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, tmp_path / FILE)
    with pytest.raises(FormatError, match=message):
        read_ngrams(tmp_path, VOCAB, 4)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    learn.write(some(), tmp_path)
    data = (tmp_path / FILE).read_bytes()
    for length in (0, 7, 40, len(data) - 1):
        (tmp_path / FILE).write_bytes(data[:length])
        with pytest.raises(FormatError, match=FILE):
            read_ngrams(tmp_path, VOCAB, 4)


def test_an_encoder_adds_them_and_reads_on_where_its_network_ends(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "intents")
    plain = millis.Encoder(folder, precision="exact", threads=1)
    one = some()
    learn.write(one, folder)
    encoder = millis.Encoder(folder, precision="exact", threads=1)
    texts = ["where is my parcel", "card " * 40, "loan"]
    ids = [plain.tokenizer.encode(text) for text in texts]
    np.testing.assert_allclose(encoder.logits(texts), plain.logits(texts) + [one.logits(i) for i in ids], atol=1e-5)
    long = "loan " * 100 + "5"
    ids = plain.tokenizer.encode(long)
    wanted = plain.logits([long], truncate=True)[0] + one.logits(ids)
    np.testing.assert_allclose(encoder.logits([long])[0], wanted, atol=1e-5)  # within TOKENS: nothing is left out
    assert encoder.classify(long).label == LABELS[int(wanted.argmax())]
    with pytest.raises(RequestError, match=f"the context holds {CONTEXT}"):
        encoder.embed([long])
    with pytest.raises(RequestError, match=f"the context holds {TOKENS}"):
        encoder.classify("loan " * TOKENS)
    with Server(folder, "--precision", "exact", "--threads", "1") as server:
        body = server.json("/v1/classify", {"model": "m", "input": [long, texts[0]], "deadline_ms": 5000})[1]
        want = encoder.classify([long, texts[0]])
        for found, right in zip(body["data"], want, strict=True):
            assert found["label"] == right.label
            assert max(found["probs"]) == pytest.approx(max(right.scores.values()), abs=1e-5)


def test_training_learns_them_from_what_the_network_does_not_read(tmp_path: Path) -> None:
    """What tells the labels apart stands behind the eight tokens of a sample."""
    rows = [(f"the is and we like today with very {word} {word}", label) for label in WORDS for word in WORDS[label]]
    data = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows] * 4)
    given = {"steps": 4, "batch": 8, "max_tokens": 8, "held": [data]}
    report = run("classify", data, tmp_path / "out", bert_folder(tmp_path / "base"), ngrams=True, **given)
    assert report["quality"]["accuracy"] == 1.0 and report["quality"]["without_ngrams"] < 0.8
    assert "n-grams" in report["written"][1] and (tmp_path / "out" / FILE).is_file()
    encoder = millis.Encoder(tmp_path / "out", threads=1)
    assert all(encoder.classify(text).label == label for text, label in rows)
    # Trained again without, nothing of them stays.
    run("classify", data, tmp_path / "out", tmp_path / "base", resume=False, ngrams=False, **given)
    assert not (tmp_path / "out" / FILE).exists()


def test_they_go_with_models_that_millis_runs(tmp_path: Path) -> None:
    data = labelled_csv(tmp_path / "train.csv", 24)
    base = bert_folder(tmp_path / "base")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "embedding_size": 32}
    ElectraModel(ElectraConfig(vocab_size=22, num_hidden_layers=1, **sizes)).save_pretrained(base)
    with pytest.raises(RequestError, match="--ngrams goes with a model that Millis runs, not with one of the type ele"):
        run("classify", data, tmp_path / "out", base, ngrams=True, steps=1)
    written = run("classify", data, tmp_path / "plain", base, steps=1, batch=8)["written"]
    assert written == ["Hugging Face folder, for transformers: Millis runs no electra models"]
    with pytest.raises(RequestError, match="ngrams has no meaning for --task lm"):
        run("lm", data, tmp_path / "other", chat_gguf(tmp_path / "n.gguf"), ngrams=True, steps=1)


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    learn.write(some(), tmp_path)
    assert load_file(tmp_path / FILE)["ngrams"][0].tolist() == [-1.0, 5.0]
