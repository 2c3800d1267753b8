"""Files that are whole or not there: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from millis.files import place, whole
from millis.types import DataError, RequestError


@contextmanager
def replacing(path: Path, inputs: tuple[Path, ...] = ()) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the body ends well, and is gone otherwise, Ctrl-C included.

    Raises DataError where the place cannot be written, is no file, or is one of the `inputs`.
    """
    if any(other.exists() and path.exists() and other.samefile(path) for other in inputs):
        raise DataError(f"{path} is also read from; choose another file to write")
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
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a row with the fields {', '.join(map(str, row))} holds what JSON lines cannot: {error}; "
            "leave that field out of the file first"
        ) from None
    return text.encode("utf-8", "replace") + b"\n"


def take_out(file: BinaryIO, numbers: set[int]) -> Iterator[bytes]:
    """Takes lines out of a written file by their numbers, moving those after them up; gives what it took."""
    end, read, written, number = file.seek(0, os.SEEK_END), 0, 0, 0
    while numbers and read < end:
        file.seek(read)
        taken = file.readline()
        read += len(taken)
        if number in numbers:
            yield taken
        else:
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
