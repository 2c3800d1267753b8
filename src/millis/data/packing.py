"""Texts as token ids in rows of one length, in a file that training maps: no padding, document ends marked.

NAME.npy: [rows, length] u16 or u32, documents one after the other, each ended by the end token. NAME.starts.npy:
[documents] i64, where each begins, counted in tokens from the first. NAME.meta.json: what was packed, and how.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from millis.data import sides
from millis.data.write import replacing
from millis.types import DataError

HEADER_BYTES = 128  # of the array: its shape is known last, so the place for it is kept free
BATCH = 256  # texts that are encoded together
Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


def pack(
    rows: Iterable[Mapping[str, Any]],
    out: Path,
    encode: Encode,
    *,
    length: int,
    vocab_size: int,
    end: int | None,
    by: str | None = None,
) -> dict[str, Any]:
    """Writes `out` (a name that ends in .npy) and the two files beside it; gives what the .meta.json says.

    `encode`: texts → ids, without special tokens. `end`: id that ends a document; None: nothing does. `by`: the field
    of the text. Tokens after the last whole row are left out, and counted. Raises DataError for ids outside the
    vocabulary, and for texts too short to fill one row.
    """
    if out.suffix != ".npy" or length < 2:
        raise DataError(f"the file must end in .npy and a row hold 2 tokens or more, not {out.name} and {length}")
    kind = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    starts: list[int] = []
    with (
        replacing(out) as file,
        replacing(out.with_suffix(".starts.npy")) as marks,
        replacing(out.with_suffix(".meta.json")) as about,
    ):
        file.write(bytes(HEADER_BYTES))
        total = 0
        for ids in _encoded(rows, encode, by, end):
            array = np.asarray(ids, np.int64)
            if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
                raise DataError(f"a token lies outside the vocabulary of {vocab_size}: {int(array.max())}")
            file.write(array.astype(kind).tobytes())
            starts.append(total)
            total += len(ids)
        count = total // length
        if count == 0:
            raise DataError(f"the texts have {total} tokens together, fewer than one row of {length}")
        _finish(file, kind, count, length)
        kept = np.array([start for start in starts if start < count * length], np.int64)
        np.save(marks, kept)
        facts = {
            "rows": count,
            "length": length,
            "tokens": count * length,
            "left_out_tokens": total - count * length,
            "documents": len(kept),
            "vocab_size": vocab_size,
            "end": end,
            "dtype": kind.name,
        }
        about.write(json.dumps(facts, indent=2).encode() + b"\n")
    return facts


def documents(rows: np.ndarray[Any, Any], starts: np.ndarray[Any, Any], row: int) -> np.ndarray[Any, Any]:
    """[length] i32: which document each token of a row is of, from 0; for attention that stays inside documents."""
    length = rows.shape[1]
    places = np.arange(row * length, (row + 1) * length)
    number = np.searchsorted(starts, places, side="right")
    return np.asarray(number - number[0], np.int32)


def _encoded(rows: Iterable[Mapping[str, Any]], encode: Encode, by: str | None, end: int | None) -> Iterator[list[int]]:
    texts = (sides.key(row, by) for row in rows)
    while batch := list(islice(texts, BATCH)):
        for ids in encode(batch):
            if len(ids):
                yield [*ids, end] if end is not None else list(ids)


def _finish(file: BinaryIO, kind: np.dtype[Any], rows: int, length: int) -> None:
    """Cuts the file to whole rows and writes the header of NumPy's format 1.0 into the place that was kept for it."""
    file.flush()
    file.truncate(HEADER_BYTES + rows * length * kind.itemsize)
    shape = f"{{'descr': '{kind.str}', 'fortran_order': False, 'shape': ({rows}, {length}), }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    file.seek(0)
    file.write(magic + shape.encode().ljust(HEADER_BYTES - 11) + b"\n")
