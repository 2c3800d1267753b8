"""Files of a model, opened with the suspicion they deserve: bytes by mapping, JSON with a limit."""

from __future__ import annotations

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.types import FormatError, ModelError

_MAX_JSON_ITEMS = 1 << 20  # a Python object costs some 60 bytes, whatever the two bytes it was written in


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes [size], read-only and mapped: pages are read from disk when touched.

    Raises ModelError where there is no such regular file or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None


def forget(data: NDArray[np.uint8]) -> None:
    """Gives back the memory that a mapped file takes, if `data` is a view of one; it is read again when touched."""
    owner: Any = data
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit_bytes`; raises FormatError otherwise, ModelError if unreadable."""
    data = map_file(path)
    if data.nbytes > limit_bytes:
        raise FormatError(f"{path.name} is {data.nbytes} bytes, more than the {limit_bytes} that Millis reads")
    return parse_json(data.tobytes(), path.name)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`, called `what` in errors; duplicate names and numbers beyond JSON's are refused."""
    if any(text.count(mark) > _MAX_JSON_ITEMS for mark in (b",", b"[", b"{")):
        raise FormatError(f"{what} holds more than {_MAX_JSON_ITEMS} items")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise FormatError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{what} must be a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.80} appears twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
