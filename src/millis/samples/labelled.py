"""Texts with one label each, for training, evaluation and examples; under whatever names files have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from millis.samples.read import Row, Skipped, column, files_of, is_unicode, read_rows, text_of
from millis.types import RequestError

TEXT = ("text", "sentence", "content", "question", "review", "message")
LABEL = ("label", "category", "intent", "class", "topic")


def read_labelled(
    paths: Sequence[Path],
    skipped: Skipped,
    text_column: str | None = None,
    label_column: str | None = None,
    known: Sequence[str] | None = None,
) -> list[tuple[Row, str, str]]:
    """(row, text, label) of every usable row. `known`: labels there are; a row with another is skipped.

    A folder's text files bear the name of the folder they lie in as label. RequestError without a single usable row.
    """
    rows = [_with_folder_label(row) for row in read_rows(files_of(paths), skipped)]
    usual_text = column(rows, text_column, TEXT, "the text", "--text-column", skipped)
    usual_label = column(rows, label_column, LABEL, "the label", "--label-column")
    found = []
    for row in rows:
        text = text_of(row, _name(row, text_column, TEXT, usual_text), skipped)
        name = _name(row, label_column, LABEL, usual_label)
        label = _label_of(row, name)
        if text is None:
            continue
        if label is None or (known is not None and label not in known):
            skipped.add(row.file, row.line, _why(row, label, name))
            continue
        found.append((row, text, label))
    if not found:
        raise RequestError(f"no usable row in {', '.join(map(str, paths))}: {skipped.summary()}")
    return found


def _name(row: Row, wanted: str | None, names: Sequence[str], usual: str) -> str:
    """Where a row has it: files that are read together may call it by different names."""
    return wanted or next((name for name in names if name in row.fields), usual)


def _with_folder_label(row: Row) -> Row:
    if row.file.suffix in (".txt", ".md"):
        return Row(row.file, row.line, dict(row.fields) | {"label": row.file.parent.name})
    return row


def _label_of(row: Row, name: str) -> str | None:
    value = row.fields.get(name)
    if isinstance(value, bool | int | float):
        value = str(value).lower() if isinstance(value, bool) else str(value) if math.isfinite(value) else None
    if not isinstance(value, str) or not is_unicode(value):
        return None
    return value.strip() or None


def _why(row: Row, label: str | None, name: str) -> str:
    """Why a row is left out that has this label, or none."""
    if label is not None:
        return f"unknown label: {label[:60]!r}"
    value = row.fields.get(name)
    if isinstance(value, list | dict):
        return f"malformed: {name} is a {type(value).__name__}, not one label"
    return "not UTF-8" if isinstance(value, str) and not is_unicode(value) else "no label"
