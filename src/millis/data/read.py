"""Rows out of files: text, JSON lines, CSV, Parquet, folders of them, saved `datasets`, named sets; in bounded memory.

A row is a dictionary; where it came from, as file:line, goes with it. A line that is no row is reported, passed over.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from millis.data import named
from millis.data.catalogue import SETS
from millis.hub.progress import Progress, Silent
from millis.samples.encoding import SAMPLE_BYTES, encoding_of, text_lines
from millis.samples.table import Fault, table
from millis.types import DataError

Row = dict[str, Any]
Unit = Literal["line", "paragraph", "file"]
Rows = Iterator[tuple[str, Row]]  # (file:line, row)

TEXT, LINES, TABLES = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".csv", ".tsv")
KINDS = (*TEXT, *LINES, ".json", *TABLES, ".parquet")
LINE_BYTES = 1 << 26  # a longer line is passed over
WHOLE_BYTES = 1 << 28  # of a file that must be read in one piece
WATCHED_BYTES = 1 << 20  # less is read too soon for progress to tell


@dataclass(slots=True)
class Reader:
    """How to read. `complain(where, why)` is told of every line that is no row."""

    unit: Unit | None = None  # of text: a row is a line; of text in a folder: a file
    encoding: str | None = None  # None: found out, file by file
    complain: Callable[[str, str], None] = lambda where, why: None
    progress: Progress = field(default_factory=Silent)
    encodings: dict[str, str] = field(default_factory=dict)  # file → what it was read as, where that is not UTF-8

    def rows(self, inputs: Sequence[str | os.PathLike[str]]) -> Rows:
        """All rows of the inputs in order. Raises DataError for an input that cannot be read at all."""
        found = [self._found(os.fspath(name)) for name in inputs]
        total = sum(path.stat().st_size for files in found for path, _ in files)
        if total >= WATCHED_BYTES:
            self.progress.start(total, ", ".join(os.fspath(name) for name in inputs))
        for name, files in zip(inputs, found, strict=True):
            for path, label in files:
                yield from _labelled(self._file(path, os.path.isdir(name)), label)

    def quiet(self) -> Reader:
        """The same reader for a first pass, whose complaints the second will repeat."""
        return replace(self, complain=lambda where, why: None)

    def _found(self, name: str) -> list[tuple[Path, str | None]]:
        """(file, label) for each file of an input."""
        path = Path(name)
        if path.is_file():
            if _kind(path) not in KINDS:
                raise DataError(f"{path} is of no kind that can be read: {', '.join(KINDS)}, each also with .gz")
            return [(path, None)]
        if path.is_dir():
            return [(path, None)] if _is_saved(path) else self._below(path)
        if name in SETS:
            return [(path, None) for path in named.files(name)]
        raise DataError(f"there is no file, folder or named set {name}; millis data list shows the sets")

    def _below(self, folder: Path) -> list[tuple[Path, str | None]]:
        """The files of a folder in order of path; the label is the name of the folder inside it that holds the file."""
        files: list[tuple[Path, str | None]] = []
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if not path.is_file() or any(part.startswith(".") for part in inside.parts):
                continue
            if _kind(path) in KINDS:
                files.append((path, inside.parent.name or None))
            else:
                self.complain(str(path), "of no kind that can be read")
        if not files:
            raise DataError(f"the folder {folder} holds no file that can be read: {', '.join(KINDS)}")
        return files

    def _file(self, path: Path, in_folder: bool) -> Rows:
        kind = _kind(path)
        if kind == ".parquet":
            return _parquet(path)
        if path.is_dir():
            return _saved(path)
        if kind in LINES:
            return self._json_lines(path)
        if kind == ".json":
            return self._json(path)
        if kind in TABLES:
            return self._table(path, "\t" if kind == ".tsv" else ",")
        return self._text(path, self.unit or ("file" if in_folder else "line"))

    def _text(self, path: Path, unit: Unit) -> Rows:
        start, held, size = 1, list[str](), 0
        for number, line in self._lines(path):
            if unit == "line" or (unit == "paragraph" and not line.strip()):
                text = line if unit == "line" else "".join(held)
                if text.strip():
                    yield f"{path}:{number if unit == 'line' else start}", {"text": text.rstrip("\r\n")}
                start, held, size = number + 1, [], 0
                continue
            held.append(line)
            if (size := size + len(line)) > WHOLE_BYTES:
                raise DataError(f"{path}:{start} begins a text beyond {WHOLE_BYTES:,} characters; read it by line")
        if "".join(held).strip():
            text = "".join(held)
            yield f"{path}:{start}", {"text": text if unit == "file" else text.rstrip("\r\n")}

    def _json_lines(self, path: Path) -> Rows:
        for number, line in self._lines(path):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", _row(_parse(line))
            except ValueError as error:
                self.complain(f"{path}:{number}", f"not a JSON object ({error})")

    def _json(self, path: Path) -> Rows:
        if path.stat().st_size > WHOLE_BYTES:
            raise DataError(f"{path} is a JSON file of more than {WHOLE_BYTES:,} bytes; make it JSON lines")
        try:
            values = _parse("".join(line for _, line in self._lines(path)))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); a file of one object a line is called .jsonl") from error
        for number, value in enumerate(values if isinstance(values, list) else [values], 1):
            try:
                yield f"{path}:{number}", _row(value)
            except ValueError as error:
                self.complain(f"{path}:{number}", f"not a JSON object ({error})")

    def _table(self, path: Path, delimiter: str) -> Rows:
        for found in table(path, ((n, line.replace("\0", "")) for n, line in self._lines(path)), delimiter):
            if isinstance(found, Fault):
                self.complain(f"{path}:{found.line}", found.why)
            else:
                yield f"{path}:{found[0]}", dict(found[1])

    def _lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """Numbered lines with their ends. Bytes that are not of the file's encoding make the line a bad one."""
        with path.open("rb") as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            try:
                sample = file.read(SAMPLE_BYTES)
                encoding = self.encoding or encoding_of(path, sample)
                file.seek(0)
                yield from self._decoded(path, file, raw, encoding)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{path} is a damaged gzip file ({error})") from error

    def _decoded(self, path: Path, file: IO[bytes], raw: IO[bytes], encoding: str) -> Iterator[tuple[int, str]]:
        if encoding not in ("utf-8", "utf-8-sig"):
            self.encodings[str(path)] = encoding
        done = 0
        for number, line in enumerate(text_lines(file, encoding, LINE_BYTES), 1):
            if (now := raw.tell()) > done:
                self.progress.advance(now - done)
                done = now
            if line is None:
                self.complain(f"{path}:{number}", f"longer than {LINE_BYTES:,} bytes")
                continue
            try:
                yield number, line.decode(encoding) if isinstance(line, bytes) else line
            except UnicodeDecodeError as error:
                self.complain(f"{path}:{number}", f"not {encoding} (byte 0x{line[error.start]:02x})")


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _labelled(rows: Rows, label: str | None) -> Rows:
    for where, row in rows:
        yield where, row if label is None or "label" in row else {**row, "label": label}


def _parse(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON value")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"{digits:.20} is beyond what numbers hold")
        return value

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _row(value: Any) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"it is {json.dumps(value)[:40]}")
    return value


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("Parquet files need a library; run: pip install 'millis[data]'") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a sound Parquet file ({' '.join(str(error).split())[:200]})") from error


def _is_saved(folder: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved(folder: Path) -> Rows:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise DataError(f"{folder} was saved by the library datasets; to read it: pip install datasets") from None
    loaded = load_from_disk(str(folder))
    parts = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    for part, rows in parts:
        yield from ((f"{folder}/{part}:{number}", dict(row)) for number, row in enumerate(rows, 1))
