"""Cleaning: every row is read, made plain, judged, masked, compared with those before it, and written or counted out.

The order: fields, scrub, language, rules of quality, masks, copies (of the test side first, then of rows before it).
One row is in memory at a time; what copies need is in a temporary file (duplicates.py).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millis.data import language, private, quality, scrub, write
from millis.data.duplicates import Known, Seen, signature
from millis.data.read import Reader, Row
from millis.data.report import EXCERPT_CHARS, Report
from millis.hub.progress import Progress
from millis.types import DataError

FIELDS = (("text",), ("source", "target"), ("context",), ("content",), ("sentence",), ("review",), ("body",))
UNTOUCHED = ("id", "label")
COPIES = {
    "in the test set": ("a copy or near copy of a text that is kept for testing", "Lee et al., 2021, Deduplicating"),
    "two labels": ("the same text with two labels: neither is kept", "own"),
    "copy": ("the same text, once case, width and white space are made alike", "C4, Gopher"),
    "near copy": ("MinHash finds it similar to a text before it", "Broder, 1997; Gopher"),
    "language": ("of another language than those asked for", "Joulin et al., 2016 (lid.176)"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What cleaning does. Raises DataError for values that there are not."""

    text: tuple[str, ...] = ()  # fields that are cleaned; (): text, or source and target, or what looks like it
    label: str = "label"  # field of the label; written as "label"
    html: bool = True  # take out tags where there are any
    nfkc: bool = False  # fold full-width forms and the like
    space: bool = True  # one space of many
    rules: quality.Preset = "messages"
    languages: tuple[str, ...] = ()  # ISO 639 codes that are kept; (): all
    near: float = 0.8  # similarity from which a text is a near copy; 0: exact copies only
    mask: tuple[str, ...] = private.KINDS
    regions: tuple[str, ...] = private.REGIONS

    def __post_init__(self) -> None:
        if self.rules not in quality.PRESETS:
            raise DataError(f"there are no rules {self.rules!r}; there are {', '.join(quality.PRESETS)}")
        if unknown := set(self.mask) - set(private.KINDS):
            raise DataError(f"{', '.join(sorted(unknown))} cannot be masked; {', '.join(private.KINDS)} can")
        if self.languages and (strange := sorted(set(self.languages) - language.known())):
            raise DataError(f"{', '.join(strange)}: no language that is told apart; give ISO 639 codes, such as zh,en")
        if self.near and not 0.3 <= self.near <= 1:
            raise DataError(f"the similarity of near copies must be 0 (off) or lie in [0.3, 1], not {self.near}")


def clean(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    against: Sequence[str | os.PathLike[str]] = (),
    reader: Reader | None = None,
    progress: Progress | None = None,
) -> Report:
    """Cleans files, folders or named sets into one file of JSON lines, and reports what was dropped and why.

    `against`: files kept for testing; rows that copy one of their texts are dropped. Raises DataError for what cannot
    be read or written; lines that are no row are counted, and told to `reader.complain`.
    """
    reader, settings, path = reader or Reader(), settings or Settings(), Path(out)
    reader.progress = progress or reader.progress
    report = Report(settings=settings, inputs=[os.fspath(name) for name in inputs])
    complain = reader.complain

    def note(where: str, why: str) -> None:
        report.bad_line(where, why)
        complain(where, why)

    reader.complain = note
    with write.rows_file(path, (*inputs, *against)) as file:
        with Seen(settings.near or 1.0) as tests, Seen(settings.near or 1.0) as seen:
            cleaner = _Cleaner(settings, report, seen, tests)
            for number, (where, row) in enumerate(reader.rows(against)):
                cleaner.keep_for_test(number, where, row)
            for where, row in reader.rows(inputs):
                if (made := cleaner.judge(where, row)) is not None:
                    file.write(write.line(made))
            report.encodings = dict(reader.encodings)
            if report.read == 0 and report.bad:
                raise DataError(f"no row could be read: {report.bad_examples[0]}")
            write.take_out(file, cleaner.retracted)
    reader.complain = complain
    return report


def clean_rows(rows: Iterable[Mapping[str, Any]], settings: Settings | None = None) -> tuple[list[Row], Report]:
    """Cleans rows of a program's own, such as a `datasets` data set, in memory: (rows kept, report)."""
    settings = settings or Settings()
    report, kept = Report(settings=settings, inputs=["rows"]), list[Row]()
    with Seen(settings.near or 1.0) as tests, Seen(settings.near or 1.0) as seen:
        cleaner = _Cleaner(settings, report, seen, tests)
        for number, row in enumerate(rows, 1):
            if (made := cleaner.judge(f"row {number}", dict(row))) is not None:
                kept.append(made)
        return [row for number, row in enumerate(kept) if number not in cleaner.retracted], report


class _Cleaner:
    """Judges rows one after the other."""

    def __init__(self, settings: Settings, report: Report, seen: Seen, tests: Seen) -> None:
        self.settings, self.report, self.seen, self.tests = settings, report, seen, tests
        self.rules = quality.PRESETS[settings.rules]
        self.retracted: set[int] = set()  # numbers of rows written whose text came again with another label
        self.kept, self.has_tests = 0, False

    def keep_for_test(self, number: int, where: str, row: Row) -> None:
        """Remembers a row of the test side, cleaned as the others are."""
        if (made := self._plain(where, row)) is not None:
            fields = self._fields(made)
            text = _compared(self._masked({name: made[name] for name in fields})[0], fields)
            self.has_tests = True
            self.tests.keep(Known(number, where, None, text[:EXCERPT_CHARS]), text, self._signature(text))

    def judge(self, where: str, row: Row) -> Row | None:
        """The cleaned row, or None where it is dropped; counted either way."""
        plain = self._plain(where, row)
        if plain is None:
            return None
        try:
            masked, masks = self._masked(plain)
        except RecursionError:
            self.report.bad_line(where, "nested too deeply")
            return None
        self.report.read += 1
        fields = self._fields(plain)
        text, shown = _compared(plain, fields), _compared(masked, fields)
        self.report.changed += text != _compared(row, self._named(row))
        code, _ = language.language(text)
        reason = self._broken(text, [plain[name] for name in fields], code)
        counted: dict[str, Any] = {"language": code, "characters": len(shown), "masks": masks}
        if reason is not None:
            self.report.dropped(reason, where, shown)
        elif not self._is_copy(where, shown, masked.get("label"), counted):
            self.report.kept(masked.get("label"), **counted)
            self.kept += 1
            return masked
        return None

    def _plain(self, where: str, row: Row) -> Row | None:
        """The row scrubbed, its label called "label"; None, and noted, where it has no text."""
        settings, fields = self.settings, self._named(row)
        missing = [name for name in fields if not isinstance(row.get(name), str)]
        if missing or not fields:
            has = ", ".join(map(str, row)) or "nothing"
            self.report.bad_line(where, f"no text in {', '.join(missing) or 'any field'}; the row has {has}")
            return None
        made = {
            name: scrub.scrub(row[name], html=settings.html, nfkc=settings.nfkc, space=settings.space)
            for name in fields
        }
        if len(fields) == 1:
            made = {"text": made[fields[0]]}
        if (label := row.get(settings.label)) is not None:
            made["label"] = label
        rest = {name: value for name, value in row.items() if name not in (*fields, settings.label, *made)}
        return {**made, **rest}

    def _named(self, row: Row) -> tuple[str, ...]:
        """The text fields of a row as it was read."""
        return self.settings.text or next((names for names in FIELDS if all(name in row for name in names)), ())

    def _fields(self, plain: Row) -> tuple[str, ...]:
        """The text fields of a row that `_plain` made."""
        chosen = self.settings.text
        if len(chosen) > 1:
            return chosen
        return ("text",) if "text" in plain else ("source", "target")

    def _broken(self, text: str, parts: list[str], code: str) -> quality.Rule | str | None:
        if self.settings.languages and code not in self.settings.languages:
            return "language"
        return next((rule for part in parts if (rule := quality.first_broken(part, self.rules))), None)

    def _masked(self, row: Row) -> tuple[Row, dict[str, int]]:
        """Every string of the row masked, those inside lists and objects, too, but its id and label."""
        counts = Counter[str]()

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                value, found = private.mask(value, self.settings.mask, self.settings.regions)
                counts.update(found)
            elif isinstance(value, dict):
                value = {name: masked(part) for name, part in value.items()}
            elif isinstance(value, list | tuple):
                value = [masked(part) for part in value]
            return value

        if not self.settings.mask:
            return row, counts
        return {name: value if name in UNTOUCHED else masked(value) for name, value in row.items()}, counts

    def _is_copy(self, where: str, text: str, label: Any, counted: dict[str, Any]) -> bool:
        """Whether a text was seen before; if not, it is remembered, with what the report counts it as."""
        entries = self._signature(text)
        test = self._in_test(text, entries) if self.has_tests else None
        if test is not None:
            self.report.dropped("in the test set", where, text, test)
            return True
        named = None if label is None else str(label)
        known = self.seen.exact(text)
        if known is not None and None not in (known.label, named) and known.label != named:
            if known.number not in self.retracted:
                self.report.taken_back("two labels", known.label, **known.counted)
            self.retracted.add(known.number)
            self.report.dropped("two labels", where, text, known)
        elif known is not None:
            self.report.dropped("copy", where, text, known)
        elif entries is not None and (known := self.seen.near(entries)) is not None:
            self.report.dropped("near copy", where, text, known)
        else:
            self.seen.keep(Known(self.kept, where, named, text[:EXCERPT_CHARS], counted=counted), text, entries)
        return known is not None

    def _in_test(self, text: str, entries: Any) -> Known | None:
        return self.tests.exact(text) or (None if entries is None else self.tests.near(entries))

    def _signature(self, text: str) -> Any:
        return signature(text) if self.settings.near else None


def _compared(row: Row, fields: Sequence[str]) -> str:
    return "\n".join(row[name] for name in fields)
