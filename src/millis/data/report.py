"""What cleaning did: counts by rule, languages, lengths, labels, masks, and examples of what was dropped, and why."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis.data.quality import PRESETS, Rule
from millis.data.write import replacing

if TYPE_CHECKING:
    from millis.data.cleaning import Settings
    from millis.data.duplicates import Known

EXCERPT_CHARS = 200
EXAMPLES = 5  # of each rule, drawn evenly from all that it dropped
BAD_EXAMPLES = 20


@dataclass(slots=True)
class Example:
    """A row that was dropped, its personal data masked, and the text it copies where that is the reason."""

    where: str
    text: str
    like: str | None = None
    like_where: str | None = None
    similarity: float | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """Counts and examples; `asdict` for programs, `html` for people."""

    settings: Settings
    inputs: list[str]
    read: int = 0  # rows with text
    written: int = 0
    changed: int = 0  # rows whose text scrubbing changed
    bad: int = 0  # lines that are no row, and rows without text
    bad_examples: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # dropped rows by rule
    examples: dict[str, list[Example]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)  # of rows kept
    labels: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)  # masks by kind
    lengths_kept: Counter[int] = field(default_factory=Counter)  # n: texts of [2^n, 2^(n+1)) characters
    lengths_dropped: Counter[int] = field(default_factory=Counter)
    encodings: dict[str, str] = field(default_factory=dict)  # file → what it was read as, where that is not UTF-8
    began: float = field(default_factory=time.monotonic)
    _draw: random.Random = field(default_factory=lambda: random.Random(0))

    def kept(self, label: Any, *, language: str, characters: int, masks: Mapping[str, int]) -> None:
        self.written += 1
        self.languages[language] += 1
        if label is not None:
            self.labels[str(label)] += 1
        self.masked.update(masks)
        self.lengths_kept[_bin(characters)] += 1

    def dropped(self, rule: Rule | str, where: str, text: str, like: Known | None = None) -> None:
        name = rule if isinstance(rule, str) else rule.name
        self.reasons[name] += 1
        self.lengths_dropped[_bin(len(text))] += 1
        example = Example(where, text[:EXCERPT_CHARS])
        if like is not None:
            example.like, example.like_where, example.similarity = like.text, like.where, round(like.similarity, 3)
        self._show(name, example)

    def taken_back(self, name: str, label: Any, *, language: str, characters: int, masks: Mapping[str, int]) -> None:
        """A row that was counted as kept is dropped after all; all but the first argument as it was counted."""
        self.written -= 1
        self.reasons[name] += 1
        self.languages[language] -= 1
        self.labels[str(label)] -= 1
        self.masked.subtract(masks)
        self.lengths_kept[_bin(characters)] -= 1
        self.lengths_dropped[_bin(characters)] += 1

    def bad_line(self, where: str, why: str) -> None:
        self.bad += 1
        if len(self.bad_examples) < BAD_EXAMPLES:
            self.bad_examples.append(f"{where}: {why}")

    def _show(self, name: str, example: Example) -> None:
        """Keeps a fair sample (reservoir, Vitter 1985), so that not only the first file shows."""
        shown = self.examples.setdefault(name, [])
        if len(shown) < EXAMPLES:
            shown.append(example)
        elif (place := self._draw.randrange(self.reasons[name])) < EXAMPLES:
            shown[place] = example

    def explained(self) -> dict[str, tuple[str, str]]:
        """(what it says, source) of every rule that dropped something."""
        from millis.data.cleaning import COPIES

        rules = {rule.name: (rule.says, rule.source) for rule in PRESETS[self.settings.rules]}
        return {name: ({**rules, **COPIES})[name] for name in self.reasons}

    def asdict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        explained = self.explained()
        return {
            "inputs": self.inputs,
            "settings": asdict(self.settings),
            "read": self.read,
            "kept": self.written,
            "dropped": {
                name: {"rows": count, "rule": explained[name][0], "source": explained[name][1]}
                for name, count in self.reasons.most_common()
            },
            "bad": self.bad,
            "bad_lines": self.bad_examples,
            "changed": self.changed,
            "masked": _counts(self.masked),
            "languages": _counts(self.languages),
            "labels": _counts(self.labels),
            "characters_kept": _ranges(self.lengths_kept),
            "characters_dropped": _ranges(self.lengths_dropped),
            "encodings": self.encodings,
            "examples": {name: [asdict(example) for example in shown] for name, shown in self.examples.items()},
            "seconds": round(time.monotonic() - self.began, 3),
        }

    def save(self, path: Path) -> None:
        """Writes the report: a page for a name that ends in .html, JSON otherwise. Raises DataError and OSError."""
        from millis.data.page import page

        value = self.asdict()
        if path.suffix in (".html", ".htm"):
            text = page(value)
        else:
            text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        with replacing(path) as file:
            file.write(text.encode("utf-8", "replace"))


def _counts(counter: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counter.most_common() if count}


def _bin(characters: int) -> int:
    return max(0, characters.bit_length() - 1)


def _ranges(counts: Counter[int]) -> dict[str, int]:
    """Counts by range of characters, from the shortest to the longest, the empty ones between them included."""
    present = [n for n in counts if counts[n]]
    return {f"{2**n}-{2 ** (n + 1) - 1}": counts[n] for n in range(min(present), max(present) + 1)} if present else {}
