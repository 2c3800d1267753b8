"""a document's text → passages: a few lines or sentences each, never across a heading, overlapping by one"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from millis.documents.terms import CJK

PASSAGE_SIZE = 240  # of `size`: about sixty tokens
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=\S)|(?<=[。！？；])[”’」』）]*")
_HEADING = re.compile(r"\s{0,3}#{1,6}\s+(?P<text>.+?)[\s#]*$")
_RULE = re.compile(r"[\s|:*_=-]*$")  # the line under a table's head, a ruler, an empty line
_CJK = re.compile(f"[{CJK}]")


@dataclass(frozen=True, slots=True)
class Span:
    """text[start:stop] of a document, and the heading it stands under ("" where there is none)."""

    start: int
    stop: int
    heading: str


def size(text: str) -> int:
    """How much a model has to read, in characters of English: one of Chinese is about a token, as three of English."""
    return len(text) + 2 * len(_CJK.findall(text))


def units(text: str, start: int = 0, stop: int | None = None) -> Iterator[Span]:
    """The lines of a text, long ones by sentence: what can be quoted. Headings and rulers are none."""
    heading = ""
    for line in re.finditer(r"[^\n]+", text[:stop] if start == 0 else text[start:stop]):
        words = line.group()
        found = _HEADING.match(words)
        if found is not None:
            heading = found["text"]
        elif not _RULE.fullmatch(words):
            for begin, end in _sentences(words):
                yield Span(start + line.start() + begin, start + line.start() + end, heading)


def passages(text: str) -> list[Span]:
    """Cuts a text into overlapping spans of about PASSAGE_SIZE; every unit lies in at least one."""
    spans: list[Span] = []
    window: list[Span] = []
    for unit in units(text):
        if window and unit.heading != window[0].heading:
            spans.append(_joined(window))
            window = []
        if window and size(text[window[0].start : unit.stop]) > PASSAGE_SIZE:
            spans.append(_joined(window))
            last = window[-1]
            window = [last] if len(window) > 1 and size(text[last.start : unit.stop]) <= PASSAGE_SIZE else []
        window.append(unit)
    return [*spans, _joined(window)] if window else spans


def _joined(window: list[Span]) -> Span:
    return Span(window[0].start, window[-1].stop, window[0].heading)


def _sentences(line: str) -> Iterator[tuple[int, int]]:
    """Begin and end of the sentences of a line, blanks left out; a line that is short stays whole."""
    if size(line) <= PASSAGE_SIZE:
        cuts = [0, len(line)]
    else:
        cuts = [0, *(cut.end() for cut in _SENTENCE_END.finditer(line)), len(line)]
    for begin, end in zip(cuts, cuts[1:], strict=False):
        yield from _pieces(line, begin, end)


def _pieces(line: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """A sentence without the blanks around it; one without end is cut at blanks where there are some."""
    while end > begin and line[end - 1].isspace():
        end -= 1
    while begin < end and line[begin].isspace():
        begin += 1
    limit = 4 * PASSAGE_SIZE
    while end - begin > limit:
        cut = line.rfind(" ", begin + limit // 2, begin + limit) + 1 or begin + limit
        yield from _pieces(line, begin, cut)
        begin = cut
    if begin < end:
        yield begin, end
