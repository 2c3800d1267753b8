"""GGUF files, version 3, written whole or not at all: one tensor in memory at a time, renamed into place at the end.

Our own rather than the gguf package's writer: that one is an extra, and leaves half a file where it is interrupted.
Source: the GGUF specification.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.files import whole
from millis.models.gguf_values import StringArray
from millis.models.tensor import GgmlType, Tensor
from millis.types import FormatError

ALIGNMENT = 32
_VERSION, _STRING, _ARRAY = 3, 8, 9
_KINDS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
_MAX_NAME_BYTES = 63  # readers in C keep names in 64 bytes, the last of them zero

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorOut:
    """A tensor to be written. `produce` is called once, when its turn comes, and gives its bytes [nbytes]."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]  # outermost first, as in Tensor
    produce: Callable[[], Bytes]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block_values * self.type.block_bytes

    @classmethod
    def of(cls, tensor: Tensor) -> TensorOut:
        """`tensor` as it is."""
        return cls(tensor.name, tensor.type, tensor.shape, lambda: tensor.data)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorOut],
    advance: Callable[[TensorOut], None] = lambda tensor: None,
) -> int:
    """Writes `path` under another name, then renames it; `advance` hears of each tensor written. Returns its bytes.

    A value of `metadata` is a text, truth value, int (u32, or the first of i32, u64, i64 that holds it), float (f32),
    NumPy scalar (its own type), list of one of these kinds (ints become i32), or NumPy array (its own type).
    FormatError: something GGUF cannot hold, or bytes that are not the tensor's. OSError: the file cannot be written.
    RequestError: `path` is no file, but a folder, device or pipe.
    """
    path = Path(path)
    values = {key: value for key, value in metadata.items() if key != "general.alignment"}  # we lay it out anew
    head = b"".join(_head(values, tensors))
    head += bytes(-len(head) % ALIGNMENT)
    with whole(path) as file:
        file.write(head)
        for tensor in tensors:
            file.write(_checked(tensor, tensor.produce()).data)
            file.write(bytes(-tensor.nbytes % ALIGNMENT))
            advance(tensor)
        return file.tell()


def head_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorOut]) -> int:
    """Bytes of a file before its tensors' data; what type a tensor has makes no difference."""
    return -(-sum(map(len, _head(metadata, tensors))) // ALIGNMENT) * ALIGNMENT


def _checked(tensor: TensorOut, data: Bytes) -> Bytes:
    if data.nbytes != tensor.nbytes:
        raise FormatError(f"tensor {tensor.name!r} takes {tensor.nbytes} bytes, not {data.nbytes}")
    return np.ascontiguousarray(data)


def _head(metadata: Mapping[str, Any], tensors: Sequence[TensorOut]) -> Iterator[bytes]:
    yield b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        yield _text(key) + _value(key, value)
    offset, seen = 0, set()
    for tensor in tensors:
        if tensor.name in seen:
            raise FormatError(f"the tensor {tensor.name!r} appears twice")
        seen.add(tensor.name)
        yield _entry(tensor, offset)
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _entry(tensor: TensorOut, offset: int) -> bytes:
    rank, width = len(tensor.shape), tensor.shape[-1] if tensor.shape else 0
    if not 1 <= rank <= 4 or 0 in tensor.shape or width % tensor.type.block_values:
        raise FormatError(f"tensor {tensor.name!r} of shape {tensor.shape} cannot be stored as {tensor.type.name}")
    if len(tensor.name.encode()) > _MAX_NAME_BYTES:
        raise FormatError(f"the tensor name {tensor.name!r} is longer than {_MAX_NAME_BYTES} bytes")
    return _text(tensor.name) + struct.pack(f"<I{rank}QIQ", rank, *tensor.shape[::-1], int(tensor.type), offset)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """The type, then the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, StringArray | list | tuple | np.ndarray):
        kind, count, data = _elements(key, value)
        return struct.pack("<IIQ", _ARRAY, kind, count) + data
    kind, data = _number(key, value)
    return struct.pack("<I", kind) + data


def _number(key: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        value = _whole_number(key, value)
    elif isinstance(value, float) and not isinstance(value, np.generic):
        value = np.float32(value)
    kind = _KINDS.get(value.dtype.str[1:]) if isinstance(value, np.generic) else None
    if kind is None:
        raise FormatError(f"{key!r:.80} is {value!r:.40}, which a GGUF file cannot hold")
    return kind, value.astype(value.dtype.newbyteorder("<")).tobytes()


def _whole_number(key: str, value: int) -> np.generic:
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype(value)
    raise FormatError(f"{key!r:.80} is {value}, which takes more than 64 bits")


def _elements(key: str, values: Any) -> tuple[int, int, bytes]:
    """Element type, count and bytes of an array."""
    if isinstance(values, StringArray) or _all(values, str):
        return _STRING, len(values), b"".join(map(_text, values))
    if not isinstance(values, np.ndarray):
        for kind, dtype in ((bool, np.bool_), (int, np.int32), (float, np.float32)):
            if _all(values, kind):
                return _elements(key, _array(key, values, dtype))
    elif values.ndim == 1 and values.dtype.str[1:] in _KINDS:
        return _KINDS[values.dtype.str[1:]], len(values), values.astype(values.dtype.newbyteorder("<")).tobytes()
    raise FormatError(f"{key!r:.80} is a list whose type GGUF does not know; give texts, or a NumPy array of one axis")


def _all(values: Iterable[Any], kind: type) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(type(value) is kind for value in values)


def _array(key: str, values: Sequence[Any], dtype: type[np.generic]) -> NDArray[Any]:
    try:
        return np.array(values, dtype)
    except OverflowError:
        raise FormatError(
            f"{key!r:.80} holds numbers beyond 32 bits; give a NumPy array of the type you mean"
        ) from None
