"""The index of the text against a plain search, and what it proposes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millis.engine.ngram import LONGEST, NgramIndex


def search(tokens: list[int]) -> tuple[int, int]:
    """(place, length) of the latest of the longest earlier matches of the end, by trying every place; (−1, 0): none."""
    best = (-1, 0)
    for place in range(len(tokens) - 1):
        length = 0
        while length < LONGEST and length <= place and tokens[place - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= 2 and length >= best[1]:
            best = (place, length)
    return best


@given(st.lists(st.integers(0, 3), max_size=14), st.integers(1, 9))
def test_lookup_finds_the_latest_longest_match(tokens: list[int], most: int) -> None:
    """Fourteen tokens have fewer places than the index looks at, so that it must find what the search finds."""
    draft, length = NgramIndex().lookup(tokens, most)
    place, want = search(tokens)
    assert length == want
    if place < 0:
        assert draft == []
        return
    text = [*tokens, *draft]
    assert len(draft) == most
    assert all(text[place + 1 + i] == draft[i] for i in range(most))  # goes on as the text did, into itself if need be


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 7))
def test_growing_by_pieces_changes_nothing(tokens: list[int], piece: int) -> None:
    index = NgramIndex()
    for end in range(1, len(tokens), piece):
        index.update(tokens[:end])
        index.update(tokens[:end])
    assert index.lookup(tokens, 4) == NgramIndex().lookup(tokens, 4)


def test_a_repetition_is_continued() -> None:
    assert NgramIndex().lookup([7, 1, 2, 3, 1, 2, 3], 8) == ([1, 2, 3, 1, 2, 3, 1, 2], 3)
    assert NgramIndex().lookup([5] * 4, 3) == ([5, 5, 5], 3)


def test_one_equal_token_is_no_match() -> None:
    assert NgramIndex().lookup([1, 2, 3, 1], 4) == ([], 0)
    assert NgramIndex().lookup([1], 4) == ([], 0)


def test_a_longer_match_beats_a_later_one() -> None:
    tokens = [1, 2, 3, 4, 50, 3, 4, 60, 1, 2, 3, 4]
    assert NgramIndex().lookup(tokens, 2) == ([50, 3], 4)
