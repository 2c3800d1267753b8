"""Packed weights kept in a file: written when a model is first loaded, mapped ever after.

Packing reads every weight; mapping reads a header. What the file holds is decided and checked in
native/packed_file.cpp. A file that is missing, damaged, of another version or of another state of the model is written
anew, under another name first; where that is impossible the weights are packed in memory, and a line says why.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from millis import _native
from millis.config import EngineConfig
from millis.files import whole
from millis.models.dequantize import check_finite
from millis.models.fingerprint import fingerprint
from millis.models.load import Model
from millis.models.mapped import forget
from millis.models.tensor import Tensor

SUFFIX, PART = ".packed", ".part"
LEAST_BYTES = 4 << 20  # packing less takes no longer than finding a file
_CHUNK_BYTES = 16 << 20  # whole pages of 2 MB, so that the page cache may keep the file in such
_LOCK_S = 120.0
_STALE_S = 86400.0


def packed_weights(
    model: Model, key: bytes | None, config: EngineConfig, file: Path, say: Callable[[str], None] = lambda text: None
) -> _native.PackedFile | None:
    """A model's matrices as a `_native.PackedFile`, written first if need be; None where there can or need be none.

    key: the `fingerprint` of the model's files from before they were mapped. If they have another by now, what is
    mapped may be either state of them: nothing is kept of it.
    """
    matrices = _matrices(model)
    if key is None or config.precision == "exact" or sum(tensor.nbytes for tensor in matrices) < LEAST_BYTES:
        return None
    try:
        found = _open(file, key, matrices)
        if found is None:
            return _write(model, config.threads, file, key, matrices)
        return found if fingerprint(model.checkpoint.path) == key else None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        remedy = "MILLIS_HOME may name another folder"
        say(f"cannot keep packed weights at {file}: {reason}; every load will pack them anew: {remedy}")
    except (ValueError, MemoryError):  # the runtime meets the same, and says what it is
        pass
    return None


def _matrices(model: Model) -> list[Tensor]:
    """In the order in which the plan first reads them."""
    tensors = model.checkpoint.tensors
    return [tensors[name] for name in model.plan.matrices(tensors)]


def _open(file: Path, key: bytes, matrices: list[Tensor]) -> _native.PackedFile | None:
    try:
        found = _native.PackedFile(os.fsencode(file), key)
    except ValueError:
        return None
    return found if all(found.has(*_named(tensor)) for tensor in matrices) else None


def _named(tensor: Tensor) -> tuple[str, int, int, int]:
    rows, columns = tensor.shape
    return tensor.name, int(tensor.type), rows, columns


def _write(model: Model, threads: int, file: Path, key: bytes, matrices: list[Tensor]) -> _native.PackedFile | None:
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=_LOCK_S):
        if (found := _open(file, key, matrices)) is not None:  # another process wrote it while we waited
            return found
        for left in file.parent.glob(f".{glob.escape(file.name[-50:])}.*{PART}"):  # by a writer that was killed
            left.unlink(missing_ok=True)
        source = os.fsencode(os.path.realpath(model.checkpoint.path))
        with whole(file) as out:
            for chunk in _chunks(_contents(source, threads, key, matrices)):
                out.write(chunk)
            if fingerprint(model.checkpoint.path) != key:
                raise ValueError("the model's files are of another state by now")
        prune(file.parent)
    return _open(file, key, matrices)


def _contents(source: bytes, threads: int, key: bytes, matrices: list[Tensor]) -> Iterator[Any]:
    """The file's bytes, piece by piece; only one matrix is held in memory at a time."""
    head, offsets, size = _native.packed_layout(key, source, [_named(tensor) for tensor in matrices])
    at = len(head)
    yield head
    for tensor, offset in zip(matrices, offsets, strict=True):
        rows, columns = tensor.shape
        check_finite(tensor)
        panels = _native.pack(tensor.name, int(tensor.type), rows, columns, tensor.data, threads)
        forget(tensor.data)
        yield bytes(offset - at)
        yield panels
        at = offset + panels.nbytes
    yield bytes(size - at)


def _chunks(pieces: Iterator[Any]) -> Iterator[bytes]:
    """The same bytes, all but the last chunk of equal size."""
    held = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, view.nbytes, _CHUNK_BYTES):
            held += view[at : at + _CHUNK_BYTES]
            if len(held) >= _CHUNK_BYTES:
                yield bytes(held[:_CHUNK_BYTES])
                del held[:_CHUNK_BYTES]
    yield bytes(held)


def prune(folder: Path) -> None:
    """Removes packed files of other versions, damaged ones, those whose model has gone, and what crashes left."""
    for file in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):
            if not _has_source(file):  # its lock stays: another process may hold it
                file.unlink()
    for part in folder.glob(f"*{PART}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_S:
                part.unlink()


def _has_source(file: Path) -> bool:
    try:
        return os.path.exists(_native.packed_source(os.fsencode(file)))
    except ValueError:
        return False
