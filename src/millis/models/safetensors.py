"""safetensors files: a JSON header, then the tensors' bytes without hole or overlap. Mapped, never copied.

A file is hostile until checked: each fault of a header has its own error. Source: the safetensors format description.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.models.mapped import map_file, parse_json, read_json
from millis.models.tensor import GgmlType, Tensor
from millis.types import FormatError, ModelError

_MAX_HEADER_BYTES = 100_000_000  # the format's
_MAX_INDEX_BYTES = 1 << 26
_MAX_NAME_CHARACTERS = 256
_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}
_FIELDS = {"dtype", "shape", "data_offsets"}
_COUNTER = "position_ids"  # older encoders carry 0, 1, 2 … along, the only integers among weights; left out


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, under its own names. Raises FormatError naming the file and the fault."""
    path = Path(path)
    data = map_file(path)
    try:
        return parse_safetensors(data)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None


def parse_safetensors(data: NDArray[np.uint8]) -> dict[str, Tensor]:
    """The tensors of a file's bytes [size], as views of them. Raises FormatError."""
    header, start = _header(data)
    spans = {name: _span(name, entry) for name, entry in header.items()}
    _check_spans(spans, data.nbytes - start)
    tensors = {}
    for name, (begin, end) in spans.items():
        if _is_counter(name, header[name]["dtype"]):
            continue
        type, shape = _TYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        tensors[name] = Tensor(name, type, shape, data[start + begin : start + end])
    return tensors


def _header(data: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """The entries by tensor name, and where the tensors' bytes start."""
    if data.nbytes < 8:
        raise FormatError(f"{data.nbytes} bytes are too few for a safetensors file; pull it again")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > _MAX_HEADER_BYTES:
        raise FormatError(f"not a safetensors file: its header would be {length} bytes, above {_MAX_HEADER_BYTES}")
    if length > data.nbytes - 8:
        raise FormatError(f"the file ends {length - data.nbytes + 8} bytes early, inside its header; pull it again")
    text = data[8 : 8 + length].tobytes()
    if text[:1] != b"{":
        raise FormatError(f"not a safetensors file: its header starts with {text[:8]!r}, not with a brace")
    header = parse_json(text, "the header")
    remarks = header.pop("__metadata__", {})
    if not isinstance(remarks, dict) or not all(isinstance(value, str) for value in remarks.values()):
        raise FormatError("the header's __metadata__ must map names to strings")
    return header, 8 + length


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where the tensor's bytes begin and end, counted from the header's end; its type and shape agree with them."""
    if len(name) > _MAX_NAME_CHARACTERS:
        raise FormatError(f"a tensor name is {len(name)} characters long; {_MAX_NAME_CHARACTERS} are allowed")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise FormatError(f"tensor {name!r} must have exactly {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in _TYPES and not _is_counter(name, dtype)):
        raise FormatError(f"tensor {name!r} is stored as {dtype!r:.40}; Millis reads {', '.join(_TYPES)}")
    if not _are_sizes(shape) or len(shape) > 8:
        raise FormatError(f"tensor {name!r} has the impossible shape {shape!r:.60}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"tensor {name!r} has the impossible data_offsets {offsets!r:.60}")
    needed = math.prod(shape) * (8 if _is_counter(name, dtype) else _TYPES[dtype].block_bytes)
    if offsets[1] - offsets[0] != needed:
        raise FormatError(f"tensor {name!r} holds {offsets[1] - offsets[0]} bytes; its shape and type need {needed}")
    return offsets[0], offsets[1]


def _is_counter(name: str, dtype: str) -> bool:
    return dtype == "I64" and name.rpartition(".")[2] == _COUNTER


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_spans(spans: dict[str, tuple[int, int]], size: int) -> None:
    """The spans cover [0, size) in order, each byte once."""
    at = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin < at:
            raise FormatError(f"tensor {name!r} overlaps the one before it")
        if begin > at:
            raise FormatError(f"{begin - at} bytes before tensor {name!r} belong to no tensor")
        at = end
    if at > size:
        raise FormatError(f"the file ends {at - size} bytes early; pull it again")
    if at < size:
        raise FormatError(f"{size - at} bytes after the last tensor belong to no tensor")


def renamed(tensors: Mapping[str, Tensor], name_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors under our names, without those that `name_of` gives none. FormatError: two have the same."""
    found: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        name = name_of(theirs)
        if name is None:
            continue
        if name in found:
            raise FormatError(f"the tensor {theirs!r} appears twice, under two prefixes")
        found[name] = Tensor(name, tensor.type, tensor.shape, tensor.data)
    return found


def read_folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of every shard that `model.safetensors.index.json` lists.

    Raises FormatError where a file is malformed or index and shards disagree, ModelError where there is neither.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single)
    if index.exists():
        return _read_shards(folder, read_json(index, _MAX_INDEX_BYTES).get("weight_map"))
    raise ModelError(f"{folder} holds neither {single.name} nor {index.name}; Millis reads weights as safetensors only")


def _read_shards(folder: Path, files: Any) -> dict[str, Tensor]:
    """`files`: tensor name → file name."""
    if not isinstance(files, dict) or not files:
        raise FormatError("the index's weight_map must map tensor names to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted({_shard_name(file) for file in files.values()}):
        if not (folder / file).exists():
            raise FormatError(f"the shard {file} that the index lists is missing; pull the model again")
        for name, tensor in read_safetensors(folder / file).items():
            if files.get(name) != file:
                raise FormatError(f"{file} holds the tensor {name!r}, which the index does not place there")
            tensors[name] = tensor
    for name, file in files.items():
        if name not in tensors and name.rpartition(".")[2] != _COUNTER:
            raise FormatError(f"{file} lacks the tensor {name!r:.80} that the index places there; pull the model again")
    return tensors


def _shard_name(file: Any) -> str:
    """A shard lies beside its index: a path elsewhere is refused."""
    if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
        raise FormatError(f"the index names the shard {file!r:.80}; a plain .safetensors file name is expected")
    return file
