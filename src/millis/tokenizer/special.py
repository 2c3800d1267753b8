"""Finding special tokens in text: leftmost first, longest first, as every published tokenizer does."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edges:
    """How far a match reaches: over the white space around it, and only as a whole word (`tokenizer.json` flags)."""

    left: bool = False
    right: bool = False
    word: bool = False


class Matcher:
    """Splits text at special tokens.

    Candidates at a position are looked up by their first two characters and their length, so the cost does not grow
    with their number (Gemma has 6,249).
    """

    def __init__(self, tokens: Mapping[str, int], edges: Mapping[str, Edges] | None = None) -> None:
        self._ids = {token: i for token, i in tokens.items() if token}
        self._edges = dict(edges or {})
        lengths: dict[str, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self._start = _starts(lengths)

    def split(self, text: str) -> Iterator[str | int]:
        """Non-empty stretches of plain text, and the ids of the special tokens between them."""
        if self._start is None:
            yield from [text] if text else []
            return
        done = position = 0
        while hit := self._start.search(text, position):
            start = hit.start()
            token = self._longest(text, start)
            if token is None:
                position = start + 1
                continue
            position = start + len(token)
            edges = self._edges.get(token)
            if edges is not None:
                if edges.word and (text[start - 1 : start].isalnum() or text[position : position + 1].isalnum()):
                    continue
                start, position = _reach(text, start, position, edges)
            if start > done:
                yield text[done:start]
            yield self._ids[token]
            done = position
        if done < len(text):
            yield text[done:]

    def _longest(self, text: str, start: int) -> str | None:
        for length in self._lengths.get(text[start : start + 2], ()):
            token = text[start : start + length]
            if token in self._ids:
                return token
        return text[start] if text[start] in self._ids else None


def _starts(starts: Collection[str]) -> re.Pattern[str] | None:
    """A pattern for the first character of a token, where its second follows; None where there are no tokens."""
    seconds: dict[str, str] = {}
    for start in starts:
        seconds[start[0]] = seconds.get(start[0], "") + re.escape(start[1:])
    alone = {start for start in starts if len(start) == 1}
    found = [re.escape(c) + ("" if c in alone else f"(?=[{after}])") for c, after in sorted(seconds.items())]
    return re.compile("|".join(found)) if found else None


def first_characters(tokens: Collection[str]) -> re.Pattern[str] | None:
    """A pattern for any first character of `tokens`, or None where there are no tokens."""
    firsts = {token[0] for token in tokens}
    return re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]") if firsts else None


def _reach(text: str, start: int, end: int, edges: Edges) -> tuple[int, int]:
    while edges.left and start > 0 and text[start - 1].isspace():
        start -= 1
    while edges.right and end < len(text) and text[end].isspace():
        end += 1
    return start, end
