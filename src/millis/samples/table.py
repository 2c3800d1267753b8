"""CSV and TSV: rows under the names of the first line, with the lines that they stand on; what is no row is told."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from millis.types import DataError

MOST_CHARS = 1 << 24  # of a field
_LIKE_ROWS = 8  # lines inside one field that would all be rows of their own: a stray quote has swallowed them


@dataclass(frozen=True, slots=True)
class Fault:
    """Lines that make no row: the first of them, how many, and why."""

    line: int
    count: int
    why: str


def table(path: Path, lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, dict[str, str]] | Fault]:
    """(first line, column → value) of each row after the first, which names the columns; or why there is none.

    `lines`: number and text with its end. Where semicolons, no commas, part the names, they part the values, too.
    DataError: the first line does not name the columns, each once.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARS))
    taken: list[tuple[int, str]] = []  # of the row under way
    names: list[str] | None = None
    rest = _numbered(lines)
    if (head := next(rest, None)) is None:
        return
    if delimiter == "," and "," not in head[1] and ";" in head[1]:
        delimiter = ";"
    reader = csv.reader(_taking(chain([head], rest), taken), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Fault(taken[0][0], len(taken), _why(str(error), len(taken)))
            continue
        first, count = taken[0][0], len(taken)
        if names is None:
            if first != 1:
                raise DataError(f"{path} is not UTF-8 text: its first line must name the columns; convert it first")
            names = _heads(path, values)
        elif len(values) < len(names) and not "".join(values).strip():
            continue
        elif len(values) != len(names):
            yield Fault(first, count, _why(f"{len(values)} values for {len(names)} columns", count))
        elif count > _LIKE_ROWS + 2 and all(_is_row(text, delimiter, len(names)) for _, text in taken[1:-1]):
            yield Fault(first, count, _why("each of which would be a row", count))
        else:
            yield first, dict(zip(names, values, strict=True))


def _taking(lines: Iterable[tuple[int, str]], taken: list[tuple[int, str]]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line[1]


def _numbered(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The lines; those of a file whose lines end in carriage returns alone, which comes as one line, are told apart."""
    for number, text in lines:
        if number == 1 and "\r" in text.removesuffix("\n").removesuffix("\r"):
            yield from enumerate(io.StringIO(text, newline=""), 1)
        else:
            yield number, text


def _heads(path: Path, values: list[str]) -> list[str]:
    names = [name.strip() for name in values]
    if not names or len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path} must begin with the names of its columns, each once; it begins with {names[:8]}")
    return names


def _why(error: str, lines: int) -> str:
    if lines == 1:
        return error
    return f"a quote opens a field here that takes {lines} lines ({error}); close it, or write it twice"


def _is_row(line: str, delimiter: str, columns: int) -> bool:
    try:
        return columns > 1 and [len(row) for row in csv.reader([line], delimiter=delimiter, strict=True)] == [columns]
    except csv.Error:
        return False
