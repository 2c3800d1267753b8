"""Cleaning: what each rule drops and keeps, copies and labels, the report and its page, the commands, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_support import read_rows, write_rows
from millis import data
from millis.data import read
from millis.data.language import language
from millis.data.page import page
from millis.data.quality import DOCUMENTS, MESSAGES, first_broken
from millis.hub.progress import Silent
from millis.types import DataError
from shell import error_line
from shell import millis as shell

Row = dict[str, object]
PROSE = (
    "The committee met on Tuesday to discuss the budget that had been prepared by the treasurer. Several members asked "
    "whether the repairs of the hall could be put off until spring, and one of them offered to look for a cheaper "
    "builder. After an hour of talk they agreed to have the roof mended first, because rain was already coming in, and "
    "to wait with the windows."
)
中文 = (
    "委员会星期二开会讨论了司库准备的预算。有几位委员问，礼堂的修理是不是可以推迟到春天，还有一位愿意去找便宜的施工队。"
)


def broken(text: str, rules: object = DOCUMENTS) -> str | None:
    rule = first_broken(text, rules)  # type: ignore[arg-type]
    return rule and rule.name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (PROSE, None),
        (中文 + "在这之后他们不再谈这件事了。", None),
        ("Too short.", "short"),
        ("x " * 100_001, "long"),
        (PROSE.replace(" ", " # ", 20), "symbols"),
        ("a b c d e " * 12, "word length"),
        ("\n".join(f"- {line}" for line in PROSE.split(". ")), "bullets"),
        ("...\n".join(PROSE.split(". ")) + "...", "ellipses"),
        (" ".join(f"{word} 1 2" for word in PROSE.split()), "word length"),
        (" ".join(f"{word} 1234" for word in PROSE.split()), "letterless words"),
        ("zebra giraffe elephant monkey tiger lion " * 9, "stop words"),
        (PROSE + "\nthe same\nthe same\nthe same\nthe same", "repeated lines"),
        (f"{PROSE}\n{PROSE}\nand something else of that kind\nto be read with care\nhave it", "repeated characters"),
        (PROSE + " have to go" * 20, "top n-gram"),
        (PROSE + " " + PROSE, "repeated n-grams"),
        (PROSE + " Lorem ipsum dolor sit amet.", "lorem ipsum"),
        (PROSE + "\ufffd" * 20, "undecodable"),
    ],
)
def test_rules_for_documents(text: str, name: str | None) -> None:
    assert broken(text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Where is my card?", None),
        ("好", None),
        ("no no no", None),
        ("12345 !!!", "no letter"),
        ("哈" * 20, "one word"),
    ],
)
def test_rules_for_messages(text: str, name: str | None) -> None:
    assert broken(text, MESSAGES) == name


@pytest.mark.parametrize(
    ("text", "code"),
    [(PROSE, "en"), (中文, "zh"), ("外商投资企业税收政策", "zh"), ("これは日本語のテキストです。", "ja"),
     ("Où est la gare, s'il vous plaît ?", "fr"), ("12345", "und"), ("", "und")],
)  # fmt: skip
def test_languages(text: str, code: str) -> None:
    assert language(text)[0] == code


def clean(tmp_path: Path, rows: list[Row], **options: object) -> tuple[list[Row], data.Report]:
    out = tmp_path / "out.jsonl"
    report = data.clean([write_rows(tmp_path / "in.jsonl", rows)], out, data.Settings(**options))  # type: ignore[arg-type]
    return read_rows(out), report


def test_every_row_is_kept_or_counted(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"text": "Hello <b>there</b>, call 13812345678", "label": "a", "id": 1, "from": "x@y.org"},
        {"text": "HELLO there,  call 13812345678", "label": "a"},  # a copy
        {"text": "one text of two labels", "label": "a"},
        {"text": "One text of two  labels", "label": "b"},
        {"text": "one text of two labels", "label": "a"},
        {"text": "!!! 123"},
        {"label": "a"},
        {"text": PROSE, "label": "b"},
        {"text": PROSE.replace("Tuesday", "Friday"), "label": "b"},  # a near copy
    ]
    kept, report = clean(tmp_path, rows)
    assert kept == [
        {"text": "Hello there, call [PHONE]", "label": "a", "id": 1, "from": "[EMAIL]"},
        {"text": PROSE, "label": "b"},
    ]
    value = report.asdict()
    assert {name: fact["rows"] for name, fact in value["dropped"].items()} == {
        "copy": 2, "two labels": 2, "no letter": 1, "near copy": 1
    }  # fmt: skip
    assert value["read"] == value["kept"] + sum(fact["rows"] for fact in value["dropped"].values()) == 8
    assert value["bad"] == 1 and value["bad_lines"][0].endswith("in.jsonl:7: no text in any field; the row has label")
    assert value["masked"] == {"phone": 1, "email": 1} and value["labels"] == {"a": 1, "b": 1}
    for part in ("languages", "labels", "characters_kept"):
        assert sum(value[part].values()) == 2
    near = value["examples"]["near copy"][0]
    assert near["like"].startswith("The committee met on Tuesday") and near["similarity"] >= 0.8


def test_what_is_taken_back_was_counted_so() -> None:
    """Masks that were in the text before, a language that the masks change, and a label that only one copy has."""
    rows: list[Row] = [
        {"text": "call me at [PHONE]", "label": "b", "note": {"tel": ["电话13812345678", 7]}},
        {"text": "call me at [PHONE]", "label": "a"},
        {"text": "a@b.com http bonjour", "label": "a"},
        {"text": "a@b.com http bonjour", "label": "b"},
        {"text": "this one stays", "note": {"tel": ["电话13812345678", 7]}},
        {"text": "this one stays", "label": "b"},
    ]
    kept, report = data.clean_rows(rows)
    value = report.asdict()
    assert kept == [{"text": "this one stays", "note": {"tel": ["电话[PHONE]", 7]}}]
    assert report.reasons == {"two labels": 4, "copy": 1}
    assert value["languages"] == {"en": 1} and value["labels"] == {} and value["masked"] == {"phone": 1}
    assert sum(value["characters_kept"].values()) == 1 and sum(value["characters_dropped"].values()) == 5


def test_names_and_values_that_are_no_unicode(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_text(
        '{"text": "one fine text", "label": "\\ud800"}\n{"text": "one fine text", "label": "\\ud800"}\n', "utf-8"
    )
    report = data.clean([path], tmp_path / "out.jsonl")
    assert report.reasons == {"copy": 1} and report.examples["copy"][0].like_where == f"{path}:1"
    report.save(tmp_path / "r.html")
    report.save(tmp_path / "r.json")
    nested: Row = {"text": "another fine text"}
    for _ in range(2000):
        nested = {"text": "another fine text", "more": nested}
    kept, report = data.clean_rows([nested, {"text": "one fine text"}])
    assert len(kept) == 1 and report.bad_examples == ["row 1: nested too deeply"]


def test_pairs_languages_and_other_names(tmp_path: Path) -> None:
    pairs: list[Row] = [{"source": "你好，世界", "target": "Hello, world"}, {"source": "", "target": "x"}]
    assert clean(tmp_path, pairs)[0] == pairs[:1]
    rows: list[Row] = [{"frage": PROSE, "art": "x"}, {"frage": 中文, "art": "y"}]
    kept, report = clean(tmp_path, rows, text=("frage",), label="art", languages=("zh",))
    assert kept == [{"text": 中文, "label": "y"}] and report.reasons == {"language": 1}


def test_rows_that_copy_the_test_side_are_dropped(tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", [{"text": PROSE}, {"text": "Where  is my card?"}])
    rows = [{"text": PROSE.replace("Tuesday", "Friday")}, {"text": "WHERE is my card?"}, {"text": "Something else."}]
    report = data.clean([write_rows(tmp_path / "in.jsonl", rows)], tmp_path / "out.jsonl", against=[test])
    assert report.changed == 0  # of the rows read
    assert read_rows(tmp_path / "out.jsonl") == rows[2:] and report.reasons == {"in the test set": 2}


def test_rows_of_a_programs_own() -> None:
    rows, report = data.clean_rows([{"text": "a text"}, {"text": "A  text"}, {"text": "another"}])
    assert rows == [{"text": "a text"}, {"text": "another"}] and report.read == 3


def test_the_progress_of_cleaning_is_the_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Silent):
        count = 0

        def advance(self, count: int) -> None:
            self.count += count

    monkeypatch.setattr(read, "WATCHED_BYTES", 1)
    file, seen = tmp_path / "in.jsonl", Seen()
    write_rows(file, [{"text": f"the text of number {i}"} for i in range(9)])
    data.clean([file], tmp_path / "out.jsonl", reader=data.Reader(progress=seen))
    assert seen.count == file.stat().st_size


def test_what_cannot_be_cleaned_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old", encoding="utf-8")
    with pytest.raises(DataError, match="no row could be read: .*in.jsonl:1: no text in any field; the row has n"):
        clean(tmp_path, [{"n": 1}])
    with pytest.raises(DataError, match="out.jsonl is also read from"):
        data.clean([out.rename(tmp_path / "out.jsonl")], out)
    assert out.read_text(encoding="utf-8") == "old" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(DataError, match="out.jsonl lies in .*, whose files are read; choose another folder"):
        data.clean([tmp_path], out)
    with pytest.raises(DataError, match="out.jsonl.gz would be read as what its name says, but holds JSON lines"):
        data.clean([out], tmp_path / "out.jsonl.gz")
    with pytest.raises(DataError, match="there are no rules 'good'"):
        data.Settings(rules="good")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="name cannot be masked; email, iban, id, card, ip, phone can"):
        data.Settings(mask=("name",))


class Checked(HTMLParser):
    """A page whose tags must close in order; collects its text, and what it would fetch or run."""

    VOID = {"meta", "link", "br", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.wrong = "", list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "link", "iframe", "b") or any(
            n in ("src", "href") or n.startswith("on") for n, _ in attrs
        ):
            self.wrong.append(tag)
        if tag not in self.VOID and tag != "th":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and tag != "th" and self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, text: str) -> None:
        self.text += text


def test_the_page_escapes_what_data_says(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script> "><img src=x onerror=y> &amp; '
    rows: list[Row] = [{"text": evil + str(n) * 30, "label": evil} for n in range(10)]
    rows += [{"text": "123", "label": evil}, *rows[:2]]
    _, report = clean(tmp_path, rows, html=False, near=0)
    checked = Checked(page(report.asdict()))
    assert checked.wrong == [] and checked.open == []
    assert "<script>alert(1)</script>" in checked.text and "copy: 2 of 2" in checked.text
    assert "prefers-color-scheme: dark" in page(report.asdict())


def test_bars_are_as_long_as_their_counts(tmp_path: Path) -> None:
    rows: list[Row] = [{"text": f"the text number {n}", "label": "ab"[n % 4 == 0]} for n in range(40)]
    _, report = clean(tmp_path, rows, near=0)
    chart = page(report.asdict()).partition("Labels of what was kept")[2].partition("</svg>")[0]
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]
    assert widths[1] / widths[0] == pytest.approx(10 / 30, abs=0.001)


def test_names_of_bars_fit_before_them(tmp_path: Path) -> None:
    names = ("短", "一" * 10, "一" * 11, "twenty-one letters ..", "twenty-two letters ...")
    _, report = clean(tmp_path, [{"text": f"the text number {n}", "label": n} for n in names], near=0)
    chart = page(report.asdict()).partition("Labels of what was kept")[2].partition("</svg>")[0]
    told = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert told == ["短", "一" * 10, "一" * 10 + "…", "twenty-one letters ..", "twenty-two letters .…"]


def test_the_command_with_its_reports(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes("text,category\n你好世界你好,a\n你好世界你好,a\n再见了我的朋友,b\nx,y,z\n".encode("gb18030"))
    names = [tmp_path / "out.jsonl", tmp_path / "r.html", tmp_path / "r.json"]
    done = shell(
        "data",
        "clean",
        path,
        "--label",
        "category",
        "--out",
        names[0],
        "--report",
        names[1],
        "--report",
        names[2],
        "--json",
    )
    value = json.loads(done.stdout)
    assert value["kept"] == 2 and value["encodings"] == {str(path): "gb18030"}
    assert done.stderr.splitlines() == [
        f"{path}:5: 3 values for 2 columns; passed over",
        f"{path} is gb18030, not UTF-8; it was read as that",
    ]
    assert read_rows(names[0]) == [{"text": "你好世界你好", "label": "a"}, {"text": "再见了我的朋友", "label": "b"}]
    assert json.loads(names[2].read_text("utf-8"))["kept"] == 2 and Checked(names[1].read_text("utf-8")).wrong == []
    done = shell("data", "split", names[0], "--test", "0.5", "--near", "0", "--json", "--seed", "1")
    assert sum(json.loads(done.stdout)["rows"].values()) == 2, done


def test_wrong_use_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert "no file, folder or named set nothing-such" in error_line(
        shell("data", "clean", "nothing-such", "--out", out)
    )
    assert "no encoding 'klingon'" in error_line(shell("data", "clean", "x", "--out", out, "--encoding", "klingon"), 2)
    for verb in (
        ("clean", __file__, "--out", tmp_path / "no" / "o.jsonl"),
        ("clean", __file__, "--out", tmp_path / "o.jsonl", "--report", tmp_path / "no" / "r.html"),
        ("split", __file__, "--test-out", tmp_path / "no" / "o.jsonl"),
        ("pack", __file__, "--tokenizer", "smollm2", "--out", tmp_path / "no" / "o.npy"),
    ):
        assert f"there is no folder {tmp_path / 'no'} to write" in error_line(shell("data", *verb), 2)
    text = tmp_path / "in.txt"
    text.write_text("fine words here\n", encoding="utf-8")
    for report, why in ((text, "in.txt is also read from"), (tmp_path / "o.jsonl", "o.jsonl cannot hold two files")):
        assert why in error_line(shell("data", "clean", text, "--out", tmp_path / "o.jsonl", "--report", report), 2)
    assert not (tmp_path / "o.jsonl").exists() and text.read_text("utf-8") == "fine words here\n"
    for verb in ("clean", "split", "pack", "pull", "list"):
        assert "Example: millis data" in shell("data", verb, "--help").stdout


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The input is a pipe that never ends, so that the command is at work when it is interrupted."""
    pipe, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    out.write_text("old", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(pipe), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "reading\n"
    assert any(path.name.startswith(".out.jsonl.") for path in tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"] and out.read_text("utf-8") == "old"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
from unittest import mock
from millis import cli
def rows(self, inputs):
    if inputs:
        yield "a:1", {"text": "the first row"}
        print("reading", flush=True)
        time.sleep(600)
with mock.patch("millis.data.read.Reader.rows", rows):
    cli.main(["data", "clean", sys.argv[1], "--out", sys.argv[2]])
"""
