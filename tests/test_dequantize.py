"""Dequantisation against the gguf package's, and against formulas computed value by value."""

from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from millis.models.dequantize import check_finite, dequantize
from millis.models.tensor import GgmlType, Tensor
from millis.types import FormatError

# Where a block keeps its float16 scales: random bytes there could be NaN, whose bits need not compare.
SCALES_AT = {
    GgmlType.Q4_0: [0],
    GgmlType.Q4_1: [0, 2],
    GgmlType.Q5_0: [0],
    GgmlType.Q5_1: [0, 2],
    GgmlType.Q8_0: [0],
    GgmlType.Q2_K: [80, 82],
    GgmlType.Q3_K: [108],
    GgmlType.Q4_K: [0, 2],
    GgmlType.Q5_K: [0, 2],
    GgmlType.Q6_K: [208],
    GgmlType.IQ4_NL: [0],
    GgmlType.IQ4_XS: [0],
}


def random_blocks(type: GgmlType, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """`count` blocks of random bytes with finite scales, flat."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, type.block_bytes), dtype=np.uint8)
    for at in SCALES_AT.get(type, []):
        blocks[:, at : at + 2] = rng.normal(0, 2, (count, 1)).astype(np.float16).view(np.uint8)
    if type in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        values = rng.normal(0, 3, (count, 1)).astype(np.float32)
        as_type = {GgmlType.F32: values, GgmlType.F16: values.astype(np.float16)}
        blocks = as_type.get(type, values.view(np.uint16)[:, 1:].copy()).view(np.uint8)
    return blocks.reshape(-1)


@pytest.mark.parametrize("type", GgmlType, ids=lambda type: type.name)
@pytest.mark.parametrize("count", [1, 7, 2051])
def test_equals_the_gguf_package(type: GgmlType, count: int) -> None:
    data = random_blocks(type, count, seed=count)
    shaped = data if type not in (GgmlType.F32, GgmlType.F16) else data.view(f"<f{type.block_bytes}")
    theirs = gguf.quants.dequantize(shaped, gguf.GGMLQuantizationType(type)).reshape(-1)
    ours = dequantize(data, type)
    assert ours.dtype == np.float32 and ours.shape == (count * type.block_values,)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("type", GgmlType, ids=lambda type: type.name)
def test_block_sizes_equal_the_gguf_package(type: GgmlType) -> None:
    assert (type.block_values, type.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type)]


@pytest.mark.parametrize("type", GgmlType, ids=lambda type: type.name)
def test_chunks_join_without_a_seam(type: GgmlType) -> None:
    blocks = (1 << 18) // type.block_values + 3  # just over one chunk
    data = random_blocks(type, blocks)
    cut = type.block_bytes * (blocks - 5)
    apart = [dequantize(data[:cut], type), dequantize(data[cut:], type)]
    assert np.array_equal(dequantize(data, type), np.concatenate(apart))


def test_q8_0_by_hand() -> None:
    scale, quants = np.array([0.5], np.float16), np.arange(-16, 16, dtype=np.int8)
    block = np.concatenate([scale.view(np.uint8), quants.view(np.uint8)])
    assert dequantize(block, GgmlType.Q8_0).tolist() == [value / 2 for value in range(-16, 16)]


def test_q4_1_by_hand() -> None:
    scale_and_offset = np.array([0.25, -1.0], np.float16).view(np.uint8)
    quants = np.array([j | (15 - j) << 4 for j in range(16)], np.uint8)
    expected = [j / 4 - 1 for j in range(16)] + [(15 - j) / 4 - 1 for j in range(16)]
    assert dequantize(np.concatenate([scale_and_offset, quants]), GgmlType.Q4_1).tolist() == expected


def test_q6_k_by_hand() -> None:
    """One value at a time, straight from the specification's indices."""
    data = random_blocks(GgmlType.Q6_K, 1)
    low, high, scales = data[:128], data[128:192], data[192:208].view(np.int8)
    scale = float(data[208:210].view(np.float16)[0])
    expected = []
    for value in range(256):
        half, place = divmod(value, 128)
        nibble = low[half * 64 + place % 64] >> (4 if place >= 64 else 0) & 15
        top = high[half * 32 + place % 32] >> (2 * (place // 32)) & 3
        expected.append(scale * scales[value // 16] * (int(nibble | top << 4) - 32))
    np.testing.assert_allclose(dequantize(data, GgmlType.Q6_K), expected, rtol=1e-6)


@pytest.mark.parametrize("type", [type for type in GgmlType if type.block_bytes > 1], ids=lambda type: type.name)
def test_part_of_a_block_is_refused(type: GgmlType) -> None:
    with pytest.raises(FormatError, match=f"not a whole number of {type.name} blocks"):
        dequantize(np.zeros(type.block_bytes * 2 - 1, np.uint8), type)


@pytest.mark.parametrize("type", GgmlType, ids=lambda type: type.name)
def test_no_bytes_are_no_values(type: GgmlType) -> None:
    assert dequantize(np.zeros(0, np.uint8), type).shape == (0,)


@pytest.mark.parametrize("type", GgmlType, ids=lambda type: type.name)
def test_any_bytes_are_values_without_a_warning(type: GgmlType) -> None:
    data = np.random.default_rng(1).integers(0, 256, 4096 * type.block_bytes, dtype=np.uint8)
    assert dequantize(data, type).shape == (4096 * type.block_values,)


def test_input_may_be_strided_and_read_only() -> None:
    data = random_blocks(GgmlType.Q4_K, 3)
    spread = np.repeat(data, 2)
    spread.setflags(write=False)
    assert np.array_equal(dequantize(spread[::2], GgmlType.Q4_K), dequantize(data, GgmlType.Q4_K))


@pytest.mark.parametrize("type", GgmlType, ids=lambda type: type.name)
def test_the_result_is_a_copy(type: GgmlType) -> None:
    data = random_blocks(type, 2)
    before = data.copy()
    dequantize(data, type)[:] = 0
    assert np.array_equal(data, before)


@pytest.mark.parametrize("type", [GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.Q5_0], ids=lambda type: type.name)
def test_peak_memory_is_near_the_result(type: GgmlType) -> None:
    data = random_blocks(type, (1 << 22) // type.block_values)
    tracemalloc.start()
    result = dequantize(data, type)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < result.nbytes * 1.5


def test_tensor_values_have_its_shape() -> None:
    data = random_blocks(GgmlType.Q5_0, 6)
    values = Tensor("w", GgmlType.Q5_0, (3, 64), data).numpy()
    assert values.shape == (3, 64) and np.array_equal(values.reshape(-1), dequantize(data, GgmlType.Q5_0))


@pytest.mark.parametrize("type", list(GgmlType), ids=lambda type: type.name)
def test_what_is_not_finite_is_found_without_dequantising(type: GgmlType) -> None:
    blocks = random_blocks(type, 64).reshape(64, -1)
    check_finite(Tensor("t", type, (64 * type.block_values,), blocks.reshape(-1)))
    size, exponent = (4 if type is GgmlType.F32 else 2), (0x7F80 if type in (GgmlType.F32, GgmlType.BF16) else 0x7C00)
    for at in SCALES_AT.get(type, [0]):
        for other in (0, 1, 0x8000):  # infinite, NaN, and minus infinite
            bad = blocks.copy()
            bad[-1, at + size - 2 : at + size] = list((exponent | other).to_bytes(2, "little"))
            tensor = Tensor("blk.0.t", type, (64 * type.block_values,), bad.reshape(-1))
            assert not np.isfinite(tensor.numpy()).all()
            with pytest.raises(ValueError, match=r"blk\.0\.t holds NaN or infinite values"):
                check_finite(tensor)
