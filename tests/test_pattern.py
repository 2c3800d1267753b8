"""Short matches of patterns, judged by re, and their endings."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millis.engine.pattern import endings, short_match


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^v\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?$", "v0.0.0"),
        (r"([a-z]{1,10} ){3,80}end", "a a a end"),
        (r"<think>(.|\n)*</think>\n\{.*\}", "<think></think>\n{}"),
        (r"(?i)abc(?:dd|e){2}", "abcee"),
        (r"(?P<year>[1-9]\d{3})-\x41\u0042\x{43}", "1000-ABC"),
        (r"[^a-z]{2}[\u4e00-\u9fff]+", "00一"),
        (r"\p{Lu}a{2,}?|toolong", "Aaa"),
        (r"\p{Han}+[\p{Lu}\pN]\P{L}", "一0 "),
        (r"a?b*?c+?", "c"),
        ("one|", ""),
    ],
)
def test_a_short_match_is_as_short_as_the_pattern_lets_it(pattern: str, text: str) -> None:
    assert short_match(pattern) == text


ATOMS = ["a", "é", r"\.", r"\d", r"[b-d]", "[^a]", ".", r"\n", r"\x41", "x{2}", "y{1,3}", "z*", "w+?", "(?:uv)?"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: f"({'|'.join(some)})"),
        inner.map(lambda one: f"(?:{one}){{2}}"),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(pattern=PATTERNS)
def test_a_short_match_matches(pattern: str) -> None:
    assert re.fullmatch(pattern, short_match(pattern))


@given(text=st.text(r"(){}[]|\?*+^$-,ax0pPu", max_size=30))
def test_no_text_is_too_malformed(text: str) -> None:
    assert isinstance(short_match(text), str)


def test_the_longest_branches_may_be_asked_for() -> None:
    assert short_match("(?:^|,)a|b{1,2}", longest=True) == ",a"
    assert short_match("^a|b$", longest=True) == "b"


def test_endings_come_shortest_first_and_the_whole_at_last() -> None:
    assert list(endings("abc", 9)) == ["c", "bc", "abc"]
    assert list(endings("abcdef", 3)) == ["f", "ef", "abcdef"]
    assert list(endings("", 3)) == []
