"""Files of examples: CSV with a header line, JSONL, or SQuAD's JSON, as rows with the columns that a task needs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from millis.samples import labelled
from millis.samples.encoding import SAMPLE_BYTES, encoding_of
from millis.samples.read import Skipped, is_unicode
from millis.samples.table import Fault, table
from millis.types import RequestError

MOST_BYTES = 1 << 30
NAMES: Mapping[str, tuple[str, ...]] = {  # of a column, where files differ
    "text": labelled.TEXT,
    "label": labelled.LABEL,
    "source": ("source", "src", "text", "document", "article"),
    "target": ("target", "tgt", "summary", "reference", "translation"),
    "question": ("question",),
    "context": ("context", "passage"),
    "answers": ("answers", "answer"),
    "value": ("value", "json", "target"),
}


def read_labelled(
    path: Path, skipped: Skipped | None = None, text_column: str | None = None, label_column: str | None = None
) -> list[tuple[str, str]]:
    """(text, label) of every row, read as `millis train` reads them.

    RequestError: no usable row, or, where nobody asks which were skipped, one that is not.
    """
    left_out = Skipped() if skipped is None else skipped
    try:
        found = labelled.read_labelled([path], left_out, text_column, label_column)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    if skipped is None and left_out.count:
        raise RequestError(f"{left_out.summary()}; mend the file")
    return [(text, label) for _, text, label in found]


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Every row's `columns`, whatever their names in the file. RequestError names the line and what it lacks."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RequestError(f"{path} is larger than {MOST_BYTES >> 20} MB; split it")
        data = path.read_bytes()
        text = data.decode(encoding_of(path, data[:SAMPLE_BYTES], "convert it to UTF-8 first")).removeprefix("\ufeff")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not {error.encoding} text; convert it to UTF-8 first") from None
    rows = []
    for where, row in _rows(path, text):
        rows.append({name: _column(row, name, where) for name in columns})
    if not rows:
        raise RequestError(f"{path} holds no rows")
    return rows


def spread(rows: list[Any], limit: int | None) -> list[Any]:
    """`limit` of the rows at even distances; all where there are no more."""
    return rows if limit is None or limit >= len(rows) else [rows[i * len(rows) // limit] for i in range(limit)]


def _rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".json":
        yield from _squad(path, text)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, text)
    elif path.suffix in (".csv", ".tsv"):
        lines = enumerate(io.StringIO(text, newline=""), 1)
        for found in table(path, lines, "\t" if path.suffix == ".tsv" else ","):
            if isinstance(found, Fault):
                raise RequestError(f"{path}, line {found.line}: {found.why}")
            yield f"{path}, line {found[0]}", found[1]
    else:
        raise RequestError(f"{path}: its name must end in .csv, .tsv, .jsonl or, for SQuAD, .json")


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise RequestError(f"{path}, line {number}: must be an object")
        yield f"{path}, line {number}", row


def _squad(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rajpurkar et al., 2016: data → paragraphs → qas → answers."""
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [answer["text"] for answer in qa["answers"]]
                    row = {"question": qa["question"], "context": paragraph["context"], "answers": answers}
                    yield f"{path}, question {qa.get('id', '?')}", row
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} is no SQuAD file: {error!r}") from None


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    for known in NAMES[name]:
        if row.get(known) not in (None, "", []):
            value = row[known]
            if name == "answers":
                return _answers(value, f"{where}: {known}")
            if name != "value" and not isinstance(value, (str, int)):
                raise RequestError(f"{where}: {known} must be a text")
            return value if name == "value" else _unicode(str(value), f"{where}: {known}")
    if empty := [known for known in NAMES[name] if known in row]:
        raise RequestError(f"{where}: {empty[0]} is empty")
    raise RequestError(f"{where}: no column {' or '.join(NAMES[name])}")


def _answers(value: Any, where: str) -> list[str]:
    """A list of texts; SQuAD's and the hub's {"text": [...]} and a plain text are taken, too."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [_unicode(value, where)]
    if isinstance(value, Mapping):
        value = value.get("text", [])
    several = value if isinstance(value, list) else [value]
    texts = [one.get("text") if isinstance(one, Mapping) else one for one in several]
    if not texts or not all(isinstance(one, (str, int, float)) for one in texts):
        raise RequestError(f"{where} must be a text, or a list of one or more")
    return [_unicode(str(one), where) for one in texts]


def _unicode(text: str, where: str) -> str:
    if not is_unicode(text):
        raise RequestError(f"{where} is not UTF-8: it holds half a pair of surrogates")
    return text
