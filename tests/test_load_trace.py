"""Loads: arrivals against the laws they should follow, traces, deadlines, and prompts of exactly so many words."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from millis.bench.serve_text import CHINESE, ENGLISH, WORD, Text
from millis.bench.serve_trace import Row, bursts, deadlines, plan, poisson, rates, read_azure
from millis.types import RequestError

SETTINGS: dict[str, Any] = {
    "requests": 50,
    "duration_s": 300.0,
    "output_tokens": 32,
    "deadline": None,
    "seed": "0",
}


def test_poisson_gaps_are_exponential() -> None:
    """Kolmogorov-Smirnov against the exponential law, at the 1 % level."""
    n = 4000
    times = [0.0, *itertools.islice(poisson(5.0, "7"), n)]
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    expected = [1 - math.exp(-5.0 * gap) for gap in gaps]
    distance = max(max(abs(e - i / n), abs(e - (i + 1) / n)) for i, e in enumerate(expected))
    assert distance < 1.63 / math.sqrt(n)
    assert times[1:] == list(itertools.islice(poisson(5.0, "7"), n)) != list(itertools.islice(poisson(5.0, "8"), n))


def test_bursts() -> None:
    assert list(itertools.islice(bursts(8.0, 4), 9)) == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1.0]


def test_a_plan_ends_by_count_and_by_time() -> None:
    found, window_s = plan("poisson", rate=10.0, **SETTINGS)
    assert len(found) == 50 and window_s == found[-1].arrival_s
    short, window_s = plan("poisson", rate=10.0, **SETTINGS | {"duration_s": 2.0})
    assert short == [planned for planned in found if planned.arrival_s <= 2.0] and 5 < len(short) < 40
    found, window_s = plan("burst", rate=8.0, burst=4, **SETTINGS)
    assert len(found) == 50 and window_s == 50 / 8
    assert plan("closed", rate=None, **SETTINGS)[1] == 0.0


def test_deadlines() -> None:
    assert list(itertools.islice(deadlines("500", ""), 3)) == [500.0] * 3
    assert list(itertools.islice(deadlines(None, ""), 2)) == [None, None]
    drawn = [value for value in itertools.islice(deadlines("300-5000", "1"), 2000) if value is not None]
    assert 300 <= min(drawn) < 320 and 4700 < max(drawn) <= 5000 and all(value == int(value) for value in drawn)
    middle = sum(value < math.sqrt(300 * 5000) for value in drawn)  # log-uniform: half below the geometric mean
    assert abs(middle - 1000) < 3 * math.sqrt(2000 / 4)
    for wrong in ("", "0", "x", "-5", "500-300", "1-2-3", "nan", "inf"):
        with pytest.raises(RequestError, match="deadline"):
            next(deadlines(wrong, ""))


def test_rates() -> None:
    assert rates("2, 0.5x,4x", 10.0) == [2.0, 5.0, 40.0]
    with pytest.raises(RequestError, match="--capacity"):
        rates("1x", None)
    for wrong in ("", "x", "2,,3", "0", "-1", "1x2", "nan", "inf", "1e9"):
        with pytest.raises(RequestError, match="--rate"):
            rates(wrong, 10.0)


def azure(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *lines)), encoding="utf-8")
    return path


def test_azures_traces(tmp_path: Path) -> None:
    path = azure(
        tmp_path,
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,4096,500",
        "2023-11-16 18:15:48,20,1",
    )
    rows = read_azure(path)
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [(374, 44), (20, 1), (4096, 500)]
    assert [row.arrival_s for row in rows] == pytest.approx([0, 1.31941, 4.314579])
    found, window_s = plan("azure", rate=None, rows=rows, speed=2.0, **SETTINGS)
    assert [(p.input_tokens, p.output_tokens) for p in found] == [(374, 44), (20, 1), (1024, 128)]
    assert [p.arrival_s for p in found] == pytest.approx([0, 1.31941 / 2, 4.314579 / 2])
    found, window_s = plan("azure", rate=4.0, rows=rows, **SETTINGS)
    assert window_s == pytest.approx(3 / 4) and found[-1].arrival_s == pytest.approx(2 / 4)  # three, four a second
    later = azure(tmp_path, "2024-05-10 00:00:00.009930+00:00,5,1", "2024-05-10 00:00:01.009930+00:00,5,1")
    assert [row.arrival_s for row in read_azure(later)] == [0, 1]  # the form of 2024


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("2023-11-16 18:15:46,374,44",), "fewer than two"),
        (("2023-11-16 18:15:46,374,44", "2023-11-16 18:15:47,374"), "line 3"),
        (("yesterday,374,44",), "line 2"),
        (("2023-11-16 18:15:46,0,44",), "line 2"),
        (("2023-11-16 18:15:46,5,x",), "line 2"),
        (("2023-11-16 18:15:46,5,5", "2023-11-16 18:15:47+00:00,5,5"), "line 3"),
    ],
)
def test_a_trace_that_is_none(lines: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words):
        read_azure(azure(tmp_path, *lines))


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("text,category\nHello,1\n", encoding="utf-8")
    with pytest.raises(RequestError, match="TIMESTAMP,ContextTokens,GeneratedTokens"):
        read_azure(path)


def test_all_arrive_at_once_where_a_trace_says_so() -> None:
    found, window_s = plan("azure", rate=None, rows=[Row(0.0, 5, 5)] * 3, **SETTINGS)
    assert [p.arrival_s for p in found] == [0, 0, 0] and window_s > 0


@pytest.mark.parametrize("words", [1, 2, 3, 60, 700])
@pytest.mark.parametrize("language", ["en", "zh", "both"])
def test_prompts_have_exactly_so_many_words_and_differ_from_the_beginning(language: str, words: int) -> None:
    text = Text.builtin(language)
    prompts = [text.prompt(words, "0", number) for number in range(40)]
    assert {len(WORD.findall(prompt)) for prompt in prompts} == {words}
    assert prompts == [Text.builtin(language).prompt(words, "0", number) for number in range(40)]
    if words > 3:
        assert len({prompt[:14] for prompt in prompts}) == 40
        assert text.prompt(words, "1", 3)[:14] != prompts[3][:14]  # nor does a run with another seed share a prefix


def test_words_in_english_are_what_stands_between_spaces() -> None:
    prompt = Text.builtin("en").prompt(60, "0", 5)
    assert len(prompt.split()) == 60 and prompt.startswith("Case ")
    assert any(sentence in prompt for sentence in ENGLISH)
    prefix = Text.builtin("en").prompt(400, "0", None)
    assert not prefix.startswith("Case") and len(prefix.split()) == 400
    assert len({sentence for sentence in ENGLISH if sentence in prefix}) >= 20  # none twice before each came once
    assert all(len(WORD.findall(sentence)) > 15 for sentence in CHINESE)


def test_text_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("It rains. The road\nis closed! 道路封闭。请绕行。\n\n", encoding="utf-8")
    words = set(WORD.findall("It rains. The road is closed! 道路封闭。请绕行。"))
    prompt = Text.of_file(path).prompt(30, "0", None)
    assert set(WORD.findall(prompt)) <= words and len(WORD.findall(prompt)) == 30
    for content, message in ((b"\n \n", "no words"), (b"\xff\xfe\xfd", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=message):
            Text.of_file(path)
