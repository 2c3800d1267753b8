"""Four-bit copies of a checkpoint against the gguf package's own quantisation."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_files import write_tiny
from millis import _native
from millis.engine.requantize import requantize
from millis.models.load import read_checkpoint
from millis.models.tensor import GgmlType

WRITABLE = [GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q5_0, GgmlType.Q8_0]


@pytest.mark.parametrize("type", WRITABLE, ids=lambda type: type.name)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_values_are_those_of_the_gguf_package(type: GgmlType, threads: int) -> None:
    values = np.random.default_rng(1).normal(0, 0.05, (7, 96)).astype(np.float32)
    values[2] = 0
    kind = gguf.GGMLQuantizationType(int(type))
    data = gguf.quants.quantize(values, kind)
    want = gguf.quants.quantize(gguf.quants.dequantize(data, kind), gguf.GGMLQuantizationType.Q4_0)
    got = _native.to_q4_0(int(type), np.ascontiguousarray(data).reshape(-1).view(np.uint8), threads)
    q4 = gguf.GGMLQuantizationType.Q4_0  # as values: a block of zeros may have either sign
    np.testing.assert_array_equal(gguf.quants.dequantize(got, q4), gguf.quants.dequantize(want.reshape(-1), q4))


def test_no_value_is_further_off_than_half_a_step() -> None:
    values = np.random.default_rng(2).normal(0, 1, 32 * 500).astype(np.float32)
    got = gguf.quants.dequantize(_native.to_q4_0(0, values.view(np.uint8)), gguf.GGMLQuantizationType.Q4_0)
    blocks, back = values.reshape(-1, 32), got.reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / 8
    far = np.abs(back - blocks) > 0.51 * step  # the end opposite to the largest value is cut at 7 of 8 steps
    assert (np.abs(blocks)[far] > 7.4 * np.broadcast_to(step, blocks.shape)[far]).all()


@pytest.mark.parametrize(("type", "size"), [(0, 130), (2, 17), (8, 35), (12, 143), (99, 64)])
def test_what_is_no_whole_number_of_blocks_is_refused(type: int, size: int) -> None:
    with pytest.raises(ValueError, match="blocks|not supported"):
        _native.to_q4_0(type, np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match="threads"):
        _native.to_q4_0(0, np.zeros(128, np.uint8), 0)


def test_matrices_shrink_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, "llama", tensors={"output.weight": (50, 64)})
    before = read_checkpoint(path)
    after = requantize(before, 2)
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in after.tensors.items():
        assert tensor.shape == before.tensors[name].shape
        if len(tensor.shape) == 1 or name == "token_embd.weight":
            assert tensor is before.tensors[name]
        else:
            assert tensor.type == GgmlType.Q4_0
            assert np.abs(tensor.numpy() - before.tensors[name].numpy()).max() < 0.1
    tied = tmp_path / "tied.gguf"
    write_tiny(tied, "llama")
    assert requantize(read_checkpoint(tied)).tensors["token_embd.weight"].type == GgmlType.Q4_0
