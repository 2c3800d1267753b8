"""millis train --task classify and embed on tiny models, against what transformers makes of the folders they leave."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from millis import Encoder
from millis.samples.labelled import read_labelled
from millis.samples.read import Skipped
from millis.train.base import Base
from millis.train.classify import scores
from millis.train.start import settings_of, train
from millis.train.texts import padded
from millis.types import ModelError, RequestError
from shell import error_line, millis
from training import WORDS, bert_folder, chat_gguf, jsonl, labelled_csv, loaded, modernbert_folder, sentences


def run(task: str, data: Path, out: Path, model: Path, **given: Any) -> dict[str, Any]:
    held = given.pop("held", [])
    options = {name: given.pop(name) for name in ("resume", "checkpoint_steps") if name in given}
    settings = settings_of(task, [data], held, {"model": str(model), "lr": 3e-3} | given)
    return train(settings, out, Path, **options)


def test_transformers_reads_the_folder_and_finds_the_same_accuracy(tmp_path: Path) -> None:
    base, data = bert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv")
    held = labelled_csv(tmp_path / "held.csv", 60, seed=1)
    report = run("classify", data, tmp_path / "out", base, held=[held], epochs=5.0, batch=8)
    assert report["quality"]["accuracy"] > 0.9
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = loaded(tmp_path / "out", AutoModelForSequenceClassification)
    assert model.config.id2label == {0: "cold", 1: "warm"} and type(model).__name__ == "BertForSequenceClassification"
    right = 0
    with open(held, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            with torch.no_grad():
                best = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item()
            right += model.config.id2label[best] == row["category"]
    assert right / 60 == pytest.approx(report["quality"]["accuracy"], abs=1 / 60 + 1e-9)  # bfloat16 may turn one
    assert json.loads((tmp_path / "out" / "train" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "train" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out" / "train" / "tensorboard").glob("events.*"))
    assert not (tmp_path / "out" / "train" / "checkpoints").exists()
    the_commands_answer_by_its_head(tmp_path / "out", held, report["quality"]["accuracy"])


def test_modernbert_is_trained_with_fewer_layers_and_read(tmp_path: Path) -> None:
    base, data = modernbert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv")
    held = labelled_csv(tmp_path / "held.csv", 60, seed=1)
    report = run("classify", data, tmp_path / "out", base, held=[held], epochs=5.0, batch=8, layers=2, ngrams=False)
    assert report["quality"]["accuracy"] > 0.9
    the_commands_answer_by_its_head(tmp_path / "out", held, report["quality"]["accuracy"])


def the_commands_answer_by_its_head(model: Path, held: Path, accuracy: float) -> None:
    done = millis("evaluate", "classify", held, "-m", model, "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["accuracy"] == pytest.approx(accuracy, abs=2 / 60 + 1e-9)
    lines = held.read_text(encoding="utf-8").splitlines()[1:3]
    texts, wanted = zip(*(line.rsplit(",", 1) for line in lines), strict=True)
    own = ("classify", "-m", model)
    done = millis(*own, "-", stdin="\n".join(texts))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["label"] for one in found] == list(wanted)
    assert all(sum(one["scores"].values()) == pytest.approx(1) for one in found)
    (timed,) = [
        json.loads(line) for line in millis(*own, "--deadline-ms", "60000", "-", stdin=texts[0]).stdout.splitlines()
    ]
    assert timed["label"] == wanted[0] and timed["timings"]["slack_ms"] > 0
    assert "labels of its own" in error_line(millis("classify", "-m", model, "--labels", "a,b", "x"), 2)


def test_inference_cuts_texts_where_training_did(tmp_path: Path) -> None:
    base, data, out = bert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv", 16), tmp_path / "out"
    run("classify", data, out, base, steps=2, batch=8, max_tokens=6, ngrams=False)
    encoder, tokenizer = Encoder(out, precision="exact"), AutoTokenizer.from_pretrained(out)
    assert encoder.runner.context == tokenizer.model_max_length == 6
    long = "the sun is and we like snow today with very"
    with torch.no_grad():  # transformers' own cut
        wanted = loaded(out, AutoModelForSequenceClassification)(
            **tokenizer(long, truncation=True, return_tensors="pt")
        )
    assert encoder.logits([long], truncate=True)[0] == pytest.approx(wanted.logits[0].numpy(), abs=1e-4)
    with pytest.raises(RequestError, match="has 12 tokens; the context holds 6"):
        encoder.logits([long])
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"query": "the sun", "positive": "heat"}] * 4)
    run("embed", pairs, tmp_path / "near", base, steps=1, batch=2, max_tokens=7)
    assert Encoder(tmp_path / "near").runner.context == 7


def test_rows_of_the_embedding_that_no_text_uses_stay_as_they_were(tmp_path: Path) -> None:
    base, data = bert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv", 40)
    run("classify", data, tmp_path / "out", base, steps=5, batch=8)
    name = "embeddings.word_embeddings.weight"
    before = load_file(base / "model.safetensors")[name]
    after = load_file(tmp_path / "out" / "model.safetensors")[f"bert.{name}"]
    moved = (before != after).any(1)
    assert before.shape == after.shape and not moved[-2:].any()  # "unused" and "never"
    assert moved[4:20].all()


def test_frozen_layers_stay_as_they_were(tmp_path: Path) -> None:
    base, data = bert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv", 40)
    run("classify", data, tmp_path / "out", base, steps=3, batch=8, freeze_layers=1)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    moved = {name for name, values in before.items() if not torch.equal(values, after[f"bert.{name}"])}
    assert moved and all(name.startswith(("encoder.layer.1.", "pooler.")) for name in moved)
    with pytest.raises(RequestError, match=r"--freeze-layers must lie in \[0, 1\] for this model, not 2"):
        run("classify", data, tmp_path / "other", base, steps=1, freeze_layers=2)


def test_a_long_text_is_read_from_anywhere(tmp_path: Path) -> None:
    """What tells the labels apart stands behind the beginning, and is learned nevertheless."""
    rows = [(f"the is and we like today {f'very {word} ' * 8}", label) for label in WORDS for word in WORDS[label]]
    data = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows] * 4)
    held = jsonl(tmp_path / "b.jsonl", [{"text": f"very {w}", "label": n} for n in WORDS for w in WORDS[n]])
    base, given = bert_folder(tmp_path / "base"), {"epochs": 20.0, "batch": 8, "max_tokens": 8, "held": [held]}
    given["ngrams"] = False
    found = [run("classify", data, tmp_path / str(e), base, elsewhere=e, **given)["quality"] for e in (0.0, 1.0)]
    assert found[0]["accuracy"] < 0.8 < found[1]["accuracy"]


def test_a_decoder_with_fewer_layers_as_classifier(tmp_path: Path) -> None:
    data, held, out = (
        labelled_csv(tmp_path / "train.csv", 48),
        labelled_csv(tmp_path / "held.csv", 60),
        tmp_path / "out",
    )
    given = {"epochs": 4.0, "batch": 8, "layers": 1, "dropout": 0.0, "held": [held], "bf16": False}
    report = run("classify", data, out, chat_gguf(tmp_path / "m.gguf", "qwen2"), ngrams=False, **given)
    model = loaded(out, AutoModelForSequenceClassification)
    assert type(model).__name__ == "Qwen2ForSequenceClassification" and model.config.num_hidden_layers == 1
    tokenizer, encoder = AutoTokenizer.from_pretrained(out), Encoder(out, precision="exact", threads=1)
    texts, labels = zip(*sentences(60), strict=True)
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([tokenizer(text).input_ids])).logits for text in texts])
    np.testing.assert_allclose(encoder.logits(list(texts)), wanted.numpy(), atol=1e-4)
    right = [model.config.id2label[guess] for guess in wanted.argmax(1).tolist()]
    accuracy = sum(guess == label for guess, label in zip(right, labels, strict=True)) / 60
    assert accuracy == pytest.approx(report["quality"]["accuracy"], abs=1e-9)
    done = millis("evaluate", "classify", held, "-m", out, "--threads", "1", "--precision", "exact", "--json")
    assert json.loads(done.stdout)["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    run("classify", data, out, tmp_path / "m.gguf", resume=False, **given)  # with n-grams beside the head
    found = json.loads(millis("classify", "-m", out, "--json", texts[0]).stdout)
    assert found["label"] in ("cold", "warm") and sum(found["scores"].values()) == pytest.approx(1)


def test_a_real_decoder_says_what_transformers_says(tmp_path: Path, model_path: Callable[[str], Path]) -> None:
    """smollm2's first layers under a head that nobody trained, as large as one that was, in bytes and in float32."""
    base = Base.open("smollm2", model_path("smollm2"))
    model = base.classifier(["a", "b", "c"], layers=4).eval()
    with torch.no_grad():
        model.score.weight.mul_(10)
    model.save_pretrained(tmp_path)
    base.write_beside(tmp_path, 64)
    texts = ["My card has not come yet.", "What a film!", "The cat sat on the mat, and there it stays. " * 4]
    ids = [base.tokenizer.encode(text) for text in texts]
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([one])).logits for one in ids]).numpy()
    for precision, most in (("exact", 1e-4), ("fast", 0.05)):
        found = Encoder(tmp_path, precision=precision, threads=2).logits(texts)
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < most


def test_a_decoders_head_looks_behind_the_last_token_of_padded_texts(tmp_path: Path) -> None:
    """Whatever the folder's config.json calls the padding."""
    out = tmp_path / "out"
    run("classify", labelled_csv(tmp_path / "a.csv", 16), out, chat_gguf(tmp_path / "m.gguf"), steps=1, batch=8)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"pad_token_id": 263}))  # the end of a turn
    base = Base.open("out", out)
    model = base.classifier(["cold", "warm"]).eval()
    texts = [base.tokenizer.encode(text) for text in ("snow", "the sun is and we like today")]
    with torch.no_grad():
        ids, mask = padded(texts, base.pad)
        together = model(input_ids=ids, attention_mask=mask).logits
        alone = torch.cat([model(torch.tensor([text])).logits for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_decoder_of_which_there_is_no_classifier(tmp_path: Path) -> None:
    base = Base.open("m", chat_gguf(tmp_path / "m.gguf", "granite"))
    with pytest.raises(ModelError, match="m: transformers has no classifier of the type granite; give another model"):
        base.classifier(["a", "b"])


def test_bad_rows_are_skipped_and_reported(tmp_path: Path) -> None:
    base, data = bert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv", 30)
    data.write_bytes(data.read_bytes() + b"\xff\xff,cold\n,warm\nno label,\n")
    held = jsonl(tmp_path / "held.jsonl", [{"text": "snow", "label": "cold"}, {"text": "fog", "label": "wet"}])
    report = run("classify", data, tmp_path / "out", base, held=[held], steps=2, batch=8)
    assert report["skipped_rows"] == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "train" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"].partition(":")[0]) for line in lines] == [
        (32, "not UTF-8"),
        (33, "empty"),
        (34, "no label"),
        (2, "unknown label"),
    ]


def test_a_folder_of_another_run_is_refused_and_the_same_run_is_not_repeated(tmp_path: Path) -> None:
    base, data, out = bert_folder(tmp_path / "base"), labelled_csv(tmp_path / "train.csv", 16), tmp_path / "out"
    report = run("classify", data, out, base, steps=2, batch=8)
    assert run("classify", data, out, base, steps=2, batch=8) == report | {"already_done": True}
    with pytest.raises(RequestError, match=r"other settings \(steps\)"):
        run("classify", data, out, base, steps=3, batch=8)
    labelled_csv(data, 17)
    with pytest.raises(RequestError, match=r"other settings \(data\)"):
        run("classify", data, out, base, steps=2, batch=8)
    assert run("classify", data, out, base, steps=3, batch=8, resume=False)["steps"] == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(RequestError, match=r"not empty \(it holds thesis.doc\)"):
        run("classify", data, tmp_path / "full", base, steps=2)


def test_options_without_meaning_are_refused(tmp_path: Path) -> None:
    data = labelled_csv(tmp_path / "train.csv", 16)
    with pytest.raises(RequestError, match="layers has no meaning for --task embed"):
        settings_of("embed", [data], [], {"layers": 2})
    with pytest.raises(RequestError, match="--finetune lora is for lm and chat"):
        settings_of("classify", [data], [], {"finetune": "lora"})
    with pytest.raises(RequestError, match="--shape starts from nothing"):
        settings_of("lm", [data], [], {"shape": "llama", "model": "smollm2"})
    with pytest.raises(RequestError, match="--shape llama too"):
        settings_of("lm", [data], [], {"vocab": 500})
    with pytest.raises(RequestError, match="--params has no meaning for --task classify"):
        settings_of("classify", [data], [], {"parameters": 500})
    with pytest.raises(RequestError, match="--rank is an adapter's; give --finetune lora too"):
        settings_of("lm", [data], [], {"rank": 8, "finetune": "full"})
    for task in ("embed", "chat"):
        with pytest.raises(RequestError, match=f"--text-column has no meaning for --task {task}"):
            settings_of(task, [data], [], {"text_column": "text"})
    with pytest.raises(RequestError, match="--eval names .* give one"):
        settings_of("lm", [data], [data], {"eval_split": 0.5})
    with pytest.raises(RequestError, match="--batch 1 leaves a pair no other"):
        settings_of("embed", [data], [], {"batch": 1})


def test_labels_that_are_none_are_skipped_with_the_reason(tmp_path: Path) -> None:
    labels = ['["cold", "wet"]', '{"a": 1}', "NaN", "null", '" "', '"\\ud800"', "1", "true", '"寒い"']
    data = tmp_path / "a.jsonl"
    data.write_text("".join(f'{{"text": "snow", "label": {label}}}\n' for label in labels), encoding="utf-8")
    skipped = Skipped()
    assert [label for _, _, label in read_labelled([data], skipped)] == ["1", "true", "寒い"]
    assert [row["reason"] for row in skipped.rows] == [
        "malformed: label is a list, not one label",
        "malformed: label is a dict, not one label",
        *["no label"] * 3,
        "not UTF-8",
    ]


def test_samples_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base")  # of 64 positions
    data = jsonl(tmp_path / "a.jsonl", [{"text": "snow " * 99, "label": "cold"}, {"text": "sun", "label": "warm"}])
    pairs = jsonl(tmp_path / "p.jsonl", [{"query": "snow " * 99, "positive": "ice"}, {"query": "sun", "positive": "b"}])
    for task, file in (("classify", data), ("embed", pairs)):
        with pytest.raises(
            RequestError, match="a sample has 80 tokens, and the model takes at most 64; give --max-tok"
        ):
            run(task, file, tmp_path / task, base, steps=1, max_tokens=80)
        assert run(task, file, tmp_path / task, base, steps=1, max_tokens=64)["steps"] == 1


def test_pairs_of_which_none_can_be_used_are_told(tmp_path: Path) -> None:
    base, good = bert_folder(tmp_path / "base"), [{"query": word, "positive": word} for word in ("snow", "sun", "ice")]
    data = jsonl(tmp_path / "a.jsonl", good)
    held = jsonl(tmp_path / "b.jsonl", [{"query": 1, "positive": "a"}, {"query": "", "positive": "x"}])
    with pytest.raises(RequestError, match=r"no usable row in .*b.jsonl: 2 rows skipped \(1 malformed, 1 empty\)"):
        run("embed", data, tmp_path / "out", base, held=[held], steps=1)


def test_one_label_is_no_classification(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": "snow", "label": "cold"}] * 3)
    with pytest.raises(RequestError, match="all rows have the label 'cold'"):
        run("classify", data, tmp_path / "out", bert_folder(tmp_path / "base"), steps=1)


def test_scores_against_their_closed_forms() -> None:
    found = scores([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_embeddings_of_pairs_come_together(tmp_path: Path) -> None:
    words = ["snow", "ice", "frost", "winter", "sun", "beach", "summer", "heat"]
    pairs = [{"query": f"the {a} is {b}", "positive": f"{b} and {a}"} for a in words for b in words if a != b]
    data = jsonl(tmp_path / "pairs.jsonl", pairs)
    given = {"epochs": 12.0, "batch": 14, "lr": 4e-3, "eval_split": 0.25}
    report = run("embed", data, tmp_path / "out", bert_folder(tmp_path / "base"), **given)
    quality = report["quality"]
    assert quality["recall_at_1"] > quality["recall_at_1_before"] + 0.1
    model, tokenizer = loaded(tmp_path / "out", AutoModel), AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        left, right = (
            torch.cat([model(**tokenizer(p[side], return_tensors="pt")).last_hidden_state.mean(1) for p in pairs])
            for side in ("query", "positive")
        )
    near = torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=-1)
    assert (near.argmax(1) == torch.arange(len(pairs))).float().mean() > 0.5
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_decoder_as_embedding_model(architecture: str, tmp_path: Path) -> None:
    words = ["snow", "ice", "sun", "beach"]
    data = jsonl(
        tmp_path / "p.jsonl", [{"query": f"the {a}", "positive": f"{a} and {b}"} for a in words for b in words]
    )
    given = {"epochs": 2.0, "batch": 8, "eval_split": 0.25, "bf16": False}
    report = run("embed", data, tmp_path / "out", chat_gguf(tmp_path / "m.gguf", architecture), **given)
    model, tokenizer = loaded(tmp_path / "out", AutoModel), AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        states = [model(torch.tensor([tokenizer(word).input_ids])).last_hidden_state.mean(1) for word in words]
    wanted = torch.nn.functional.normalize(torch.cat(states), dim=-1).numpy()
    np.testing.assert_allclose(Encoder(tmp_path / "out", precision="exact").embed(words), wanted, atol=1e-4)
    done = millis("embed", "-m", tmp_path / "out", "--precision", "exact", words[0])
    assert json.loads(done.stdout) == pytest.approx(wanted[0].tolist(), abs=1e-4)
    assert report["quality"]["recall_at_1"] >= 0
