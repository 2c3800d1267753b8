"""Parts of training alone: schedule, batches, rows of files, settings, checkpoints, shapes of new models."""

from __future__ import annotations

import json
import math
import random
import resource
from pathlib import Path

import pytest
import torch

from millis.samples.read import Skipped, column, files_of, read_rows, text_of
from millis.train.batches import divided, epoch_steps, micro_batches, padding, split
from millis.train.checkpoints import Checkpoints
from millis.train.schedule import progress, rate
from millis.train.scratch import best_shape
from millis.train.settings import amount, seconds
from millis.train.vocabulary_loss import vocabulary_loss
from millis.train.watch import averages
from millis.types import DataError, RequestError


def test_the_rate_rises_then_follows_a_cosine() -> None:
    assert rate(0.05, 0.1) == pytest.approx(0.5)
    assert rate(0.1, 0.1) == pytest.approx(1)
    assert rate(0.55, 0.1) == pytest.approx(0.5)  # halfway down
    assert rate(0.325, 0.1) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert rate(1, 0.1, floor=0.1) == pytest.approx(0.1)


def test_progress_is_by_steps_or_time_whichever_is_further() -> None:
    assert progress(5, 10, 0, None) == 0.5
    assert progress(5, 10, 90, 100) == 0.9
    assert progress(5, None, 10, 100) == 0.1
    assert progress(20, 10, 0, None) == 1


def test_every_sample_once_an_epoch_in_an_order_of_its_own() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 60) for _ in range(1000)]
    first, second = (epoch_steps(lengths, 16, 256, 3, epoch) for epoch in (0, 1))
    for steps in (first, second):
        assert sorted(i for step in steps for micro in step for i in micro) == list(range(1000))
        assert all(sum(map(len, step)) <= 16 for step in steps)
        assert all(len(micro) * max(lengths[i] for i in micro) <= 256 for step in steps for micro in step)
    assert first != second
    assert first == epoch_steps(lengths, 16, 256, 3, 0)
    plain = [[list(range(i, min(i + 16, 1000)))] for i in range(0, 1000, 16)]
    assert padding(first, lengths) < 0.1 < 0.4 < padding(plain, lengths)


def test_a_sample_longer_than_a_micro_batch_stands_alone() -> None:
    assert micro_batches([0, 1, 2], [500, 3, 4], 100) == [[1, 2], [0]]


def test_split_is_disjoint_and_whole() -> None:
    train, held = split(range(100), 0.2, 7)
    assert len(held) == 20 and sorted(train + held) == list(range(100))
    assert split(range(100), 0.2, 7) == (train, held) != split(range(100), 0.2, 8)


def test_copies_stand_on_one_side_of_a_split() -> None:
    keys = [random.Random(i).randrange(40) for i in range(200)]
    train, held = split(keys, 0.2, 1)
    assert sorted(train + held) == list(range(200)) and 30 <= len(held) <= 40
    assert not {keys[i] for i in train} & {keys[i] for i in held}


def test_a_share_that_leaves_none_on_one_side_is_refused() -> None:
    assert divided("abcd", "abcd", 0.0, 7) == (list("abcd"), [])
    train, held = divided("abcd", "abcd", 0.5, 7)
    assert len(train) == len(held) == 2 and sorted(train + held) == list("abcd")
    with pytest.raises(RequestError, match="--eval-split 0.1 of 4 samples, .* leaves none to evaluate on"):
        divided("abcd", "abcd", 0.1, 7)
    with pytest.raises(RequestError, match="leaves none to train on"):
        divided("a", "a", 0.9, 7)
    with pytest.raises(RequestError, match="copies together, leaves none to evaluate on"):
        divided("aaaa", "aaaa", 0.5, 7)


def test_a_loss_that_is_no_number_does_not_spoil_the_average() -> None:
    found = averages([math.nan, 2.0, math.nan, math.inf, 3.0])
    assert math.isnan(found[0]) and found[1:] == pytest.approx([2, 2, 2, 0.9 * 2 + 0.1 * 3])


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes(b'text,label\nfine,x\n\xff\xfe,x\n\n"two\nlines",y\nonly one\n,z\nlast,x\n')
    skipped = Skipped()
    rows = list(read_rows([table], skipped))
    assert [(row.line, row.fields["text"]) for row in rows] == [(2, "fine"), (5, "two\nlines"), (8, ""), (9, "last")]
    assert [text_of(row, "text", skipped) for row in rows] == ["fine", "two\nlines", None, "last"]
    reasons = [(row["line"], row["reason"].partition(":")[0]) for row in skipped.rows]
    assert reasons == [(3, "not UTF-8"), (7, "malformed"), (8, "empty")]
    assert "3 rows skipped" in skipped.summary() and f"{table}:3" in skipped.summary()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16", "utf-16-le"])
def test_rows_in_other_encodings(encoding: str, tmp_path: Path) -> None:
    table, skipped = tmp_path / "a.csv", Skipped()
    rows = [
        "text,label",
        "这是一个测试文件，内容用简体中文写成。,甲",
        "今天天气很好，适合出门散步。,乙",
        "客服专线请在上班时间拨打。,甲",
    ]
    table.write_bytes("\n".join(rows).encode(encoding))
    assert [row.fields["text"] for row in read_rows([table], skipped)] == [row[:-2] for row in rows[1:]]
    assert skipped.count == 0 and list(skipped.encodings.values()) == ([] if encoding == "utf-8-sig" else [encoding])


def test_columns_of_one_name_and_lines_that_a_quote_swallowed(tmp_path: Path) -> None:
    table, skipped = tmp_path / "a.csv", Skipped()
    table.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="the names of its columns, each once"):
        list(read_rows([table], skipped))
    table.write_text('text,label\na,x\n"b,y\n' + "c,z\n" * 9)
    assert [row.line for row in read_rows([table], skipped)] == [2]
    assert skipped.count == 10 and "opens a field here that takes 10 lines" in skipped.rows[0]["reason"]


def test_bad_lines_of_json(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(
        b'{"text": "fine"}\n{"text": \n[1]\n"bare text"\n{"text": 5}\n{"text": "\\ud800"}\n' + b"[" * 9999
    )
    skipped = Skipped()
    rows = list(read_rows([lines], skipped))
    assert [text_of(row, "text", skipped) for row in rows] == ["fine", "bare text", None, None]
    assert [row["line"] for row in skipped.rows] == [2, 3, 7, 5, 6]


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("One.")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Two."}))
    (tmp_path / "ignored.png").write_bytes(b"")
    assert [path.name for path in files_of([tmp_path])] == ["a.jsonl", "one.txt"]
    with pytest.raises(RequestError, match="no file or folder"):
        files_of([tmp_path / "absent.csv"])
    with pytest.raises(RequestError, match="data files end in"):
        files_of([tmp_path / "ignored.png"])


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("words,kind\nx,y\n")
    rows = list(read_rows([table], Skipped()))
    assert column(rows, "words", ["text"], "the text", "--text-column") == "words"
    with pytest.raises(RequestError, match=r"no column text for the text; it has words, kind: .*--text-column"):
        column(rows, None, ["text"], "the text", "--text-column")


def test_a_first_line_that_is_no_text_is_said(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes("größe,label\nx,y\n".encode("latin-1"))
    with pytest.raises(DataError, match="a.csv is not UTF-8 text: its first line must name the columns"):
        list(read_rows([table], Skipped()))


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400)])
def test_lengths_of_time(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "soon", "-5m", "5d"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(RequestError, match="no length of time"):
        seconds(text)


def test_amounts() -> None:
    assert [amount(text) for text in ("15M", "1.5b", "800k", "12345")] == [15_000_000, 1_500_000_000, 800_000, 12345]
    for text in ("", "M", "-3M", "nan", "1e999"):
        with pytest.raises(RequestError, match="no number of parameters"):
            amount(text)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize(("size", "vocab"), [(15_000_000, 8000), (1_000_000, 2000), (125_000_000, 32000)])
def test_a_new_model_has_the_wanted_size(shape: str, size: int, vocab: int) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    hidden, layers = best_shape(shape, size, vocab, 512)
    with torch.device("meta"):
        if shape == "gpt2":
            config = GPT2Config(vocab_size=vocab, n_positions=512, n_embd=hidden, n_layer=layers, n_head=hidden // 64)
        else:
            config = LlamaConfig(
                vocab_size=vocab,
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                intermediate_size=max(64, round(8 * hidden / 3 / 64) * 64),
                tie_word_embeddings=True,
            )
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert abs(weights / size - 1) < 0.2


def test_checkpoints_keep_two_and_pass_over_a_damaged_one(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "c")
    assert kept.load() == (None, [])
    for step in (1, 2, 3):
        kept.save(step, {"value": torch.full((3,), step)})
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-000000002.pt", "step-000000003.pt"]
    newest = tmp_path / "c" / "step-000000003.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    state, damaged = kept.load()
    assert state is not None and state["value"].tolist() == [2, 2, 2] and damaged == [newest]
    assert not newest.exists()
    kept.clear()
    assert not (tmp_path / "c").exists()


def test_a_new_checkpoint_outlives_those_of_later_steps(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "c")
    for step in (90, 91, 5):
        kept.save(step, {})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000000005.pt", "step-000000091.pt"]


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    kept, limits = Checkpoints(tmp_path / "c"), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept.save(1, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(RequestError, match="cannot write the checkpoint .*free some space"):
            kept.save(2, {"value": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-000000001.pt"]


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """A pickle that would run a command when it is read is not read."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    kept = Checkpoints(tmp_path / "c")
    (tmp_path / "c").mkdir()
    torch.save({"value": Hostile()}, tmp_path / "c" / "step-000000001.pt")
    assert kept.load()[0] is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_over_a_vocabulary_is_torchs(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millis.train.vocabulary_loss._MIN_TOKENS", 5)
    monkeypatch.setattr("millis.train.vocabulary_loss._PIECE_VALUES", 1)  # pieces of five tokens, the last shorter
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=draw, requires_grad=True) for n in (17, 30))
    targets = torch.randint(30, (17,), generator=draw)
    weight.requires_grad_(not frozen)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    (3 * plain).backward()
    wanted = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    loss = vocabulary_loss(hidden, weight, targets, bf16=False)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for found, torchs in zip([hidden.grad, weight.grad], wanted, strict=True):
        assert torchs is None if found is None else torch.allclose(found, torchs, atol=1e-6)
    with torch.inference_mode():
        assert vocabulary_loss(hidden, weight, targets, bf16=True).item() == pytest.approx(plain.item(), rel=0.02)
