"""Files of examples: every form gives the same rows, and what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millis.samples.read import Skipped
from millis.tasks.dataset import read_labelled, read_rows, spread
from millis.types import RequestError


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,category\n"Hi, you",greet\n再见,bye\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text("label\ttext\ngreet\tHi, you\nbye\t再见\n", encoding="utf-8-sig")
    lines = [{"text": "Hi, you", "intent": "greet"}, {"sentence": "再见", "label": "bye"}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    for name in ("a.csv", "b.tsv", "c.jsonl"):
        assert read_labelled(tmp_path / name) == [("Hi, you", "greet"), ("再见", "bye")], name


def test_only_a_line_feed_ends_a_json_line(tmp_path: Path) -> None:
    path, text = tmp_path / "a.jsonl", "one\u2028two\x85three\u2029"
    path.write_text(json.dumps({"text": text, "label": "a"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_labelled(path) == [(text.strip(), "a")]


def test_squad_is_read(tmp_path: Path) -> None:
    qa = {"id": "1", "question": "谁？", "answers": [{"text": "他", "answer_start": 0}, {"text": "她"}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "他来了", "qas": [qa]}]}]}), encoding="utf-8")
    want = {"question": "谁？", "context": "他来了", "answers": ["他", "她"]}
    assert read_rows(path, ("question", "context", "answers")) == [want]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,other\nx,y\n", "line 2: no column label or category or intent"),
        ("a.csv", "", "holds no rows"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{', "line 2: no JSON"),
        ("a.jsonl", "[1]", "line 1: must be an object"),
        ("a.jsonl", '{"text": ["a"], "label": "b"}', "text must be a text"),
        ("a.json", '{"data": [1]}', "no SQuAD file"),
        ("a.txt", "x", "must end in"),
    ],
)
def test_what_is_wrong_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        read_rows(path, ("text", "label"))


@pytest.mark.parametrize(
    "answers", ['"a, b"', '["a, b"]', '{"text": ["a, b"]}', '[{"text": "a, b"}]', '"[\\"a, b\\"]"']
)
def test_answers_in_every_form(answers: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "q", "context": "c", "answers": {answers}}}')
    assert read_rows(path, ("answers",)) == [{"answers": ["a, b"]}]


@pytest.mark.parametrize(
    "answers", ["{}", "null", "[null]", '[{"x": 1}]', '{"text": []}', '"[]"', "[[1]]", '"\\ud800"']
)
def test_answers_that_are_none_are_named(answers: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "q", "context": "c", "answers": {answers}}}')
    with pytest.raises(RequestError, match="line 1: "):
        read_rows(path, ("answers",))


def test_half_a_pair_of_surrogates_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n{"source": "\\ud800", "target": "b"}\n')
    with pytest.raises(RequestError, match="line 2: source is not UTF-8"):
        read_rows(path, ("source", "target"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no file or folder"):
        read_labelled(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"text,label\n\xe9,b\n")
    with pytest.raises(RequestError, match="not UTF-8"):
        read_labelled(tmp_path / "latin.csv")


def test_what_train_reads_is_read(tmp_path: Path) -> None:
    path, skipped = tmp_path / "a.csv", Skipped()
    path.write_text("question,intent\nWhy?,1.0\n,b\nWho?,\n" + "x" * 200_000 + ",c\n", encoding="utf-8")
    assert read_labelled(path, skipped) == [("Why?", "1.0"), ("x" * 200_000, "c")]
    assert [row["line"] for row in skipped.rows] == [3, 4]
    with pytest.raises(RequestError, match="2 rows skipped .*; mend the file"):
        read_labelled(path)
    path.write_text("text,label\npaid,low\n49,900 sent,high\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"a.csv:3 \(3 values for 2 columns\)"):
        read_labelled(path)
    path.write_text("words,kind\nHi,greet\n", encoding="utf-8")
    assert read_labelled(path, None, "words", "kind") == [("Hi", "greet")]
    path = tmp_path / "b.json"
    path.write_text(json.dumps([{"text": "Hi", "label": 1.0}, {"text": "Ho", "label": True}]), encoding="utf-8")
    assert read_labelled(path) == [("Hi", "1.0"), ("Ho", "true")]


def test_a_quote_that_is_never_closed_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('source,target\na,b\n"c,d\ne,f\n', encoding="utf-8")
    with pytest.raises(RequestError, match="line 3: a quote opens a field here that takes 2 lines"):
        read_rows(path, ("source", "target"))


def test_a_part_is_spread_evenly() -> None:
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == spread([1, 2], None) == [1, 2]
