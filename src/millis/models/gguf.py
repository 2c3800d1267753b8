"""GGUF files, versions 2 and 3: header, key-values, tensor directory, mapped tensor data.

A file is hostile until checked: each field has its own error, tensors must lie inside the file and apart from one
another. Nothing is copied: tensors are views of the mapped file. Source: the GGUF specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.models.checkpoint import Checkpoint
from millis.models.gguf_config import gguf_config
from millis.models.gguf_values import Cursor, read_key_values
from millis.models.mapped import map_file
from millis.models.tensor import GgmlType, Tensor
from millis.types import FormatError

_MAX_TENSORS = 1 << 16
_MAX_NAME_BYTES = 256
_MIN_ENTRY_BYTES = 33  # of the tensor directory: an empty name and one dimension
_MAX_TENSOR_BYTES = 1 << 62
_UNREAD_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the directory; `offset` counts from the start of the data."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block_values * self.type.block_bytes


def read_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file; raises FormatError naming the file and the fault, ModelError if it cannot be read."""
    path = Path(path)
    data = map_file(path)
    try:
        metadata, tensors = parse_gguf(data)
        config, parts = gguf_config(metadata, tensors)
        return Checkpoint(path=path, config=config, tensors=parts, metadata=metadata)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None


def parse_gguf(data: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Key-values and tensors of a file's bytes [size]; tensors are views of them. Raises FormatError."""
    cursor = Cursor(data)
    tensor_count, key_count = _header(cursor)
    metadata = read_key_values(cursor, key_count)
    alignment = _alignment(metadata)
    entries = _directory(cursor, tensor_count, alignment)
    start = -(-cursor.at // alignment) * alignment
    _check_places(entries, start, data.nbytes)
    places = {entry.name: data[start + entry.offset :][: entry.nbytes] for entry in entries}
    return metadata, {entry.name: Tensor(entry.name, entry.type, entry.shape, places[entry.name]) for entry in entries}


def exact_metadata(path: Path) -> dict[str, Any]:
    """A file's key-values with every number as a NumPy scalar of its own type: so they can be written as they were.

    ModelError, FormatError: as `read_gguf`.
    """
    cursor = Cursor(map_file(Path(path)))
    try:
        _, key_count = _header(cursor)
        return read_key_values(cursor, key_count, exact=True)
    except FormatError as error:
        raise FormatError(f"{Path(path).name}: {error}") from None


def _header(cursor: Cursor) -> tuple[int, int]:
    """Counts of tensors and of key-values."""
    magic = bytes(cursor.bytes[:4])
    if magic != b"GGUF":
        raise FormatError(f"not a GGUF file (starts with {bytes(cursor.bytes[:16])!r})")
    cursor.skip(4, "the magic number")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        if version.to_bytes(4, "big")[0] in (2, 3) and not version & 0xFFFFFF:
            raise FormatError("a big-endian GGUF file; convert it to little-endian")
        raise FormatError(f"GGUF version {version}; Millis reads versions 2 and 3")
    return cursor.number("Q", "the tensor count"), cursor.number("Q", "the key-value count")


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & alignment - 1:
        raise FormatError(f"general.alignment must be a power of two, not {alignment!r:.40}")
    return alignment


def _directory(cursor: Cursor, count: int, alignment: int) -> list[_Entry]:
    if count == 0:
        raise FormatError("the file holds no tensors: a vocabulary only, not a model")
    if count > _MAX_TENSORS or count * _MIN_ENTRY_BYTES > cursor.left:
        raise FormatError(f"the header claims {count} tensors, more than the file can hold; pull it again")
    entries: dict[str, _Entry] = {}
    for index in range(count):
        entry = _entry(cursor, index)
        if entry.name in entries:
            raise FormatError(f"the tensor {entry.name!r} appears twice")
        if entry.offset % alignment:
            raise FormatError(f"tensor {entry.name!r} lies at {entry.offset}, not a multiple of {alignment}")
        entries[entry.name] = entry
    return list(entries.values())


def _entry(cursor: Cursor, index: int) -> _Entry:
    name = cursor.text(f"the name of tensor {index}", _MAX_NAME_BYTES)
    rank = cursor.number("I", f"the rank of tensor {name!r}")
    if not 1 <= rank <= 4:
        raise FormatError(f"tensor {name!r} has {rank} dimensions; 1 to 4 are allowed")
    shape = tuple(cursor.number("Q", f"the shape of tensor {name!r}") for _ in range(rank))[::-1]
    type = _type(cursor.number("I", f"the type of tensor {name!r}"), name)
    offset = cursor.number("Q", f"the offset of tensor {name!r}")
    if 0 in shape or math.prod(shape) > _MAX_TENSOR_BYTES // 4:
        raise FormatError(f"tensor {name!r} has the impossible shape {shape}")
    if shape[-1] % type.block_values:
        raise FormatError(
            f"tensor {name!r} has rows of {shape[-1]} values, not a multiple of {type.name}'s {type.block_values}"
        )
    return _Entry(name, type, shape, offset)


def _type(number: int, name: str) -> GgmlType:
    try:
        return GgmlType(number)
    except ValueError:
        pass
    if number in _UNREAD_TYPES:
        readable = ", ".join(type.name for type in GgmlType)
        raise FormatError(f"tensor {name!r} is stored as {_UNREAD_TYPES[number]}; Millis reads {readable}")
    raise FormatError(f"tensor {name!r} has the type number {number}, which Millis does not know")


def _check_places(entries: list[_Entry], start: int, file_bytes: int) -> None:
    """Every tensor inside the file and none over another."""
    in_order = sorted(entries, key=lambda entry: entry.offset)
    for entry, following in zip(in_order, in_order[1:], strict=False):
        if entry.offset + entry.nbytes > following.offset:
            raise FormatError(f"tensors {entry.name!r} and {following.name!r} overlap")
    last = in_order[-1]
    missing = start + last.offset + last.nbytes - file_bytes
    if missing > 0:
        raise FormatError(f"the file ends {missing} bytes early, inside or before tensor {last.name!r}; pull it again")
