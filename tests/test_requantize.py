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
def test_the_error_is_near_that_of_the_whole_search(type: GgmlType, threads: int) -> None:
    values = np.random.default_rng(1).normal(0, 0.05, (70, 96)).astype(np.float32)
    values[2] = 0
    kind, four = gguf.GGMLQuantizationType(int(type)), gguf.GGMLQuantizationType.IQ4_NL
    data = gguf.quants.quantize(values, kind)
    known = gguf.quants.dequantize(data, kind).reshape(values.shape).astype(np.float32)
    got = _native.to_iq4_nl(int(type), np.ascontiguousarray(data).reshape(-1).view(np.uint8), threads)
    read = gguf.quants.dequantize(got, four).reshape(values.shape)
    assert not read[2].any()
    _, searched = _native.quantize(int(GgmlType.IQ4_NL), known, np.ones(96, np.float32), 1)
    assert searched.sum() <= np.sum((read - known) ** 2) < 1.1 * searched.sum()
    assert np.sqrt(np.sum((read - known) ** 2) / np.sum(known**2)) < 0.09


def test_a_value_goes_to_its_nearest_level() -> None:
    values = np.random.default_rng(2).normal(0, 1, 32 * 500).astype(np.float32)
    got = _native.to_iq4_nl(0, values.view(np.uint8))
    back = gguf.quants.dequantize(got, gguf.GGMLQuantizationType.IQ4_NL).reshape(-1, 32)
    scales = got.reshape(-1, 18)[:, :2].copy().view(np.float16).astype(np.float32)
    levels = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
    blocks = values.reshape(-1, 32)
    nearest = np.abs(blocks[:, :, None] - scales[:, :, None] * levels).min(-1)
    np.testing.assert_allclose(np.abs(back - blocks), nearest, atol=1e-5)


@pytest.mark.parametrize(("type", "size"), [(0, 130), (2, 17), (8, 35), (12, 143), (99, 64)])
def test_what_is_no_whole_number_of_blocks_is_refused(type: int, size: int) -> None:
    with pytest.raises(ValueError, match="blocks|not supported"):
        _native.to_iq4_nl(type, np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match="threads"):
        _native.to_iq4_nl(0, np.zeros(128, np.uint8), 0)


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
            assert tensor.type == GgmlType.IQ4_NL
            assert np.abs(tensor.numpy() - before.tensors[name].numpy()).max() < 0.1
    tied = tmp_path / "tied.gguf"
    write_tiny(tied, "llama")
    assert requantize(read_checkpoint(tied)).tensors["token_embd.weight"].type == GgmlType.IQ4_NL
