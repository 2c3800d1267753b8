"""Files that are whole or not there: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from millis.files import place, whole
from millis.types import DataError, RequestError

OTHERS = (".gz", ".txt", ".text", ".md", ".json", ".csv", ".tsv", ".parquet")  # ends of names of files read otherwise


@contextmanager
def rows_file(path: Path, inputs: Sequence[str | os.PathLike[str]]) -> Iterator[BinaryIO]:
    """As `replacing`, for JSON lines. DataError, too, for a name of another kind, and as `apart`."""
    if path.name.lower().endswith(OTHERS):
        raise DataError(f"{path} would be read as what its name says, but holds JSON lines; end its name in .jsonl")
    apart(path, inputs)
    with replacing(path) as file:
        yield file


def apart(path: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Raises DataError where `path` is one of the inputs, or lies in a folder of them: it would be read next time."""
    for other in map(Path, inputs):
        if other.exists() and path.exists() and other.samefile(path):
            raise DataError(f"{path} is also read from; choose another file to write")
        if other.is_dir() and path.resolve().is_relative_to(other.resolve()):
            raise DataError(f"{path} lies in {other}, whose files are read; choose another folder to write to")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the body ends well, and is gone otherwise, Ctrl-C included.

    Raises DataError where the place cannot be written, or is no file.
    """
    if not path.parent.is_dir():
        raise DataError(f"there is no folder {path.parent} to write {path.name} to")
    try:
        path = place(path)
    except RequestError as error:
        raise DataError(str(error)) from None
    with whole(path) as file:
        yield file


def line(row: dict[str, Any]) -> bytes:
    """A row as one line of JSON in UTF-8. Raises DataError for a value that JSON cannot hold."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_told)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"a row with the fields {', '.join(map(str, row))} holds what JSON lines cannot: {error}; "
            "leave that field out of the file first"
        ) from None
    return text.encode("utf-8", "replace") + b"\n"


def take_out(file: BinaryIO, numbers: set[int]) -> None:
    """Takes lines out of a written file by their numbers, moving those after them up."""
    end, read, written, number = file.seek(0, os.SEEK_END), 0, 0, 0
    while numbers and read < end:
        file.seek(read)
        taken = file.readline()
        read += len(taken)
        if number not in numbers:
            file.seek(written)
            written += file.write(taken)
        number += 1
    if numbers:
        file.truncate(written)


def _told(value: Any) -> Any:
    """What Parquet's columns hold beside JSON's values."""
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
