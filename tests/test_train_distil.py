"""millis distil on tiny models: the loss against closed forms, students of every kind, drafts in the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

import millis
from millis.models.gguf import read_gguf
from millis.models.transformers_model import transformers_model
from millis.train.base import keep_layers
from millis.train.distil import layer_kinds, soft_loss, spread
from millis.train.gguf_out import write_gguf
from millis.train.start import settings_of, train
from millis.types import RequestError
from training import bert_folder, chat_gguf, command, jsonl, loaded, spm_gguf

TEXT = "the hello hell of wells. hello hello. " * 20


def run(data: Path, out: Path, teacher: Path, student: str, **given: Any) -> dict[str, Any]:
    fixed = {"model": str(teacher), "student": student, "bf16": False, "max_tokens": 32, "batch": 4}
    return train(settings_of("distil", [data], [data], fixed | given), out, Path)


def test_with_all_tokens_the_loss_is_the_kl_divergence() -> None:
    torch.manual_seed(0)
    got, wanted = torch.randn(5, 20), torch.randn(5, 20)
    for temperature in (1.0, 2.5):
        p, q = (torch.softmax(x / temperature, -1) for x in (wanted, got))
        divergence = (p * (p / q).log()).sum(-1).mean() * temperature**2
        assert soft_loss(got, wanted, 20, temperature).item() == pytest.approx(divergence.item(), rel=1e-4)
    p, q = torch.softmax(wanted, -1), torch.softmax(got, -1)
    best = wanted.argmax(-1, keepdim=True)
    p, q = p.gather(-1, best), q.gather(-1, best)  # one token against all others
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert soft_loss(got, wanted, 1, 1.0).item() == pytest.approx(divergence.item(), rel=1e-4)
    assert soft_loss(wanted, wanted, 4, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_a_student_of_the_teachers_layers(tmp_path: Path) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf"), tmp_path / "text.txt"
    data.write_text(TEXT)
    report = run(data, tmp_path / "out", teacher, "layers=1", steps=30, lr=5e-3)
    quality = report["quality"]
    model = loaded(tmp_path / "out", AutoModelForCausalLM)
    assert model.config.num_hidden_layers == 1
    assert quality["agreement"] > 0.5  # of 266 tokens
    ids = torch.tensor([[72, 101, 259, 80, 10, 4]])
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(m(ids).logits, -1) for m in (model, transformers_model(read_gguf(teacher))))
    assert torch.isfinite(ours).all() and (ours.exp() - theirs.exp()).abs().sum(-1).mean() < 1
    write_gguf(tmp_path / "out", tmp_path / "m.gguf", "F16", teacher)
    pair = millis.load(teacher, draft=tmp_path / "m.gguf", threads=1)
    assert pair.generate([72, 101, 259, 80], max_tokens=8, ignore_eos=True).timings.completion_tokens == 8


def test_layers_keep_their_kinds_of_attention() -> None:
    gemma = (["window"] * 5 + ["full"]) * 3
    for wanted in range(1, 19):
        chosen = spread(gemma, wanted)
        assert [gemma[n] for n in chosen] == gemma[:wanted] and len(set(chosen)) == wanted
    assert spread(gemma, 6) == [0, 3, 7, 10, 14, 17]
    assert spread(["full"] * 12, 5) == [0, 3, 6, 8, 11]


def test_layers_of_smollm3_stay_rotated_or_not() -> None:
    config = SmolLM3Config(num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0] * 2)
    assert spread(layer_kinds(config, 8), 4) == [0, 2, 5, 7]
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 8, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(SmolLM3Config(**config.to_dict() | sizes))
    keep_layers(model, [1, 3, 4])
    assert model.config.no_rope_layers == [1, 0, 1] == [layer.self_attn.use_rope for layer in model.model.layers]


def test_a_student_of_gemmas_layers(tmp_path: Path) -> None:
    """Its teacher's tokenizer is SentencePiece's, and its layers are those that a GGUF file can say."""
    teacher, data = spm_gguf(tmp_path / "t.gguf"), tmp_path / "text.txt"
    data.write_text("abc ab bc é 中 z " * 40)
    run(data, tmp_path / "out", teacher, "layers=1", steps=2)
    write_gguf(tmp_path / "out", tmp_path / "m.gguf", "F16", teacher)
    student = millis.load(tmp_path / "m.gguf", threads=1)
    assert student.tokenizer.encode("abc") == millis.load(tmp_path / "out", threads=1).tokenizer.encode("abc")
    assert student.generate("abc", max_tokens=4, ignore_eos=True).timings.completion_tokens == 4


def test_a_new_student_with_the_teachers_vocabulary(tmp_path: Path) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf"), tmp_path / "text.txt"
    data.write_text(TEXT)
    report = run(data, tmp_path / "out", teacher, "llama:90k", steps=30, lr=5e-3, hard=0.2)
    model = loaded(tmp_path / "out", AutoModelForCausalLM)
    assert model.config.vocab_size == 266
    assert report["quality"]["perplexity"] < report["quality"]["perplexity_before"]
    with pytest.raises(RequestError, match="the teacher has 2 layers"):
        run(data, tmp_path / "other", teacher, "layers=3", steps=1)


def test_another_vocabulary_is_refused_or_taught_by_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf"), tmp_path / "text.txt"
    data.write_text(TEXT)
    given = {"shape": "llama", "parameters": 90_000, "vocab": 280, "max_tokens": 64, "steps": 1, "bf16": False}
    train(settings_of("lm", [data], [], given), tmp_path / "student", Path)
    arguments = ["--teacher", teacher, "--student", tmp_path / "student", "--out", tmp_path / "out"]
    assert command("distil", data, *arguments) == 1
    assert "different vocabularies; give --write 128" in capsys.readouterr().err
    assert command("distil", data, *arguments, "--draft-for", teacher, "--write", "8") == 1
    assert "a draft model shares the vocabulary" in capsys.readouterr().err
    assert command("distil", data, *arguments, "--write", "8", "--steps", "2", "--threads", "1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    written = [json.loads(line)["text"] for line in next(tmp_path.glob("out.written-*.jsonl")).read_text().splitlines()]
    assert report["steps"] == 2 and written and all(text for text in written)
    assert report["served"]["student_ms_a_token"] > 0 and (tmp_path / "out" / "model.gguf").exists()


def test_texts_too_short_to_go_on_from_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf"), tmp_path / "text.txt"
    data.write_text("short")
    arguments = ["--teacher", teacher, "--student", "layers=1", "--out", tmp_path / "new" / "out", "--threads", "1"]
    assert command("distil", data, *arguments, "--write", "8") == 1
    assert "no text has 32 tokens for the teacher to go on from; give longer ones" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("write", ["0", "8"])
def test_texts_in_a_column_of_another_name(write: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf"), jsonl(tmp_path / "a.jsonl", [{"body": TEXT}])
    arguments = ["--student", "layers=1", "--out", tmp_path / "out", "--max-tokens", "64", "--steps", "1", "--json"]
    arguments += ["--text-column", "body", "--write", write, "--threads", "1"]
    assert command("distil", data, "--teacher", teacher, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["served"]["teacher_ms_a_token"] > 0


def test_a_teacher_of_short_texts_is_measured_on_short_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf", context=32), tmp_path / "text.txt"
    data.write_text(TEXT)
    arguments = ["--student", "layers=1", "--out", tmp_path / "out", "--max-tokens", "32", "--steps", "1"]
    assert command("distil", data, "--teacher", teacher, *arguments, "--threads", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["served"]["teacher_ms_a_token"] > 0


@pytest.mark.parametrize(
    ("student", "code", "why"),
    [
        ("layers=x", 2, "say how many of the teacher's layers, as layers=10"),
        ("llama:many", 2, "'many' is no number of parameters"),
        ("none", 1, "--student: no model named 'none'"),
        ("none", 1, "and layers=10 of the teacher's, or llama:15M for a new one"),
    ],
)
def test_a_student_that_is_none_is_told_with_what_there_is(
    student: str, code: int, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = chat_gguf(tmp_path / "t.gguf"), tmp_path / "text.txt"
    data.write_text(TEXT)
    assert command("distil", data, "--teacher", teacher, "--student", student, "--out", tmp_path / "out") == code
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_encoder_teaches_no_writing(tmp_path: Path) -> None:
    teacher, data = bert_folder(tmp_path / "bert"), tmp_path / "text.txt"
    data.write_text(TEXT)
    for student in ("layers=1", "llama:90k"):
        with pytest.raises(RequestError, match="bert is an encoder, which writes no text"):
            run(data, tmp_path / student.replace(":", "="), teacher, student, steps=1)
