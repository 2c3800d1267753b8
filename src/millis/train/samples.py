"""Training data out of files: rows of CSV, TSV, JSON and JSONL, or whole texts. A bad row is reported, never fatal."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millis.types import RequestError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".md")
_SHOWN = 1000  # skipped rows that are kept with their reason; the others are only counted
_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as its file has it. `fields`: column → value; a text file's rows have the one field `text`."""

    file: Path
    line: int  # the first line is 1
    fields: dict[str, Any]


@dataclass(slots=True)
class Skipped:
    """The rows that were left out, each with file, line and reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, file: Path, line: int, reason: str) -> None:
        self.reasons[reason.partition(":")[0]] += 1
        if len(self.rows) < _SHOWN:
            self.rows.append({"file": str(file), "line": line, "reason": reason})

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def summary(self) -> str:
        """`3 rows skipped (2 empty, 1 not UTF-8), the first at data.csv:17`."""
        parts = ", ".join(f"{n} {reason}" for reason, n in self.reasons.most_common())
        first = self.rows[0]
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count} {rows} skipped ({parts}), the first at {first['file']}:{first['line']}"


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
        elif path.suffix == ".jsonl":
            for line, text in _lines(path, skipped):
                yield from _json_row(path, line, text, skipped)
        elif path.suffix == ".json":
            yield from _json_file(path, skipped)
        elif (whole := _whole(path, skipped)) is not None:
            yield Row(path, 1, {"text": whole})


def _whole(path: Path, skipped: Skipped) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        skipped.add(path, line, "not UTF-8")
        return None


def _lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is UTF-8 and not blank, with its line end."""
    with open(path, "rb") as file:
        number = 0
        while data := file.readline(_MAX_LINE_BYTES):
            number += 1
            if len(data) == _MAX_LINE_BYTES and not data.endswith(b"\n"):
                skipped.add(path, number, "line too long")
                while data and not data.endswith(b"\n"):
                    data = file.readline(_MAX_LINE_BYTES)
                continue
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                skipped.add(path, number, "not UTF-8")
                continue
            if text.strip():
                yield number, text


def _csv_rows(path: Path, skipped: Skipped) -> Iterator[Row]:
    """Rows under the names of the first line; a row whose quoted values span lines bears the first one's number."""
    read: list[int] = []  # numbers of the lines of the row under way

    def texts() -> Iterator[str]:
        for number, text in _lines(path, skipped):
            read.append(number)
            yield text.replace("\0", "\ufffd")

    reader = csv.reader(texts(), delimiter="\t" if path.suffix == ".tsv" else ",")
    before = skipped.count
    names = [name.strip() for name in next(reader, [])]
    if skipped.count > before:
        raise RequestError(f"{path} is not UTF-8 text: its first line must name the columns; convert it first")
    if not names:
        raise RequestError(f"{path} is empty; its first line must name the columns")
    while True:
        read.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            skipped.add(path, read[0], f"malformed: {error}")
            continue
        if len(values) != len(names):
            skipped.add(path, read[0], f"malformed: {len(values)} values for {len(names)} columns")
        else:
            yield Row(path, read[0], dict(zip(names, values, strict=True)))


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


def column(rows: Sequence[Row], wanted: str | None, names: Sequence[str], what: str, flag: str) -> str:
    """The name of the column that holds `what`: `wanted`, or the first of `names` that the first row has."""
    if not rows:
        raise RequestError("the data holds no usable row")
    fields = rows[0].fields
    for name in names if wanted is None else [wanted]:
        if name in fields:
            return name
    looked = repr(wanted) if wanted is not None else " or ".join(names)
    raise RequestError(
        f"{rows[0].file} has no column {looked} for {what}; it has {', '.join(map(str, fields))}: name one with {flag}"
    )


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
    try:
        value.encode()
    except UnicodeEncodeError:
        skipped.add(row.file, row.line, "not UTF-8")
        return None
    return value
