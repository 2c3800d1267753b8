"""Rules of quality: each looks at one property of a text and names the paper or corpus its threshold is from.

Gopher: Rae et al., 2021, Scaling Language Models, appendix A1.1. C4: Raffel et al., 2020, section 2.2. Their words are
written with spaces between them; a Chinese character counts as a word here, as there are no spaces to go by. The rules
for documents are theirs; those for messages (questions, reviews, sentences) leave out what only long texts can satisfy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
LETTER = re.compile(r"[^\W\d_]")
SYMBOL = re.compile(r"#|\.\.\.|…")
BULLET = re.compile(r"^\s*[-*•‣▪●◦·]")
STOP_EN = frozenset("the be to of and that have with".split())  # Gopher's eight
STOP_ZH = frozenset("的了是在和不有这")  # eight of the most frequent characters of written Chinese, in their place
Preset = Literal["messages", "documents", "off"]


class Shape:
    """What the rules look at, each part computed once and only if asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return WORD.findall(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    @cached_property
    def is_han(self) -> bool:
        """Whether most words are Chinese characters."""
        return 2 * len(HAN.findall(self.text)) > len(self.words)

    def share(self, count: int) -> float:
        return count / max(1, len(self.words))


@dataclass(frozen=True, slots=True)
class Rule:
    """A text for which `broken` is true is dropped under the rule's name."""

    name: str
    says: str
    source: str
    broken: Callable[[Shape], bool]


def fewer_than(words: int, source: str = "Gopher") -> Rule:
    return Rule("short", f"fewer than {words} words", source, lambda s: len(s.words) < words)


def more_than(words: int) -> Rule:
    return Rule("long", f"more than {words:,} words", "Gopher", lambda s: len(s.words) > words)


def _mean_length(shape: Shape) -> bool:
    if shape.is_han or not shape.words:  # a character is a character
        return False
    return not 3 <= sum(map(len, shape.words)) / len(shape.words) <= 10


def _stop_words(shape: Shape) -> bool:
    if shape.is_han:
        return len(STOP_ZH & set(shape.text)) < 2
    return len(STOP_EN & {word.strip(".,;:!?\"'()").lower() for word in shape.words}) < 2


def _share_of_lines(shape: Shape, holds: Callable[[str], bool]) -> float:
    return sum(map(holds, shape.lines)) / max(1, len(shape.lines))


def _repeated_lines(shape: Shape) -> bool:
    copies = len(shape.lines) - len(set(shape.lines))
    return copies > 0.3 * len(shape.lines)


def _repeated_characters(shape: Shape) -> bool:
    counts = Counter(shape.lines)
    return sum(len(line) * (n - 1) for line, n in counts.items()) > 0.2 * sum(map(len, shape.lines))


def _top_ngram(shape: Shape) -> bool:
    """Gopher's shares of the most frequent 2-, 3- and 4-gram: 20, 18 and 16 % of all characters."""
    size = sum(map(len, shape.words))
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        gram, count = _most_frequent(shape.words, n)
        if count > 1 and count * sum(map(len, gram)) > limit * size:
            return True
    return False


def _most_frequent(words: list[str], n: int) -> tuple[tuple[str, ...], int]:
    grams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    return grams.most_common(1)[0] if grams else ((), 0)


def _repeated_ngrams(shape: Shape) -> bool:
    """Gopher's shares of characters in n-grams that repeat: 15 % for 5-grams down to 10 % for 10-grams."""
    size, words = sum(map(len, shape.words)), shape.words
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        seen, covered = set[tuple[str, ...]](), bytearray(len(words))
        for start in range(len(words) - n + 1):
            gram = tuple(words[start : start + n])
            if gram in seen:
                covered[start : start + n] = b"\1" * n
            seen.add(gram)
        if sum(len(word) for word, again in zip(words, covered, strict=True) if again) > limit * size:
            return True
    return False


def _only_symbols(shape: Shape) -> bool:
    return not LETTER.search(shape.text)


def _one_word(shape: Shape) -> bool:
    """The same word, or the same two in turn, over and over: long enough to be no "no no no"."""
    return len(shape.words) >= 8 and len(set(shape.words)) <= 2


def _broken_text(shape: Shape) -> bool:
    return shape.text.count("\ufffd") > 0.01 * len(shape.text)


SYMBOLS = Rule(
    "symbols", "more than 1 hash or ellipsis for 10 words", "Gopher",
    lambda s: len(SYMBOL.findall(s.text)) > 0.1 * len(s.words),
)  # fmt: skip
LETTERLESS = Rule(
    "letterless words", "fewer than 80 % of words hold a letter", "Gopher",
    lambda s: s.share(sum(1 for word in s.words if LETTER.search(word))) < 0.8,
)  # fmt: skip
REPLACED = Rule("undecodable", "more than 1 % of characters are U+FFFD", "own", _broken_text)
MESSAGES = (
    fewer_than(1, "own"),
    more_than(100_000),
    REPLACED,
    Rule("no letter", "no letter of any script", "own", _only_symbols),
    Rule("one word", "8 words or more, 2 different ones at most", "own, after Gopher's repetition", _one_word),
)
DOCUMENTS = (
    fewer_than(50),
    more_than(100_000),
    REPLACED,
    Rule("word length", "mean word length outside 3 to 10 letters; not for Chinese", "Gopher", _mean_length),
    SYMBOLS,
    Rule("bullets", "more than 90 % of lines begin with a bullet", "Gopher",
         lambda s: _share_of_lines(s, lambda line: bool(BULLET.match(line))) > 0.9),
    Rule("ellipses", "more than 30 % of lines end with an ellipsis", "Gopher",
         lambda s: _share_of_lines(s, lambda line: line.rstrip().endswith(("...", "…"))) > 0.3),
    LETTERLESS,
    Rule("stop words", "fewer than 2 kinds of stop words; for Chinese, of frequent characters", "Gopher", _stop_words),
    Rule("repeated lines", "more than 30 % of lines are copies", "Gopher", _repeated_lines),
    Rule("repeated characters", "more than 20 % of characters are in copies of lines", "Gopher", _repeated_characters),
    Rule("top n-gram", "one 2-, 3- or 4-gram holds more than 20, 18 or 16 % of characters", "Gopher", _top_ngram),
    Rule("repeated n-grams", "n-grams that repeat hold more than 15 % (5) to 10 % (10) of characters", "Gopher",
         _repeated_ngrams),
    Rule("lorem ipsum", "the words lorem ipsum", "C4", lambda s: "lorem ipsum" in s.text.lower()),
)  # fmt: skip
PRESETS: dict[str, Sequence[Rule]] = {"messages": MESSAGES, "documents": DOCUMENTS, "off": ()}


def first_broken(text: str, rules: Sequence[Rule]) -> Rule | None:
    """The first rule that a text breaks, or None."""
    shape = Shape(text)
    return next((rule for rule in rules if rule.broken(shape)), None)
