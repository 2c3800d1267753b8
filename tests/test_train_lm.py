"""millis train --task lm and chat on tiny models: targets, losses, adapters and files against transformers and peft."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import millis
from millis.models.gguf import read_gguf
from millis.models.transformers_model import transformers_model
from millis.samples.read import Row, Skipped
from millis.tasks.translate import translate
from millis.tokenizer import Tokenizer
from millis.tokenizer.to_folder import write_tokenizer
from millis.train.base import Base
from millis.train.chat import chat_tokens, messages_of, prepare
from millis.train.gguf_out import write_gguf
from millis.train.lm import IGNORED, Tokens, packed, split_texts
from millis.train.start import settings_of, train
from millis.types import Completion, RequestError, Timings
from reference import greedy
from tokenizer_lines import lines
from training import bert_folder, chat_gguf, jsonl, loaded, spm_gguf

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hell"},
    {"role": "user", "content": "why <|im_end|>"},
    {"role": "assistant", "content": "he he"},
]
TEXT = "the hello hell of wells. hello hello. " * 40


def run(task: str, data: Path, out: Path, model: Path | None, **given: Any) -> dict[str, Any]:
    held = given.pop("held", [])
    named = {} if model is None else {"model": str(model)}
    settings = settings_of(task, [data], held, named | {"bf16": False} | given)
    return train(settings, out, Path)


def test_packed_sequences_hold_every_prediction_once() -> None:
    found = packed([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]], 4)
    assert [s.ids for s in found] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert [s.targets for s in found] == [[2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert packed([[7]], 4) == []


def test_only_what_the_assistant_says_is_learned(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(read_gguf(chat_gguf(tmp_path / "m.gguf")).metadata)
    sample = chat_tokens(tokenizer, TALK)
    learned = [t for t in sample.targets if t != IGNORED]
    assert tokenizer.decode(learned, skip_special=False) == "hell<|im_end|>he he<|im_end|>"
    whole = tokenizer.decode(sample.ids, skip_special=False)
    assert whole.startswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    at = [i for i, t in enumerate(sample.targets) if t != IGNORED]
    assert all(sample.ids[i + 1] == sample.targets[i] for i in at if i + 1 < len(sample.ids))
    with pytest.raises(RequestError, match="no message of the assistant"):
        chat_tokens(tokenizer, TALK[:1])


@pytest.mark.parametrize("architecture", ["qwen2", "granite", "gemma", "exaone4", "hunyuan-dense", "olmo2", "lfm2"])
def test_the_loss_is_transformers_own(architecture: str, tmp_path: Path) -> None:
    path = chat_gguf(tmp_path / "m.gguf", architecture)
    data = jsonl(tmp_path / "talk.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    job = prepare(
        Base.open("m", path), settings_of("chat", [data], [], {"model": "m", "bf16": False}), Skipped(), [data], []
    )
    model = transformers_model(read_gguf(path))
    total = 0.0
    for talk in (TALK, TALK[:2]):
        sample = chat_tokens(Tokenizer.from_gguf(read_gguf(path).metadata), talk)
        labels = torch.tensor([[IGNORED, *sample.targets]])
        ids = torch.tensor([[*sample.ids, 0]])
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * sample.counted
    want = total / sum(job.weight([i]) for i in (0, 1))
    with torch.no_grad():
        assert job.loss([0, 1]).item() == pytest.approx(want, rel=1e-4)


def test_a_gguf_models_tokenizer_as_a_folder(tmp_path: Path) -> None:
    metadata = read_gguf(chat_gguf(tmp_path / "m.gguf")).metadata
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tokenizer(metadata, folder)
    ours, again, theirs = (
        Tokenizer.from_gguf(metadata),
        Tokenizer.from_folder(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for line in lines()[:400]:
        ids = ours.encode(line)
        assert again.encode(line) == ids
        plain = "<" not in line  # transformers reads special tokens in texts
        assert not plain or theirs(line).input_ids == ids
    assert again.encode_chat(TALK) == ours.encode_chat(TALK)
    assert theirs.apply_chat_template(TALK[:1], add_generation_prompt=True).input_ids == ours.encode_chat(TALK[:1])
    assert again.eos == ours.eos and theirs.eos_token_id in ours.eos


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_gguf_model_with_a_sentencepiece_tokenizer(finetune: str, tmp_path: Path) -> None:
    """Its folder, and a GGUF file made of that alone, give texts their ids and go on as the trained model does."""
    path, out, data = spm_gguf(tmp_path / "m.gguf"), tmp_path / "out", tmp_path / "text.txt"
    data.write_text("abc ab bc é 中 z " * 40)
    run("lm", data, out, path, steps=2, batch=2, max_tokens=32, lr=1e-2, finetune=finetune)
    model, ids = loaded(out, AutoModelForCausalLM), millis.load(path).tokenizer.encode("abc zé")
    assert AutoTokenizer.from_pretrained(out)("abc zé").input_ids == ids
    expected, _ = greedy(model, ids, 6)
    write_gguf(out, tmp_path / "own.gguf", "F16")
    for source in (out, tmp_path / "own.gguf"):
        lm = millis.load(source, threads=1, precision="exact")
        assert lm.tokenizer.encode("abc zé") == ids
        assert lm.generate("abc zé", max_tokens=6, ignore_eos=True).tokens == expected


def test_an_adapter_is_read_by_peft_and_is_what_was_merged(tmp_path: Path) -> None:
    path, out = chat_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    data = jsonl(tmp_path / "talk.jsonl", [{"prompt": "hello", "response": "hell"}] * 8)
    report = run("chat", data, out, path, held=[data], steps=6, batch=4, lr=1e-2, finetune="lora", rank=4)
    assert report["quality"]["perplexity"] < report["quality"]["perplexity_before"]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"], config["base_model_name_or_path"]) == (4, "LORA", str(path))
    ids = torch.tensor([[72, 5, 80, 260]])
    base = transformers_model(read_gguf(path))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own, of transformers' next version
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        merged = loaded(out, AutoModelForCausalLM)(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert (plain - merged).abs().max() > 1e-2


def test_all_weights_and_a_gguf_file_of_them(tmp_path: Path) -> None:
    """The file of the trained model holds the folder's values, and Millis says with it what transformers says."""
    path, out = chat_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    report = run("lm", data, out, path, held=[data], steps=8, batch=2, max_tokens=64, lr=3e-3)
    assert report["quality"]["perplexity"] < 0.8 * report["quality"]["perplexity_before"]
    assert 0 < report["utilisation"] < 1
    model = loaded(out, AutoModelForCausalLM)
    for type, tolerance in (("F16", 1e-3), ("Q8_0", 1e-2)):
        write_gguf(out, tmp_path / f"{type}.gguf", type, path)
        checkpoint = read_gguf(tmp_path / f"{type}.gguf")
        again = transformers_model(checkpoint).state_dict()
        for name, values in model.state_dict().items():
            np.testing.assert_allclose(again[name].numpy(), values.numpy(), atol=tolerance)
        assert Tokenizer.from_gguf(checkpoint.metadata).encode_chat(TALK)
    ids = [72, 101, 259, 80]
    tokens, _ = greedy(transformers_model(read_gguf(tmp_path / "F16.gguf")), ids, 12)
    lm = millis.load(tmp_path / "F16.gguf", threads=1, precision="exact")
    assert lm.generate(ids, max_tokens=12, ignore_eos=True).tokens == tokens


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_from_nothing(shape: str, tmp_path: Path) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "out"
    data.write_text(TEXT)
    given = {"shape": shape, "parameters": 90_000, "vocab": 300, "max_tokens": 64, "batch": 4, "epochs": 6.0}
    report = run("lm", data, out, None, eval_split=0.2, lr=1e-2, **given)
    assert report["quality"]["perplexity"] < 20  # of 300 tokens; chance has 300
    model = loaded(out, AutoModelForCausalLM)
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[shape]
    ids = AutoTokenizer.from_pretrained(out)("the hello").input_ids
    write_gguf(out, tmp_path / "m.gguf", "F16")
    tokens, _ = greedy(transformers_model(read_gguf(tmp_path / "m.gguf")) if shape == "llama" else model, ids, 12)
    for path in (out, tmp_path / "m.gguf"):
        lm = millis.load(path, threads=1, precision="exact")
        assert lm.tokenizer.encode("the hello") == ids
        assert lm.generate(ids, max_tokens=12, ignore_eos=True).tokens == tokens


def test_rows_that_cannot_be_learned_are_skipped(tmp_path: Path) -> None:
    path, out = chat_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    rows: list[Any] = [{"prompt": "hello", "response": "hell"}] * 4
    rows += [
        {"prompt": "hello"},
        {"messages": [{"role": "user", "content": 5}]},
        {"prompt": "a", "response": "b" * 999},
    ]
    report = run("chat", jsonl(tmp_path / "talk.jsonl", rows), out, path, steps=1, max_tokens=100)
    reasons = [json.loads(line) for line in (out / "train" / "skipped.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"].partition(":")[0]) for r in reasons] == [
        (5, "no conversation"),
        (6, "malformed"),
        (7, "too long"),
    ]
    assert report["steps"] == 1 and math.isfinite(report["loss"])


def test_pairs_are_asked_as_translation_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very prompts that `translate` puts to a model, both ways."""
    asked: list[str] = []

    def ask(lm: Any, prompts: list[str], **options: Any) -> list[Any]:
        asked.extend(prompts)
        return [Completion(text="x", tokens=[], finish_reason="stop", timings=Timings()) for _ in prompts]

    monkeypatch.setattr("millis.tasks.translate.ask", ask)
    lm = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, add_special: [1]))
    for source, target, to in (("你好。", "Hello.", "en"), ("Thank you {text}", "谢谢", "zh")):
        translate(lm, source, to)
        messages = messages_of(Row(Path("a.jsonl"), 1, {"source": source, "target": f" {target}\n"}))
        wanted = [{"role": "user", "content": asked[-1]}, {"role": "assistant", "content": target}]
        assert messages == wanted


def test_a_model_without_template_has_no_chat(tmp_path: Path) -> None:
    run_out = tmp_path / "text.txt"
    run_out.write_text(TEXT)
    given = {"shape": "llama", "parameters": 90_000, "vocab": 300, "max_tokens": 64, "steps": 1}
    run("lm", run_out, tmp_path / "base", None, **given)
    data = jsonl(tmp_path / "talk.jsonl", [{"prompt": "hello", "response": "hell"}])
    with pytest.raises(RequestError, match="no chat template"):
        run("chat", data, tmp_path / "out", tmp_path / "base", steps=1)


def test_an_encoder_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": "the sun"}])
    with pytest.raises(RequestError, match="model is an encoder, which writes no text; .*such as smollm2"):
        run("lm", data, tmp_path / "out", bert_folder(tmp_path / "model"), steps=1)


def test_whole_texts_are_held_out_with_their_copies(tmp_path: Path) -> None:
    base = Base.open("t", chat_gguf(tmp_path / "t.gguf"))
    data = jsonl(tmp_path / "a.jsonl", [{"text": f"hello {i % 10} hello"} for i in range(40)])
    settings = settings_of("lm", [data], [], {"eval_split": 0.25, "max_tokens": 8})
    train, held = split_texts(base.tokenizer, settings, Skipped(), [data], [])

    def numbers(part: list[Tokens]) -> set[str]:
        return set(re.findall(r"\d", base.tokenizer.decode([i for sample in part for i in sample.ids])))

    assert len(numbers(held)) == 2 and not numbers(held) & numbers(train)
