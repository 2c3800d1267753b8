"""Training and test, decided by what a text says: the same text is always on the same side, and so are its copies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from millis.samples.read import normal
from millis.types import DataError

Side = Literal["train", "test"]
KEYS = ("text", "context", "source")  # the field that decides, unless one is named: the first that a row has


def share(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the normalised text and the seed alone; uniform over texts (BLAKE2b)."""
    digest = hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=7, key=b"%d" % seed).digest()
    return int.from_bytes(digest, "big") / 2**56


def side(text: str, test: float = 0.1, seed: int = 0) -> Side:
    """The side of a text where a share `test` of all texts is kept for testing."""
    return "test" if share(text, seed) < test else "train"


def key(row: Mapping[str, Any], by: str | None = None) -> str:
    """The text that decides on a row's side. Raises DataError for a row without it."""
    names = KEYS if by is None else (by,)
    for name in names:
        if isinstance(value := row.get(name), str):
            return value
    raise DataError(f"a row has no text in {' or '.join(names)}; it has {', '.join(row) or 'nothing'}")
