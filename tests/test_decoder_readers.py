"""Decoders that read, against transformers: folders, vectors, labels, long texts, refusals, hostile folders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import millis
from encoders import BODIES, CONTEXT, DECODERS, LABELS, decoder, hidden, logits, random_ids, save
from millis.config import EngineConfig
from millis.engine.decoder_reader import DecoderReader
from millis.models.load import is_encoder, load_model
from millis.types import FormatError, ModelError, RequestError
from shell import error_line
from shell import millis as shell

LENGTHS = (3, 1, 17, 40, CONTEXT, 16, 5)
TEXTS = ["Where is my parcel?", "Please help, my new card is lost.", "LOAN", "a b c d"]


def reader(folder: Path, **options: Any) -> DecoderReader:
    return DecoderReader(load_model(folder), EngineConfig(**{"threads": 2, "precision": "exact", **options}))


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def pool(folder: Path, mode: str) -> None:
    """As sentence-transformers says how vectors are made."""
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "pool"}]))
    (folder / "pool").mkdir(exist_ok=True)
    (folder / "pool" / "config.json").write_text(json.dumps({mode: True}))


@pytest.mark.parametrize("stem", DECODERS)
@pytest.mark.parametrize("step", [16, 512])  # tokens: longer texts run in pieces
def test_labels_are_told_from_the_last_token_as_transformers_does(stem: str, step: int, tmp_path: Path) -> None:
    model = decoder(stem)
    folder, texts = save(model, tmp_path), [random_ids(length) for length in LENGTHS]
    assert is_encoder(folder)
    ours = reader(folder, max_batch_tokens=step)
    wanted = np.stack([logits(model, ids) for ids in texts])
    np.testing.assert_allclose(ours.logits(texts), wanted, atol=2e-5)
    np.testing.assert_allclose(ours.embeddings(texts)[3], hidden(model, texts[3]).mean(0), atol=2e-5)
    for precision in ("fast", "int8"):
        near = reader(folder, max_batch_tokens=step, precision=precision).logits(texts)
        assert 1e-6 < np.linalg.norm(near - wanted) / np.linalg.norm(wanted) < 0.1


@pytest.mark.parametrize("stem", [*DECODERS, *BODIES])
def test_vectors_of_a_body_alone_are_the_mean_or_what_its_files_say(stem: str, tmp_path: Path) -> None:
    model = decoder(stem, head=False)
    folder, texts = save(model, tmp_path), [random_ids(length) for length in LENGTHS]
    states = [hidden(model, ids) for ids in texts]
    for step in (16, 512):
        found = reader(folder, max_batch_tokens=step).embeddings(texts)
        np.testing.assert_allclose(found, [state.mean(0) for state in states], atol=2e-5)
    pool(folder, "pooling_mode_lasttoken")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    ours = reader(folder, max_batch_tokens=16)
    assert ours.context == 48
    found = ours.embeddings([ids for ids in texts if len(ids) <= 48])
    np.testing.assert_allclose(found, [state[-1] for state in states if len(state) <= 48], atol=2e-5)
    pool(folder, "pooling_mode_cls_token")
    with pytest.raises(FormatError, match="cls_token is not one of pooling_mode_mean_tokens, pooling_mode_lasttoken"):
        load_model(folder)


def test_an_encoder_as_python_programs_use_it(tmp_path: Path) -> None:
    folder = save(decoder("Llama"), tmp_path)
    encoder = millis.load(folder, threads=2, precision="exact")
    assert isinstance(encoder, millis.Encoder) and encoder.labels == tuple(LABELS.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():  # padded to one length, as a batch is
        wanted = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(encoder.logits(TEXTS), wanted.numpy(), atol=2e-5)
    for found, row in zip(encoder.classify(TEXTS), wanted.softmax(1), strict=True):
        assert found.scores == pytest.approx({label: float(row[i]) for i, label in LABELS.items()}, abs=1e-5)
    with pytest.raises(RequestError, match=f"the context holds {CONTEXT}: cut it"):
        encoder.classify("card " * 100)
    assert encoder.classify("card " * 100, truncate=True).timings.prompt_tokens == CONTEXT


def test_threads_take_turns(tmp_path: Path) -> None:
    """All use the same pages, a long text in several steps."""
    ours = reader(save(decoder("Llama"), tmp_path), max_batch_tokens=16)
    texts = [random_ids(CONTEXT, seed) for seed in range(4)]
    wanted, found = [ours.logits([ids])[0] for ids in texts], {}

    def work(number: int) -> None:
        found[number] = [ours.logits([texts[number]])[0] for _ in range(20)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(row, wanted[number]) for number, rows in found.items() for row in rows)


def test_it_writes_nothing_and_no_command_takes_it_for_a_model_that_does(
    tmp_path: Path, model_path: Callable[[str], Path]
) -> None:
    folder = save(decoder("Llama", head=False), tmp_path / "body")
    with pytest.raises(ModelError, match="is an encoder, which writes no text"):
        millis.LanguageModel(folder)
    with pytest.raises(ModelError, match="reads texts and writes none, so it cannot draft"):
        millis.LanguageModel(model_path("smollm2"), threads=1, draft=folder)
    done = shell("quantize", folder, tmp_path / "out.gguf", "--type", "q8_0")
    assert "reads texts and writes none, which Millis does not write as GGUF" in error_line(done)
    ours = reader(folder)
    with pytest.raises(ValueError, match="has no head"):
        ours.logits([[1]])
    with pytest.raises(ValueError, match="no kinds of tokens"):
        ours.embeddings([[1]], [[0]])
    with pytest.raises(ValueError, match="out of the vocabulary"):
        ours.embeddings([[10**6]])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "'cls.output.weight' is 4 × 64; its configuration asks 2 × 64"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0 to 1"),
        ({"id2label": None, "num_labels": 1 << 40}, "a head must tell 1 to 65536 labels apart"),
        ({"id2label": {}}, "a head must tell 1 to 65536 labels apart, not 0"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is not one of"),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, "'score.weight' has no place"),
        ({"architectures": ["LlamaModel"]}, "'score.weight' has no place"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "'score.weight' has no place"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = save(decoder("Llama"), tmp_path)
    change(folder, **changes)
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


def test_a_head_that_is_missing_or_has_a_bias(tmp_path: Path) -> None:
    folder = save(decoder("Llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.bias": np.zeros(4, np.float32)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"'score.bias' has no place in a llama model"):
        load_model(folder)
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"'cls.output.weight' is missing"):
        load_model(folder)
