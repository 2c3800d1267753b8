"""Files divided into a training side and a test side, copies together, near copies across the sides found."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from millis.data.duplicates import Known, Seen, signature
from millis.data.read import Reader, Row
from millis.data.sides import Side, key, share, side
from millis.data.write import line, rows_file, take_out
from millis.hub.progress import Progress
from millis.types import DataError

EXAMPLES = 5
EXCERPT_CHARS = 200


@dataclass(slots=True)
class Split:
    """What a split made: rows on each side, by label, and near copies that were found across."""

    train: Path
    test: Path
    rows: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0})
    labels: dict[str, dict[str, int]] = field(default_factory=lambda: {"train": {}, "test": {}})
    near_copies: int = 0  # rows of the training side that nearly copy a test text
    dropped: int = 0  # of these, those that were left out
    examples: list[dict[str, Any]] = field(default_factory=list)

    def count(self, chosen: Side, label: Any, step: int) -> None:
        self.rows[chosen] += step
        if label is not None:
            counts = self.labels[chosen]
            counts[str(label)] = counts.get(str(label), 0) + step

    def asdict(self) -> dict[str, Any]:
        return asdict(self) | {"train": str(self.train), "test": str(self.test)}


def split(
    inputs: Sequence[str | os.PathLike[str]],
    train: str | os.PathLike[str],
    test: str | os.PathLike[str],
    *,
    share_of_test: float = 0.1,
    seed: int = 0,
    by: str | None = None,
    stratify: str | None = None,
    near: float = 0.8,
    drop_near: bool = False,
    reader: Reader | None = None,
    progress: Progress | None = None,
) -> Split:
    """Splits rows into two files of JSON lines by the hash of a text: `by`, or what `key` finds.

    A text is always on the same side, whatever stands around it and in whatever order, and its copies are with it.
    `stratify`: a field; of the texts of each of its values, the same share is for testing. Then the side of a text
    depends on the other texts of its value as well, and the inputs are read twice. `near`: similarity from which a
    training row counts as a near copy of a test text; 0: not looked for. Raises DataError.
    """
    if not 0 < share_of_test < 1:
        raise DataError(f"the share of texts for testing must lie between 0 and 1, not {share_of_test}")
    if Path(train).absolute() == Path(test).absolute():
        raise DataError(f"both sides cannot be written to {train}")
    reader, result = reader or Reader(), Split(Path(train), Path(test))
    reader.progress = progress or reader.progress
    limits = _Limits(_keyed(reader.quiet(), inputs, by), share_of_test, seed, stratify) if stratify else None
    with rows_file(result.train, inputs) as first, rows_file(result.test, inputs) as second:
        for text, row in _keyed(reader, inputs, by):
            chosen: Side = limits.side(text) if limits else side(text, share_of_test, seed)
            (second if chosen == "test" else first).write(line(row))
            result.count(chosen, row.get(stratify or "label"), 1)
        if near:
            _look_across(first, second, result, near, drop_near, by, stratify or "label")
        if not all(result.rows.values()):
            raise DataError(f"one side is empty, {result.rows}: there are too few texts for a share of {share_of_test}")
    return result


def _keyed(reader: Reader, inputs: Sequence[str | os.PathLike[str]], by: str | None) -> Iterator[tuple[str, Row]]:
    """Rows with the text that decides; those without one are complained of and passed over."""
    for where, row in reader.rows(inputs):
        try:
            yield key(row, by), row
        except DataError as error:
            reader.complain(where, str(error))


class _Limits:
    """For each label the hash below which its texts are for testing, so that the share is the same for all labels.

    12 bytes of memory a row. A text with two labels belongs to the first, so that its copies stay together.
    """

    def __init__(self, rows: Iterator[tuple[str, Row]], share_of_test: float, seed: int, label: str) -> None:
        self.seed = seed
        shares, names, numbers = array("d"), array("i"), dict[str, int]()
        for text, row in rows:
            if row.get(label) is None:
                raise DataError(f"a row has no {label!r} to stratify by; it has {', '.join(row)}: {text[:60]!r}")
            shares.append(share(text, seed))
            names.append(numbers.setdefault(str(row[label]), len(numbers)))
        self.shares, first = np.unique(np.asarray(shares), return_index=True)
        self.names = np.asarray(names)[first]
        self.limits = np.zeros(len(numbers))
        for number in range(len(numbers)):
            own = self.shares[self.names == number]  # in order
            count = round(share_of_test * len(own))
            self.limits[number] = own[count] if count < len(own) else 1.0

    def side(self, text: str) -> Side:
        mine = share(text, self.seed)
        label = self.names[np.searchsorted(self.shares, mine)]
        return "test" if mine < self.limits[label] else "train"


def _look_across(
    first: BinaryIO, second: BinaryIO, result: Split, near: float, drop: bool, by: str | None, label: str
) -> None:
    """Finds training rows that nearly copy a test text; takes them out of the file where asked to."""
    copies = set[int]()
    with Seen(near) as tests:
        second.seek(0)
        for number, text in enumerate(key(json.loads(written), by) for written in second):
            tests.keep(Known(number, f"test:{number + 1}", None, text[:EXCERPT_CHARS]), text, signature(text))
        first.seek(0)
        for number, written in enumerate(first):
            text = key(row := json.loads(written), by)
            if (known := tests.near(signature(text))) is None:
                continue
            copies.add(number)
            if len(result.examples) < EXAMPLES:
                pair = {"train": text[:EXCERPT_CHARS], "test": known.text}
                result.examples.append({**pair, "similarity": round(known.similarity, 3)})
            if drop:
                result.count("train", row.get(label), -1)
    result.near_copies = len(copies)
    if drop:
        take_out(first, copies)
        result.dropped = len(copies)
