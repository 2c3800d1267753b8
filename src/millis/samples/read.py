"""Samples out of files: rows of CSV, TSV, JSON and JSONL, or whole texts. A bad row is reported, never fatal."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millis.samples.encoding import MARKS, SAMPLE_BYTES, encoding_of, is_utf8, text_lines
from millis.samples.table import Fault, table
from millis.types import RequestError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".md")
_SHOWN = 1000  # skipped rows that are kept with their reason; the others are only counted
_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as its file has it. `fields`: column → value; a text file's rows have the one field `text`."""

    file: Path
    line: int  # the first line is 1
    fields: Mapping[str, Any]


@dataclass(slots=True)
class Skipped:
    """The rows that were left out, each with file, line and reason; and which files are not in UTF-8, but in what."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    encodings: dict[str, str] = field(default_factory=dict)

    def add(self, file: Path, line: int, reason: str, count: int = 1) -> None:
        """`count`: how many lines it took."""
        self.reasons[reason.partition(":")[0]] += count
        if len(self.rows) < _SHOWN:
            self.rows.append({"file": str(file), "line": line, "reason": reason})

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def summary(self) -> str:
        """`3 rows skipped (2 malformed, 1 empty), the first at data.csv:17 (3 values for 2 columns)`."""
        parts = ", ".join(f"{n} {reason}" for reason, n in self.reasons.most_common())
        first = self.rows[0]
        rows = "row" if self.count == 1 else "rows"
        why = first["reason"].partition(": ")[2]
        return f"{self.count} {rows} skipped ({parts}), the first at {first['file']}:{first['line']}" + (
            f" ({why})" if why else ""
        )

    def said(self) -> list[str]:
        """What a user should hear of the files, a line each."""
        lines = [f"{path} is {name}, not UTF-8; it was read as that" for path, name in self.encodings.items()]
        return [*lines, *([self.summary()] if self.count else [])]


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name, folders searched, in a fixed order. RequestError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
            if not inside:
                raise RequestError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
            found += inside
        elif not path.is_file():
            raise RequestError(f"there is no file or folder {path}")
        elif path.suffix not in SUFFIXES:
            raise RequestError(f"{path}: data files end in {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    return found


def read_rows(paths: Iterable[Path], skipped: Skipped) -> Iterator[Row]:
    """Every row of the files, in order. A text file is one row; see `read_lines` for its lines."""
    for path in paths:
        if path.suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, skipped)
        elif path.suffix in (".jsonl", ".ndjson"):
            for line, text in _lines(path, skipped):
                if text.strip():
                    yield from _json_row(path, line, text, skipped)
        elif path.suffix == ".json":
            yield from _json_file(path, skipped)
        elif (whole := _whole(path, skipped)) is not None:
            yield Row(path, 1, {"text": whole})


def _whole(path: Path, skipped: Skipped) -> str | None:
    data = path.read_bytes()
    encoding = _encoding(path, data[:SAMPLE_BYTES], skipped)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        skipped.add(path, data[: error.start].count(b"\n") + 1, _not(encoding))
        return None


def _lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is of the file's encoding, with its line end."""
    with open(path, "rb") as file:
        encoding = _encoding(path, file.read(SAMPLE_BYTES), skipped)
        file.seek(0)
        for number, line in enumerate(text_lines(file, encoding, _MAX_LINE_BYTES), 1):
            if line is None:
                skipped.add(path, number, "line too long")
                continue
            try:
                yield number, line if isinstance(line, str) else line.decode(encoding)
            except UnicodeDecodeError:
                skipped.add(path, number, _not(encoding))


def _encoding(path: Path, sample: bytes, skipped: Skipped) -> str:
    """UTF-8 unless the bytes say otherwise; one bad line is a bad line, not another encoding. DataError: no text."""
    marked = sample.startswith(tuple(mark for mark, _ in MARKS))
    if not marked and 10 * sample.count(0) <= len(sample) and sum(not is_utf8(x) for x in sample.split(b"\n")) < 2:
        return "utf-8"
    encoding = encoding_of(path, sample, "convert it to UTF-8 first")
    if not encoding.startswith("utf-8"):
        skipped.encodings[str(path)] = encoding
    return encoding


def _not(encoding: str) -> str:
    return "not UTF-8" if encoding.startswith("utf-8") else f"not {encoding}"


def _csv_rows(path: Path, skipped: Skipped) -> Iterator[Row]:
    """Rows under the names of the first line; a row whose quoted values span lines bears the first one's number."""
    lines = ((number, text.replace("\0", "\ufffd")) for number, text in _lines(path, skipped))
    for found in table(path, lines, "\t" if path.suffix == ".tsv" else ","):
        if isinstance(found, Fault):
            skipped.add(path, found.line, f"malformed: {found.why}", found.count)
        else:
            yield Row(path, *found)


def _json_row(path: Path, line: int, text: str, skipped: Skipped) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        skipped.add(path, line, f"malformed: {str(error)[:100]}")
        return
    yield from _checked(path, line, value, skipped)


def _json_file(path: Path, skipped: Skipped) -> Iterator[Row]:
    text = _whole(path, skipped)
    if text is None:
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {str(error)[:100]}") from None
    if not isinstance(values, list):
        raise RequestError(f"{path} must hold a list of objects; or give one object a line in a .jsonl file")
    for number, value in enumerate(values, 1):
        yield from _checked(path, number, value, skipped)


def _checked(path: Path, line: int, value: Any, skipped: Skipped) -> Iterator[Row]:
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, dict):
        yield Row(path, line, value)
    else:
        skipped.add(path, line, f"malformed: an object is needed, not {type(value).__name__}")


def column(
    rows: Sequence[Row], wanted: str | None, names: Sequence[str], what: str, flag: str, skipped: Skipped | None = None
) -> str:
    """The name of the column that holds `what`: `wanted`, or the first of `names` that the first row has."""
    if not rows:
        why = f": {skipped.summary()}" if skipped is not None and skipped.count else ""
        raise RequestError(f"the data holds no usable row{why}")
    fields = rows[0].fields
    for name in names if wanted is None else [wanted]:
        if name in fields:
            return name
    looked = repr(wanted) if wanted is not None else " or ".join(names)
    raise RequestError(
        f"{rows[0].file} has no column {looked} for {what}; it has {', '.join(map(str, fields))}: name one with {flag}"
    )


def normal(text: str) -> str:
    """What makes two texts copies of each other: NFKC, case folded, white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_of(row: Row, name: str, skipped: Skipped) -> str | None:
    """The row's text in column `name`, stripped; None, and the row skipped, where there is none."""
    value = row.fields.get(name)
    if not isinstance(value, str):
        skipped.add(row.file, row.line, "no text" if value is None else f"malformed: {name} is no text")
        return None
    value = value.strip()
    if not value:
        skipped.add(row.file, row.line, "empty")
        return None
    if not is_unicode(value):
        skipped.add(row.file, row.line, "not UTF-8")
        return None
    return value


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can say it: no half of a pair of surrogates stands alone, as JSON may have it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
