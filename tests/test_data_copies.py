"""Copies, near copies, splits and packs: against Jaccard's index, closed forms, NumPy, and their own promises."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_support import read_rows, write_rows
from millis import data
from millis.data.duplicates import PERMUTATIONS, RECALL, Known, Seen, bands_for, shingles, signature
from millis.data.sides import normal, share, side
from millis.types import DataError

Row = dict[str, str]
WORDS = [f"word{n}" for n in range(400)]


def text_of(draw: random.Random, count: int = 60) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def jaccard(a: str, b: str) -> float:
    first, second = set(shingles(a)), set(shingles(b))
    return len(first & second) / len(first | second)


def test_signatures_estimate_jaccards_index() -> None:
    """The errors of 60 pairs are those of a binomial share: within 4.5 standard deviations, and none on average."""
    draw, errors = random.Random(1), []
    for changed in range(60):
        words = text_of(draw).split()
        other = words[: len(words) - changed % 40] + text_of(draw, changed % 40).split()
        a, b = " ".join(words), " ".join(other)
        true, estimate = jaccard(a, b), float(np.mean(signature(a) == signature(b)))
        spread = (true * (1 - true) / PERMUTATIONS) ** 0.5
        assert abs(estimate - true) <= 4.5 * spread + 1e-9
        errors.append(estimate - true)
    assert abs(np.mean(errors)) < 0.02


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_compare_what_is_similar_enough(threshold: float) -> None:
    bands, rows = bands_for(threshold)
    assert bands * rows == PERMUTATIONS and 1 - (1 - threshold**rows) ** bands >= RECALL


def test_near_copies_are_found_and_others_are_not() -> None:
    """Texts with one word of sixty changed (Jaccard above 0.89) against a thousand unrelated ones."""
    draw = random.Random(2)
    texts = [text_of(draw) for _ in range(300)]
    with Seen(0.8) as seen:
        for number, text in enumerate(texts):
            assert seen.near(signature(text)) is None
            seen.keep(Known(number, f"f:{number}", None, text), text, signature(text))
        found = 0
        for number, text in enumerate(texts):
            words = text.split()
            words[30] = "another"
            known = seen.near(signature(" ".join(words)))
            found += known is not None and known.number == number
        assert found >= 290
        assert seen.exact(texts[7].upper().replace(" ", "\u3000")) == Known(7, "f:7", None, texts[7])
        assert seen.exact("never seen") is None


def test_near_copies_among_texts_that_are_somewhat_alike() -> None:
    """A form filled in many times: what agrees with one text in a band is compared with the others there, too."""
    draw, signatures, missed, found = random.Random(5), list[NDArray[np.uint32]](), 0, 0
    form = [f"word{n}" for n in range(60)]
    with Seen(0.8) as seen:
        for number in range(600):
            words = list(form)
            for place in draw.sample(range(60), draw.randint(1, 4)):
                words[place] = f"other{draw.randrange(1000)}"
            entries = signature(text := " ".join(words))
            near = max((float(np.mean(entries == other)) for other in signatures), default=0.0) >= 0.8
            if seen.near(entries) is None:
                missed += near
                signatures.append(entries)
                seen.keep(Known(number, "", None, ""), text, entries)
            else:
                found += 1
    assert found > 150 and missed <= 0.05 * found


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "now"))
    with pytest.raises(DataError, match="copies .* not go to .*/no.* is full.*name another folder in TMPDIR"):
        (tmp_path / "now").mkdir()
        with Seen(0.8) as seen:
            seen._base.execute("PRAGMA max_page_count = 8")
            for number in range(5000):
                seen.keep(Known(number, "", None, ""), text := f"text {number}", signature(text))
    assert list((tmp_path / "now").iterdir()) == []


def test_chinese_is_compared_by_characters() -> None:
    a = "这家酒店的位置非常好，离地铁站只有五分钟，房间也很干净，下次还会再来住的。"
    with Seen(0.6) as seen:
        seen.keep(Known(0, "a", None, a), a, signature(a))
        assert seen.near(signature(a.replace("五分钟", "三分钟"))) is not None
        assert seen.near(signature("书的内容很无聊，翻译得也不好，看了几页就看不下去了，不推荐大家购买。")) is None


@given(st.text(), st.integers(0, 5))
def test_a_text_is_always_on_the_same_side(text: str, seed: int) -> None:
    shouted = "  " + text.upper().lower() + "\n"
    if normal(shouted) == normal(text):  # there are letters that upper case does not give back
        assert share(shouted, seed) == share(text, seed)
    assert 0 <= share(text, seed) < 1
    assert side(text, 0.3, seed) == ("test" if share(text, seed) < 0.3 else "train")


def test_shares_are_uniform_and_seeds_independent() -> None:
    """Kolmogorov-Smirnov at 1 %, and no correlation beyond chance."""
    shares = np.array([[share(f"text {n}", seed) for n in range(4000)] for seed in (0, 1)])
    for row in shares:
        assert np.abs(np.sort(row) - np.arange(1, 4001) / 4000).max() < 1.63 / 4000**0.5
    assert abs(np.corrcoef(shares)[0, 1]) < 4 / 4000**0.5


def rows_of(count: int, labels: int = 3) -> list[Row]:
    draw = random.Random(count)
    return [{"text": text_of(draw, 12), "label": f"l{min(n % 10, labels - 1)}"} for n in range(count)]


def split(tmp_path: Path, rows: list[Row], **options: object) -> tuple[list[Row], list[Row]]:
    path = write_rows(tmp_path / "in.jsonl", rows)
    data.split([path], tmp_path / "train.jsonl", tmp_path / "test.jsonl", **options)  # type: ignore[arg-type]
    return read_rows(tmp_path / "train.jsonl"), read_rows(tmp_path / "test.jsonl")


def test_a_split_is_a_partition_whatever_the_order(tmp_path: Path) -> None:
    rows = rows_of(500)
    train, test = split(tmp_path, rows, share_of_test=0.2)
    assert sorted(map(json.dumps, train + test)) == sorted(map(json.dumps, rows))
    assert 60 <= len(test) <= 140
    again_train, again_test = split(tmp_path, rows[::-1][:250] + rows[:250], share_of_test=0.2)
    assert {row["text"] for row in again_test} == {row["text"] for row in test}
    assert {row["text"] for row in again_train} == {row["text"] for row in train}
    assert {row["text"] for row in split(tmp_path, rows, share_of_test=0.2, seed=1)[1]} != {row["text"] for row in test}


@pytest.mark.parametrize("stratify", [None, "label"])
def test_copies_never_straddle(stratify: str | None, tmp_path: Path) -> None:
    rows = rows_of(200)
    copies = [{"text": f" {row['text'].upper()} ", "label": "l0"} for row in rows]  # another label, at times
    train, test = split(tmp_path, rows + copies, share_of_test=0.3, stratify=stratify, near=0)
    assert not {normal(row["text"]) for row in train} & {normal(row["text"]) for row in test}
    assert len(train) + len(test) == 400


def test_stratified_shares_are_the_same(tmp_path: Path) -> None:
    rows = rows_of(1000)
    _, test = split(tmp_path, rows, share_of_test=0.1, stratify="label")
    for label in ("l0", "l1", "l2"):
        count = sum(row["label"] == label for row in rows)
        assert sum(row["label"] == label for row in test) == round(0.1 * count)
    with pytest.raises(DataError, match="a row has no 'kind' to stratify by; it has text, label"):
        split(tmp_path, rows, stratify="kind")


def test_near_copies_across_are_told_and_dropped(tmp_path: Path) -> None:
    rows = rows_of(300)
    for row in rows_of(301)[:40]:
        rows += [row, {**row, "text": f"{row['text']} word1"}]
    path = write_rows(tmp_path / "in.jsonl", rows)
    outs = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    told = data.split([path], *outs, share_of_test=0.5, near=0.7)
    train, test = map(read_rows, outs)
    pairs = {normal(row["text"]).removesuffix(" word1") for row in train}
    pairs &= {normal(row["text"]).removesuffix(" word1") for row in test}
    assert len(pairs) - 1 <= told.near_copies <= len(pairs) + 1 and told.near_copies > 5 and told.dropped == 0
    assert all(example["similarity"] >= 0.7 for example in told.examples)
    data.split([path], *outs, share_of_test=0.5, near=0.7, drop_near=True)
    assert len(read_rows(outs[0])) == len(train) - told.near_copies and read_rows(outs[1]) == test


def test_splits_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one side is empty"):
        split(tmp_path, [{"text": "one"}])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(DataError, match="must lie between 0 and 1, not 1"):
        split(tmp_path, rows_of(10), share_of_test=1)
    path = write_rows(tmp_path / "a.jsonl", rows_of(30))
    with pytest.raises(DataError, match="a.jsonl is also read from"):
        data.split([path], path, tmp_path / "b.jsonl")


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 70_000), max_size=30), min_size=1, max_size=12), length=st.integers(2, 9)
)
def test_packed_rows_are_the_documents_one_after_the_other(
    documents: list[list[int]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("pack") / "x.npy"
    flat = [token for ids in documents if ids for token in [*ids, 0]]
    rows = [{"text": json.dumps(ids)} for ids in documents]
    options = {"length": length, "vocab_size": 70_001, "end": 0}
    if len(flat) < length:
        with pytest.raises(DataError, match="fewer than one row"):
            data.pack(rows, out, lambda texts: [json.loads(text) for text in texts], **options)  # type: ignore[arg-type]
        assert list(out.parent.iterdir()) == []
        return
    facts = data.pack(rows, out, lambda texts: [json.loads(text) for text in texts], **options)  # type: ignore[arg-type]
    array, starts = np.load(out, mmap_mode="r"), np.load(out.with_suffix(".starts.npy"))
    assert array.dtype == np.uint32 and array.shape == (len(flat) // length, length)
    assert array.ravel().tolist() == flat[: array.size] and facts["left_out_tokens"] == len(flat) % length
    firsts = np.cumsum([0, *(len(ids) + 1 for ids in documents if ids)])[:-1]
    assert starts.tolist() == [first for first in firsts if first < array.size]
    told = np.concatenate([data.documents(array, starts, row) for row in range(len(array))])
    changes = [place for place in range(1, array.size) if place % length and told[place] != told[place - 1]]
    assert changes == [first for first in starts.tolist() if first % length]


def test_small_vocabularies_take_two_bytes(tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    rows = [{"text": "abcd"}]
    data.pack(rows, out, lambda texts: [list(text.encode()) for text in texts], length=2, vocab_size=256, end=None)
    assert np.load(out).dtype == np.uint16 and np.load(out).tolist() == [[97, 98], [99, 100]]
    with pytest.raises(DataError, match="a token lies outside the vocabulary of 99: 100"):
        data.pack(rows, out, lambda texts: [list(text.encode()) for text in texts], length=2, vocab_size=99, end=None)
    with pytest.raises(DataError, match="must end in .npy"):
        data.pack(rows, tmp_path / "x.bin", lambda texts: [], length=2, vocab_size=9, end=None)
