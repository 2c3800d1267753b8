"""GGUF files we write, read by the gguf package and by our reader; what cannot be written; nothing left half done"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import ARCHITECTURES, write_tiny
from millis.models.gguf import exact_metadata, parse_gguf, read_gguf
from millis.models.gguf_values import StringArray
from millis.models.gguf_write import TensorOut, write_gguf
from millis.models.mapped import map_file
from millis.models.tensor import GgmlType, Tensor
from millis.types import FormatError

U32, I32, U64, I64, F32, F64, BOOL, STRING = (
    getattr(gguf.GGUFValueType, name)
    for name in ("UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "FLOAT64", "BOOL", "STRING")
)
VALUES: dict[str, tuple[Any, list[Any]]] = {  # key → value, and its types as the gguf package names them
    "text": ("naïve 中文 🙂", [STRING]),
    "empty": ("", [STRING]),
    "yes": (True, [BOOL]),
    "small": (7, [U32]),
    "negative": (-7, [I32]),
    "large": (1 << 40, [U64]),
    "low": (-(1 << 40), [I64]),
    "real": (0.5, [F32]),
    "double": (np.float64(0.1), [F64]),
    "byte": (np.uint8(200), [gguf.GGUFValueType.UINT8]),
    "short": (np.int16(-3), [gguf.GGUFValueType.INT16]),
    "texts": (["a", "", "é"], [gguf.GGUFValueType.ARRAY, STRING]),
    "numbers": ([1, -2, 3], [gguf.GGUFValueType.ARRAY, I32]),
    "reals": ([1.5, -2.0], [gguf.GGUFValueType.ARRAY, F32]),
    "truths": ([True, False], [gguf.GGUFValueType.ARRAY, BOOL]),
    "array": (np.array([1, 2], np.uint64), [gguf.GGUFValueType.ARRAY, U64]),
}


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, StringArray) else value


def some_tensor(name: str = "w", shape: tuple[int, ...] = (3, 5)) -> TensorOut:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return TensorOut.of(Tensor.from_numpy(name, values))


def test_every_kind_of_value_is_read_back_by_the_gguf_package(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {key: value for key, (value, _) in VALUES.items()}, [some_tensor()])
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    ours, _ = parse_gguf(map_file(tmp_path / "a.gguf"))
    for key, (value, types) in VALUES.items():
        assert fields[key].types == types, key
        assert fields[key].contents() == plain(value), key
        assert plain(ours[key]) == plain(value), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_written_again_is_the_same(architecture: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "a.gguf", architecture, keys={"general.size": 1 << 20, "general.flag": True})
    source = read_gguf(tmp_path / "a.gguf")
    size = write_gguf(
        tmp_path / "b.gguf", exact_metadata(source.path), [TensorOut.of(tensor) for tensor in source.tensors.values()]
    )
    assert size == (tmp_path / "b.gguf").stat().st_size
    ours, theirs = gguf.GGUFReader(tmp_path / "b.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert ours.fields[key].types == field.types and ours.fields[key].contents() == field.contents(), key
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.tensor_type == other.tensor_type and mine.data_offset % 32 == 0
        assert np.array_equal(mine.data, other.data)


def test_the_alignment_of_a_source_is_not_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"general.alignment": 4096}, [some_tensor("a"), some_tensor("b", (7,))])
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.alignment == 32
    assert np.array_equal(reader.tensors[1].data, np.arange(7, dtype=np.float32))


def test_tensors_are_made_one_at_a_time_and_in_order(tmp_path: Path) -> None:
    events: list[str] = []

    def tensor(name: str) -> TensorOut:
        def produce() -> np.ndarray:
            events.append(f"made {name}")
            return np.zeros(34, np.uint8)

        return TensorOut(name, GgmlType.Q8_0, (32,), produce)

    write_gguf(tmp_path / "a.gguf", {}, [tensor("a"), tensor("b")], lambda done: events.append(f"wrote {done.name}"))
    assert events == ["made a", "wrote a", "made b", "wrote b"]


@pytest.mark.parametrize(
    ("metadata", "tensors", "fault"),
    [
        ({"k": None}, [some_tensor()], "'k' is None, which a GGUF file cannot hold"),
        ({"k": []}, [some_tensor()], "a list whose type GGUF does not know"),
        ({"k": ["a", 1]}, [some_tensor()], "a list whose type"),
        ({"k": np.zeros((2, 2))}, [some_tensor()], "of one axis"),
        ({"k": np.float16(1)}, [some_tensor()], "cannot hold"),
        ({"k": 1 << 64}, [some_tensor()], "more than 64 bits"),
        ({"k": [1 << 40]}, [some_tensor()], "beyond 32 bits"),
        ({}, [some_tensor("a"), some_tensor("a")], "'a' appears twice"),
        ({}, [some_tensor("a" * 64)], "longer than 63 bytes"),
        ({}, [TensorOut("a", GgmlType.Q8_0, (2, 33), lambda: np.zeros(1, np.uint8))], "cannot be stored as Q8_0"),
        ({}, [TensorOut("a", GgmlType.F32, (), lambda: np.zeros(4, np.uint8))], "cannot be stored"),
        ({}, [TensorOut("a", GgmlType.F32, (2,), lambda: np.zeros(9, np.uint8))], "takes 8 bytes, not 9"),
    ],
)
def test_what_cannot_be_written_is_named(
    metadata: dict[str, Any], tensors: list[TensorOut], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=fault):
        write_gguf(tmp_path / "a.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_file_is_not_there_and_the_old_one_stays(
    failure: Callable[[], BaseException], tmp_path: Path
) -> None:
    def fail() -> np.ndarray:
        raise failure()

    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(failure):  # type: ignore[call-overload]
        write_gguf(tmp_path / "a.gguf", {}, [some_tensor(), TensorOut("b", GgmlType.F32, (8,), fail)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"old"
