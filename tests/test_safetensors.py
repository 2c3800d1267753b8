"""safetensors files: values against the safetensors package, then every way a header can lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from millis.models.mapped import map_file, parse_json, read_json
from millis.models.safetensors import parse_safetensors, read_folder_tensors, read_safetensors
from millis.models.tensor import GgmlType
from millis.types import FormatError, ModelError


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "b.weight": torch.randn(3, 2, 4, generator=generator).to(torch.float16),
        "c.bias": torch.randn(11, generator=generator).to(torch.bfloat16),
        "d": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
    }


def test_values_types_and_shapes(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = read_safetensors(tmp_path / "x.safetensors")
    assert set(tensors) == set(weights())
    for name, values in weights().items():
        assert tensors[name].name == name and tensors[name].shape == tuple(values.shape)
        assert np.array_equal(tensors[name].numpy(), values.float().numpy())
    assert [tensors[name].type for name in ("a.weight", "b.weight", "c.bias")] == [
        GgmlType.F32,
        GgmlType.F16,
        GgmlType.BF16,
    ]


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "x.safetensors")
    data = map_file(tmp_path / "x.safetensors")
    tensors = parse_safetensors(data)
    assert np.shares_memory(tensors["a.weight"].data, data) and not tensors["a.weight"].data.flags.writeable


def test_header_may_be_padded_and_empty() -> None:
    assert parse_safetensors(file({})) == {}
    text = json.dumps({"x": entry([1], 0, 4)}).encode() + b"     "
    assert parse_safetensors(raw(text, bytes(4)))["x"].numpy().tolist() == [0.0]


def raw(header: bytes, body: bytes = b"", length: int | None = None) -> np.ndarray:
    """A file's bytes from its header's."""
    length = len(header) if length is None else length
    return np.frombuffer(struct.pack("<Q", length) + header + body, np.uint8)


def file(header: Any, body: bytes = b"") -> np.ndarray:
    return raw(json.dumps(header).encode(), body)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWO = bytes(8)
ATTACKS = {
    "nothing": (np.zeros(0, np.uint8), "0 bytes are too few"),
    "seven bytes": (np.zeros(7, np.uint8), "7 bytes are too few"),
    "header past the end": (raw(b"{}", length=3), "ends 1 bytes early, inside its header"),
    "header of 2^63 bytes": (raw(b"{}", length=2**63), "header would be 9223372036854775808 bytes"),
    "header of all ones": (raw(b"{}", length=2**64 - 1), "header would be"),
    "header just above the limit": (raw(b"{}", length=100_000_001), "header would be"),
    "header empty": (raw(b""), "starts with b''"),
    "header not an object": (raw(b"[]"), "starts with b'\\[\\]'"),
    "a GGUF file": (raw(b"GGUF and so on"), "starts with b'GGUF and'"),
    "space before the brace": (raw(b" {}"), "not with a brace"),
    "unfinished": (raw(b'{"x": '), "not valid JSON"),
    "something after": (raw(b"{} {}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "deeply nested": (raw(b'{"x":' + b"[" * 200_000), "nested too deeply|not valid JSON"),
    "a million lists": (raw(b'{"x":[' + b"[]," * (1 << 20) + b"[]]}"), "more than 1048576 items"),
    "a million objects": (raw(b'{"x":[' + b"{}," * (1 << 20) + b"[]]}"), "more than 1048576 items"),
    "a number of 5000 digits": (raw(b'{"x":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "NaN": (raw(b'{"x": NaN}'), "NaN is not a JSON number"),
    "a name twice": (
        raw(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{}}', TWO),
        "the name 'x' appears twice",
    ),
    "a field twice": (
        raw(b'{"x":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', TWO),
        "the name 'dtype' appears twice",
    ),
    "a name without end": (file({"x" * 300: entry([2], 0, 8)}, TWO), "a tensor name is 300 characters long"),
    "entry not an object": (file({"x": 3}), "tensor 'x' must have exactly"),
    "entry without shape": (file({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, TWO), "must have exactly"),
    "entry with more": (file({"x": {**entry([2], 0, 8), "more": 1}}, TWO), "must have exactly"),
    "type unknown": (file({"x": entry([1], 0, 8, "F64")}, TWO), "stored as 'F64'; Millis reads F32, F16, BF16"),
    "type of bytes": (file({"x": entry([8], 0, 8, "U8")}, TWO), "stored as 'U8'"),
    "type a list": (file({"x": entry([1], 0, 4, ["F32"])}, TWO), "stored as \\['F32'\\]"),
    "shape a number": (file({"x": entry(2, 0, 8)}, TWO), "impossible shape 2"),
    "shape negative": (file({"x": entry([-1, -2], 0, 8)}, TWO), "impossible shape"),
    "shape with a truth value": (file({"x": entry([2, True], 0, 8)}, TWO), "impossible shape"),
    "shape with a fraction": (file({"x": entry([2.0], 0, 8)}, TWO), "impossible shape"),
    "shape with text": (file({"x": entry(["2"], 0, 8)}, TWO), "impossible shape"),
    "shape of nine dimensions": (file({"x": entry([1] * 8 + [2], 0, 8)}, TWO), "impossible shape"),
    "shape that overflows": (file({"x": entry([2**33, 2**31], 0, 8)}, TWO), "type need 73786976294838206464"),
    "shape beyond 64 bits": (file({"x": entry([2**70], 0, 8)}, TWO), "impossible shape"),
    "offsets of one": (file({"x": {**entry([2], 0, 8), "data_offsets": [8]}}, TWO), "impossible data_offsets"),
    "offsets backwards": (file({"x": entry([2], 8, 0)}, TWO), "impossible data_offsets"),
    "offsets negative": (file({"x": entry([2], -8, 0)}, TWO), "impossible data_offsets"),
    "offsets null": (file({"x": entry([2], None, 8)}, TWO), "impossible data_offsets"),
    "offsets too few for the shape": (file({"x": entry([3], 0, 8)}, TWO), "holds 8 bytes; its shape and type need 12"),
    "offsets too many for the shape": (file({"x": entry([1], 0, 8)}, TWO), "holds 8 bytes; its shape and type need 4"),
    "overlap": (file({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}, TWO), "tensor 'y' overlaps"),
    "the same bytes twice": (file({"x": entry([2], 0, 8), "y": entry([2], 0, 8)}, TWO), "overlaps"),
    "hole": (file({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12)), "4 bytes before tensor 'y'"),
    "hole at the start": (file({"x": entry([1], 4, 8)}, TWO), "4 bytes before tensor 'x'"),
    "bytes left over": (file({"x": entry([1], 0, 4)}, TWO), "4 bytes after the last tensor"),
    "bytes without tensors": (file({}, TWO), "8 bytes after the last tensor"),
    "data past the end": (file({"x": entry([4], 0, 16)}, TWO), "ends 8 bytes early; pull it again"),
    "remarks not an object": (file({"__metadata__": 3}), "__metadata__ must map"),
    "remarks not text": (file({"__metadata__": {"a": 1}}), "__metadata__ must map"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str) -> None:
    data, message = ATTACKS[name]
    with pytest.raises(FormatError, match=message) as caught:
        parse_safetensors(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for size in range(len(data)):
        with pytest.raises(FormatError):
            parse_safetensors(np.frombuffer(data[:size], np.uint8))


def test_mutations_end_in_an_error_or_in_tensors_of_the_file(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "x.safetensors")
    original = np.fromfile(tmp_path / "x.safetensors", np.uint8)
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(2000):
        data = original.copy()
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, 400)] = rng.choice(np.frombuffer(b'0123456789[]{},:"-', np.uint8))
        try:
            tensors = parse_safetensors(data)
        except FormatError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in tensors.values()) <= data.nbytes
            assert all(tensor.numpy().shape == tensor.shape for tensor in tensors.values())
    assert refused > 1000


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match="^x.safetensors: 5 bytes are too few"):
        read_safetensors(tmp_path / "x.safetensors")


def sharded(folder: Path, **changes: Any) -> Path:
    """Two shards and their index, whose weight_map `changes` amend; None takes a name out."""
    first, second = {"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(4)}
    save_file(first, folder / "model-1.safetensors")
    save_file(second, folder / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"} | changes
    places = {name: file for name, file in places.items() if file is not None}
    index = {"metadata": {"total_size": 36}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(tmp_path: Path) -> None:
    tensors = read_folder_tensors(sharded(tmp_path))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2,), "b": (3,), "c": (4,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": "model-2.safetensors"}, "model-2.safetensors lacks the tensor 'd'"),
        ({"b": None}, "model-1.safetensors holds the tensor 'b', which the index does not place there"),
        ({"c": "model-1.safetensors"}, "model-1.safetensors lacks the tensor 'c'"),
        ({"d": "model-3.safetensors"}, "shard model-3.safetensors that the index lists is missing"),
        ({"d": "../model-1.safetensors"}, "a plain .safetensors file name is expected"),
        ({"d": "/etc/model.safetensors"}, "a plain .safetensors file name is expected"),
        ({"d": "..\\model.safetensors"}, "a plain .safetensors file name is expected"),
        ({"d": "secrets.txt"}, "a plain .safetensors file name is expected"),
        ({"d": ""}, "a plain .safetensors file name is expected"),
        ({"d": 3}, "a plain .safetensors file name is expected"),
    ],
)
def test_index_and_shards_disagree(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_folder_tensors(sharded(tmp_path, **changes))


@pytest.mark.parametrize("text", ['{"weight_map": []}', '{"weight_map": {}}', "{}"])
def test_index_without_a_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="weight_map must map tensor names to files"):
        read_folder_tensors(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        read_folder_tensors(tmp_path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        map_file(tmp_path / "absent")
    with pytest.raises(ModelError, match="is not a regular file"):
        map_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is not a regular file"):
        map_file(tmp_path / "pipe")


def test_json_limits(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, 2]}')
    assert read_json(tmp_path / "x.json", 13) == {"a": [1, 2]}
    with pytest.raises(FormatError, match="x.json is 13 bytes, more than the 12"):
        read_json(tmp_path / "x.json", 12)
    with pytest.raises(FormatError, match="it must be a JSON object"):
        parse_json(b"3", "it")
