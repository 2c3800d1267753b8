"""Every ISA of this machine against NumPy on dequantised weights, format by format; the ISAs it lacks are said."""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import numpy as np
import pytest

from millis import _native
from millis.models.tensor import GgmlType

ISAS = _native.supported_isas()
ALL_ISAS = ["scalar", "neon", "neon-dot", "neon-i8mm", "neon-bf16", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"]
PAIRS = [isa for isa in ISAS if isa in ("avx512bf16", "amx", "neon-bf16")]  # wide products in pairs of bfloat16
PAIRS += ["amx-in-software"] if "avx512bf16" in ISAS else []
FLOATS = [GgmlType.F32, GgmlType.F16, GgmlType.BF16]
QUANTS = [t for t in GgmlType if t not in FLOATS]
RNG = np.random.default_rng(7)


def stored(type: GgmlType, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, values): random data in `type`'s layout and what the gguf package reads from it."""
    if type in FLOATS:
        values = RNG.standard_normal((rows, cols)).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(type)))
    else:
        data = RNG.integers(0, 256, (rows, cols // type.block_values * type.block_bytes), dtype=np.uint8)
        blocks = data.reshape(-1, type.block_bytes)
        for at in HALVES[type]:
            count = len(blocks)
            blocks[:, at : at + 2] = RNG.uniform(-0.02, 0.02, count).astype(np.float16).view(np.uint8).reshape(count, 2)
    data = np.ascontiguousarray(data).view(np.uint8)
    values = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType(int(type)))
    return data.reshape(-1), values.reshape(rows, cols).astype(np.float32)


# Byte offsets of each block's half-precision scales, which random bytes would make NaN.
HALVES = {
    GgmlType.Q4_0: [0], GgmlType.Q4_1: [0, 2], GgmlType.Q5_0: [0], GgmlType.Q5_1: [0, 2], GgmlType.Q8_0: [0],
    GgmlType.Q2_K: [80, 82], GgmlType.Q3_K: [108], GgmlType.Q4_K: [0, 2], GgmlType.Q5_K: [0, 2], GgmlType.Q6_K: [208],
    GgmlType.IQ4_NL: [0], GgmlType.IQ4_XS: [0],
}  # fmt: skip


def quantized_activations(x: np.ndarray) -> np.ndarray:
    """x rounded to 16-bit integers with one scale per 32 columns: what the quantised kernels compute with."""
    blocks = x.reshape(len(x), -1, 32)
    most = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    levels = np.float32(127 * 256)
    inverse = np.divide(levels, most, out=np.zeros_like(most), where=most > 0)
    return (np.rint(blocks * inverse) * (most / levels)).reshape(x.shape)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_this_machine_runs_the_isa_or_says_so(isa: str, not_run: Callable[[str], None]) -> None:
    if isa in ISAS:
        assert _native.matmul(np.ones((1, 32), np.float32), 0, 1, np.ones(32, np.float32).view(np.uint8), isa) == 32
        return
    with pytest.raises(ValueError, match=isa):
        _native.matmul(np.ones((1, 32), np.float32), 0, 1, np.ones(32, np.float32).view(np.uint8), isa)
    not_run(f"the kernels for {isa}, which this machine lacks")


@pytest.mark.parametrize("type", list(GgmlType), ids=lambda t: t.name)
def test_packing_keeps_the_values_of_the_file(type: GgmlType) -> None:
    rows, cols = 21, 512
    data, values = stored(type, rows, cols)
    np.testing.assert_allclose(_native.unpack(int(type), rows, cols, data), values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", QUANTS, ids=lambda t: t.name)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 33])
def test_quantized_product(type: GgmlType, isa: str, count: int) -> None:
    rows, cols = 37, 768
    data, values = stored(type, rows, cols)
    x = RNG.standard_normal((count, cols)).astype(np.float32)
    want = quantized_activations(x).astype(np.float64) @ values.T.astype(np.float64)
    got = _native.matmul(x, int(type), rows, data, isa)
    assert got.shape == (count, rows)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5 * np.abs(want).max())


BYTE_COLUMNS = 16  # that share a scale


def byte_activations(x: np.ndarray) -> np.ndarray:
    """x rounded to one byte: what products of bytes compute with."""
    blocks = x.reshape(len(x), -1, BYTE_COLUMNS)
    most = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return (np.rint(blocks * inverse) * (most / np.float32(127))).reshape(x.shape)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if not isa.startswith("neon")])
@pytest.mark.parametrize("type", QUANTS, ids=lambda t: t.name)
@pytest.mark.parametrize("count", [*range(1, 15), 33])
def test_product_of_bytes(type: GgmlType, isa: str, count: int) -> None:
    rows, cols = 37, 768
    data, values = stored(type, rows, cols)
    x = RNG.standard_normal((count, cols)).astype(np.float32)
    x[:, 100] *= 20  # one that a scale must cover alone
    x[-1, 320:352] = 0
    want = byte_activations(x).astype(np.float64) @ values.T.astype(np.float64)
    got = _native.matmul(x, int(type), rows, data, isa, "bytes")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5 * np.abs(want).max())
    x[0, 40], x[-1, 5] = np.nan, np.inf
    spoilt = _native.matmul(x, int(type), rows, data, isa, "bytes")
    assert np.isnan(spoilt[[0, -1]]).all()
    np.testing.assert_array_equal(spoilt[1:-1], got[1:-1])
    x = np.full((2, 768), 1e-40, np.float32)
    x[1] = 1e30
    tiny = _native.matmul(x, int(type), rows, data, isa, "bytes")
    assert np.abs(tiny[0]).max() < 1e-25
    assert np.isfinite(tiny[1]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", list(GgmlType), ids=lambda t: t.name)
@pytest.mark.parametrize("count", [1, 3, 6, 40])
def test_exact_product(type: GgmlType, isa: str, count: int) -> None:
    rows, cols = 19, 512
    data, values = stored(type, rows, cols)
    x = RNG.standard_normal((count, cols)).astype(np.float32)
    want = x.astype(np.float64) @ values.T.astype(np.float64)
    np.testing.assert_allclose(
        _native.matmul(x, int(type), rows, data, isa, exact=True), want, rtol=1e-5, atol=1e-5 * np.abs(want).max()
    )


def bfloat(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def cut(x: np.ndarray) -> np.ndarray:
    """x as quants become bfloat16 for tiles: cut off, after they have grown by what that takes away on the average."""
    grown = x * np.float32(1 + math.log(2) / 256)
    return (grown.view(np.uint32) & 0xFFFF0000).view(np.float32)


def test_cutting_off_is_nearly_as_good_as_rounding() -> None:
    x = (RNG.standard_normal(1_000_000) * np.exp(RNG.standard_normal(1_000_000))).astype(np.float32)
    rounded, off = bfloat(x) - x, cut(x) - x
    assert np.sqrt((off**2).mean()) < 1.1 * np.sqrt((rounded**2).mean())
    assert abs((off * np.sign(x)).mean()) < 2e-4 * np.abs(x).mean()


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in PAIRS])
@pytest.mark.parametrize("type", QUANTS, ids=lambda t: t.name)
@pytest.mark.parametrize("count", [1, 7, 16, 45])
def test_wide_product_of_floats(type: GgmlType, isa: str, count: int) -> None:
    rows, cols = 37, 768
    data, values = stored(type, rows, cols)
    x = RNG.standard_normal((count, cols)).astype(np.float32)
    want = x.astype(np.float64) @ values.T.astype(np.float64)
    np.testing.assert_allclose(
        _native.matmul(x, int(type), rows, data, isa, "wide"), want, rtol=1e-4, atol=3e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize("isa", PAIRS)
@pytest.mark.parametrize("type", [*QUANTS, GgmlType.BF16], ids=lambda t: t.name)
@pytest.mark.parametrize("count", [1, 7, 16, 33, 64])
def test_wide_product_of_pairs(type: GgmlType, isa: str, count: int) -> None:
    """Both sides as bfloat16, the sums in float32; a weight on an edge may fall to the other side of it."""
    rows, cols = 37, 768
    data, values = stored(type, rows, cols)
    x = RNG.standard_normal((count, cols)).astype(np.float32)
    weights = cut(values) if isa.startswith("amx") and type != GgmlType.BF16 else bfloat(values)
    want = bfloat(x).astype(np.float64) @ weights.T.astype(np.float64)
    got = _native.matmul(x, int(type), rows, data, isa, "wide")
    error = np.abs(got - want) / np.sqrt((want**2).mean())
    assert error.max() < 8e-3
    assert np.sqrt((error**2).mean()) < 4e-4
    assert np.sqrt((error**2).mean()) < 0.2 * np.sqrt(((x @ values.T - want) ** 2).mean() / (want**2).mean())


@pytest.mark.parametrize("isa", [*ISAS, *PAIRS])
@pytest.mark.parametrize("type", [GgmlType.Q4_1, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.IQ4_XS], ids=lambda t: t.name)
def test_wide_products_in_blocks_of_rows_and_columns(type: GgmlType, isa: str) -> None:
    rows, cols = 85, 1536
    data, values = stored(type, rows, cols)
    x = bfloat(RNG.standard_normal((300, cols)))
    want = x.astype(np.float64) @ values.T.astype(np.float64)
    got = _native.matmul(x, int(type), rows, data, isa, "wide")
    error = np.abs(got - want) / np.sqrt((want**2).mean())
    assert np.sqrt((error**2).mean()) < (4e-3 if isa in PAIRS else 1e-5)
    one = _native.matmul(x[:1], int(type), rows, data, isa, "wide")
    np.testing.assert_allclose(got[:1], one, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("isa", PAIRS)
@pytest.mark.parametrize("cols", [1, 15, 31, 33, 511])
def test_wide_product_of_any_width(cols: int, isa: str) -> None:
    for rows in (1, 16, 17):
        data, values = stored(GgmlType.BF16, rows, cols)
        x = bfloat(RNG.standard_normal((5, cols)))
        want = x.astype(np.float64) @ values.T.astype(np.float64)
        np.testing.assert_allclose(_native.matmul(x, int(GgmlType.BF16), rows, data, isa, "wide"), want, atol=1e-4)


@pytest.mark.parametrize("isa", [*ISAS, *PAIRS])
def test_wide_products_keep_what_is_unusable_unusable(isa: str) -> None:
    data, _ = stored(GgmlType.Q4_1, 20, 256)
    x = RNG.standard_normal((20, 256)).astype(np.float32)
    clean = _native.matmul(x, int(GgmlType.Q4_1), 20, data, isa, "wide")
    x[3, 17], x[18, 255] = np.nan, np.inf
    got = _native.matmul(x, int(GgmlType.Q4_1), 20, data, isa, "wide")
    assert not np.isfinite(got[[3, 18]]).any()
    others = [r for r in range(20) if r not in (3, 18)]
    np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("isa", ISAS)
def test_every_16_bit_activation_is_kept(isa: str) -> None:
    """Rows of whole numbers, the largest 127 * 256, through an identity: both bytes of each come back."""
    rest = np.arange(-127 * 256, 127 * 256)
    x = np.full((len(rest) // 31 + 1, 32), 127 * 256, np.float32)
    x[:, 1:] = np.resize(rest, (len(x), 31))
    identity = np.concatenate([np.full((32, 1), 1, np.float16).view(np.int8), np.eye(32, dtype=np.int8)], axis=1)
    data = np.ascontiguousarray(identity).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(_native.matmul(x, int(GgmlType.Q8_0), 32, data, isa), x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", QUANTS, ids=lambda t: t.name)
def test_extreme_activations_stay_finite_and_exact(type: GgmlType, isa: str) -> None:
    data, values = stored(type, 16, 256)
    x = np.zeros((3, 256), np.float32)
    x[1] = 1e4 * np.where(np.arange(256) % 2, 1, -1)  # every byte at its limit
    x[2] = 1e4
    want = x.astype(np.float64) @ values.T.astype(np.float64)
    got = _native.matmul(x, int(type), 16, data, isa)
    assert (got[0] == 0).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("cols", [1, 3, 15, 17, 33, 511])
def test_float_weights_of_any_width(cols: int, type: GgmlType, isa: str) -> None:
    for rows in (1, 15, 16, 17):
        data, values = stored(type, rows, cols)
        x = RNG.standard_normal((7, cols)).astype(np.float32)
        want = x.astype(np.float64) @ values.T.astype(np.float64)
        np.testing.assert_allclose(_native.matmul(x, int(type), rows, data, isa), want, atol=1e-4)
        np.testing.assert_array_equal(_native.unpack(int(type), rows, cols, data), values)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", QUANTS, ids=lambda t: t.name)
def test_unusable_activations_are_never_made_usable(type: GgmlType, isa: str) -> None:
    """A NaN or an infinity makes its row NaN and no other; what is too small to scale counts as zero."""
    data, _ = stored(type, 20, 256)
    x = RNG.standard_normal((8, 256)).astype(np.float32)
    clean = _native.matmul(x, int(type), 20, data, isa)
    for row, (at, value) in enumerate([(0, np.nan), (31, np.inf), (47, -np.inf), (255, np.nan)]):
        x[2 * row, at] = value
    x[2, 40] = np.nan  # beside an infinity
    got = _native.matmul(x, int(type), 20, data, isa)
    assert np.isnan(got[::2]).all()
    np.testing.assert_array_equal(got[1::2], clean[1::2])
    x = np.full((3, 256), 1e-40, np.float32)
    x[1] = 1e-34
    x[2] = 1e30
    got = _native.matmul(x, int(type), 20, data, isa)
    assert np.abs(got[:2]).max() < 1e-25
    assert np.isfinite(got[2]).all()


@pytest.mark.parametrize(
    ("rows", "cols", "nbytes", "message"),
    [
        (4, 33, 100, "w"),
        (4, 32, 71, "w"),
        (0, 32, 0, "w"),
        (4, 32, 73, "w"),
        (-1, 32, 72, "w"),
        (2**31 - 1, 2**30, 72, "w"),
    ],
)
def test_bad_sizes_are_refused(rows: int, cols: int, nbytes: int, message: str) -> None:
    with pytest.raises((ValueError, OverflowError, MemoryError), match=message):
        _native.unpack(int(GgmlType.Q4_0), rows, cols, np.zeros(nbytes, np.uint8))


def test_unknown_types_and_isas_are_refused() -> None:
    with pytest.raises(ValueError, match="type"):
        _native.unpack(16, 4, 256, np.zeros(264, np.uint8))
    with pytest.raises(ValueError, match="sse9"):
        _native.matmul(np.ones((1, 32), np.float32), 0, 1, np.ones(32, np.float32).view(np.uint8), "sse9")
