"""documents alone: terms, passages, BM25 against its formula, neighbours against all cosines, files that are read"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millis.documents.bm25 import K1, B, Postings, top
from millis.documents.passages import PASSAGE_SIZE, passages, size, units
from millis.documents.reader import from_values, read
from millis.documents.store import Document
from millis.documents.terms import is_cjk, question_terms, terms
from millis.documents.vectors import Vectors, quantise
from millis.types import RequestError

TEXT = """# Fees
- Monthly fee: $5.00
- Overdraft fee: $12.50

## Limits
| Item | Value |
|---|---|
| Cash per day | $400 |

""" + " ".join(f"This is sentence number {i}, which says a little." for i in range(30))


@pytest.mark.parametrize(
    ("one", "other"),
    [("fees", "fee"), ("charged", "charges"), ("policies", "policy"), ("stopping", "stop"), ("$2,500", "2500"),
     ("Café", "cafe"), ("ＡＢＣ", "abc"), ("bank's", "bank"), ("applied", "apply")],
)  # fmt: skip
def test_forms_of_a_word_are_one_term(one: str, other: str) -> None:
    assert terms(one) == terms(other)


def test_numbers_and_names_stay_apart() -> None:
    assert len({*terms("12.5 125 1.25 APY ATM")}) == 5


def test_chinese_is_searched_by_pairs() -> None:
    assert terms("信用卡年费 card") == ["信用", "用卡", "卡年", "年费", "card"]
    assert question_terms("信用卡的年费是多少？") == ["信用", "用卡", "年费"]
    assert is_cjk("信用卡 fee") and not is_cjk("fee 卡 of a card")


def test_a_question_is_about_its_content_words() -> None:
    assert question_terms("What is the fee for an overdraft, and what is a fee?") == question_terms("fee overdraft")


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .!?\n#|-。你好\t"), max_size=600) | st.just(TEXT))
def test_passages_hold_every_unit_and_units_every_word(text: str) -> None:
    spans, lines = passages(text), list(units(text))
    assert all(any(s.start <= u.start and u.stop <= s.stop for s in spans) for u in lines)
    held = {i for u in lines for i in range(u.start, u.stop)}
    for line_start, line in _lines(text):
        if line.strip() and not line.lstrip().startswith("#") and any(c.isalpha() for c in line):
            missing = [c for i, c in enumerate(line) if line_start + i not in held and c.isalnum()]
            assert not missing
    assert all(text[s.start : s.stop].strip() == text[s.start : s.stop] for s in spans)


def test_passages_are_short_carry_their_heading_and_overlap() -> None:
    spans = passages(TEXT)
    assert [s.heading for s in spans[:2]] == ["Fees", "Limits"]
    assert "Monthly fee" in TEXT[spans[0].start : spans[0].stop] and "Cash" not in TEXT[spans[0].start : spans[0].stop]
    assert all(size(TEXT[s.start : s.stop]) <= PASSAGE_SIZE for s in spans)
    long = spans[2:]
    assert all(a.start < b.start < a.stop for a, b in zip(long, long[1:], strict=False))


def test_a_text_without_blanks_is_cut_all_the_same() -> None:
    assert max(s.stop - s.start for s in passages("x" * 20_000)) <= 4 * PASSAGE_SIZE


def test_bm25_is_its_formula() -> None:
    rng = np.random.default_rng(1)
    bags = [Counter(rng.integers(0, 30, rng.integers(1, 40)).tolist()) for _ in range(50)]
    rows = [(term, row, count) for row, bag in enumerate(bags) for term, count in bag.items()]
    postings = Postings(*np.array(rows, np.int64).T, 30, 50)
    asked = [3, 7, 29]
    mean = sum(sum(bag.values()) for bag in bags) / 50
    for row, bag in enumerate(bags):
        want = 0.0
        for term in asked:
            df = sum(term in other for other in bags)
            idf = math.log(1 + (50 - df + 0.5) / (df + 0.5))
            want += idf * bag[term] * (K1 + 1) / (bag[term] + K1 * (1 - B + B * sum(bag.values()) / mean))
        assert postings.scores(asked)[row] == pytest.approx(want, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0001, 7.25]), min_size=1, max_size=200), st.integers(1, 20))
def test_the_best_are_those_of_a_sort(values: list[float], count: int) -> None:
    scores = np.array(values, np.float32)
    rows, best = top(scores, count)
    want = [i for i in sorted(range(len(values)), key=lambda i: (-scores[i], i)) if values[i] > 0][:count]
    assert rows.tolist() == want and best.tolist() == scores[want].tolist()


def test_neighbours_are_those_of_all_cosines() -> None:
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((40, 96)).astype(np.float32)
    x = np.repeat(centres, 50, axis=0) + 0.8 * rng.standard_normal((2000, 96)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    vectors = Vectors(quantise(x))
    hits = 0
    for question in x[::40]:
        rows, cosines = vectors.best(question, 10)
        exact = x @ question
        assert cosines == pytest.approx(exact[rows], abs=0.02)
        hits += len(set(rows.tolist()) & set(np.argsort(-exact)[:10].tolist()))
    assert hits >= 0.95 * 10 * len(x[::40])


def test_bits_are_counted_without_numpy_2_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).standard_normal((1000, 100)).astype(np.float32)
    vectors = Vectors(quantise(x))
    first = vectors.best(x[0], 5)[0].tolist()
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert vectors.best(x[0], 5)[0].tolist() == first and first[0] == 0


def test_files_become_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Fees\nFive dollars.", "utf-8")
    (tmp_path / ".hidden.txt").write_text("no", "utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"id": 7, "title": "T", "content": "one\u2028text"}\n\n')
    (tmp_path / "c.json").write_text('[{"id": "x", "text": "余额"}]', "utf-8")
    found = [(d.id, d.title, d.text) for d in read([tmp_path])]
    want = [(str(tmp_path / "a.md"), "Fees", "# Fees\nFive dollars."), ("7", "T", "one\u2028text"), ("x", "", "余额")]
    assert found == want
    assert [d.id for d in from_values(["one", {"id": "b", "text": "two"}])] == ["1", "b"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.pdf", b"%PDF", "of no kind that is read"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.json", b"[{]", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b'[{"id": "a"}]', "exactly one of text, content, body"),
        ("a.json", b'[{"id": "a", "text": "t", "tags": 1}]', "unknown fields tags"),
        ("a.jsonl", b'{"text": "t"}', "line 1 has no id"),
        ("a.jsonl", b'{"id": "a", "text": ["t"]}', "no text that is a text"),
        ("a.jsonl", b'{"id": "a", "text": "\\ud800"}', "characters that no text has"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.json", b"3", "is no object"),
    ],
)
def test_files_that_hold_no_documents_are_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=complaint) as error:
        list(read([tmp_path / name]))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [(("a", "", "x\ud800"), "characters that no text has"), ((1, "", "x"), "no id"), (("", "", "x"), "empty id"),
     (("a", None, "x"), "no title"), (("a", "", None), "no text")],
)  # fmt: skip
def test_documents_that_are_none_are_named(wrong: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=f"document 1 has .*{complaint}"):
        from_values(["one", Document(*wrong)])


@pytest.mark.parametrize("name", ["bank_questions.jsonl", "bank_tuning.jsonl"])
def test_the_questions_are_half_answerable(name: str) -> None:
    path = Path(__file__).parent / "data" / name
    questions: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert sum(bool(q["documents"]) for q in questions) * 2 == len(questions)
    assert len({q["question"] for q in questions}) == len(questions)


def _lines(text: str) -> list[tuple[int, str]]:
    found, at = [], 0
    for line in text.split("\n"):
        found.append((at, line))
        at += len(line) + 1
    return found
