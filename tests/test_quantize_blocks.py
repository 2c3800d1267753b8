"""The quantisers' bytes read by the gguf package; their errors against that package's quantisers and against theory"""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from millis import _native
from millis.models.dequantize import dequantize
from millis.models.tensor import GgmlType, Tensor
from millis.quantize import tensors
from millis.quantize.importance import Importance
from millis.types import ModelError

# Relative root-mean-square error on normal values that a type must stay below. A uniform quantiser of normal values
# that knows its best step has 0.188 with 3 bits, 0.107 with 4, 0.059 with 5 (Max, 1960); scales for few values help.
BELOW = {
    GgmlType.Q2_K: 0.32,
    GgmlType.Q3_K: 0.188,
    GgmlType.Q4_0: 0.107,
    GgmlType.Q4_1: 0.107,
    GgmlType.Q4_K: 0.107,
    GgmlType.Q5_0: 0.059,
    GgmlType.Q5_1: 0.059,
    GgmlType.Q5_K: 0.059,
    GgmlType.Q6_K: 0.03,
    GgmlType.Q8_0: 0.008,
    GgmlType.IQ4_NL: 0.1,
    GgmlType.IQ4_XS: 0.1,
}
IN_PACKAGE = [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def quantize(type: GgmlType, x: np.ndarray, w: np.ndarray | None = None, threads: int = 1) -> tuple[np.ndarray, ...]:
    """Bytes, and each row's error as the native module says it."""
    weights = np.ones(x.shape[1], np.float32) if w is None else w
    found: tuple[np.ndarray, ...] = _native.quantize(int(type), x, weights, threads)
    return found


def package_values(type: GgmlType, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values: np.ndarray = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(type)))
    return values.reshape(shape)


@pytest.mark.parametrize("type", BELOW)
def test_the_gguf_package_reads_what_we_read_and_the_error_is_the_one_said(type: GgmlType) -> None:
    x = normal(24, 512)
    x[3] *= 1e-6  # rows whose scales are subnormal, zero, large, one-sided, one outlier
    x[4] = 0
    x[5] *= 1e4
    x[6] = np.abs(x[6]) + 0.3
    x[7] = -np.abs(x[7])
    x[8, 100] = 9
    x[9] = 0.25
    w = np.random.default_rng(1).uniform(0.1, 4, 512).astype(np.float32)
    data, errors = quantize(type, x, w)
    values = package_values(type, data, x.shape)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(dequantize(data, type).reshape(x.shape), values, rtol=1e-6)
    np.testing.assert_allclose(errors, np.sum(w * (x.astype(np.float64) - values) ** 2, axis=1), rtol=1e-4, atol=1e-14)
    relative = np.sqrt(np.sum((x - values) ** 2, axis=1) / np.maximum(np.sum(x**2, axis=1), 1e-30))
    assert (relative[[6, 9]] < 0.1).all() and relative[4] == 0
    assert relative[10:].max() < 1.6 * BELOW[type]  # with weights that it also serves


@pytest.mark.parametrize("type", BELOW)
def test_normal_values_lose_less_than_a_plain_uniform_quantiser(type: GgmlType) -> None:
    x = normal(32, 1024)
    data, errors = quantize(type, x)
    assert np.sqrt(errors.sum() / np.sum(x**2)) < BELOW[type]


@pytest.mark.parametrize("type", IN_PACKAGE)
def test_errors_are_below_those_of_the_package(type: GgmlType) -> None:
    x = normal(64, 256)
    kind = gguf.GGMLQuantizationType(int(type))
    theirs = np.sum((x - gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)) ** 2)
    _, errors = quantize(type, x)
    assert errors.sum() < 0.96 * theirs


@pytest.mark.parametrize("type", BELOW)
def test_weights_move_the_error_to_where_it_matters_less(type: GgmlType) -> None:
    x = normal(64, 256)
    w = np.where(np.arange(256) % 8 == 0, 50, 1).astype(np.float32)
    kept, plain = quantize(type, x, w)[1].sum(), quantize(type, x)[0]
    without = np.sum(w * (x - package_values(type, plain, x.shape)) ** 2)
    assert kept < (0.97 if type is GgmlType.Q8_0 else 0.85) * without


@pytest.mark.parametrize("type", BELOW)
def test_values_that_the_type_can_hold_come_back_nearly_exactly(type: GgmlType) -> None:
    x = normal(16, 256)
    once = package_values(type, quantize(type, x)[0], x.shape)
    twice = package_values(type, quantize(type, np.ascontiguousarray(once))[0], x.shape)
    assert np.sum((once - twice) ** 2) < 0.06 * np.sum((x - once) ** 2)


@pytest.mark.parametrize("type", [GgmlType.Q4_0, GgmlType.Q4_K])
def test_any_number_of_threads_gives_the_same_bytes(type: GgmlType) -> None:
    x = normal(7, 256)
    assert np.array_equal(quantize(type, x)[0], quantize(type, x, threads=3)[0])


def test_what_cannot_be_quantised_is_refused() -> None:
    x = normal(2, 96)
    for type, fault in ((GgmlType.F16, "not a quantised type"), (GgmlType.Q4_K, "not a whole number of blocks")):
        with pytest.raises(ValueError, match=fault):
            quantize(type, x)
    with pytest.raises(ValueError, match="one weight for each column"):
        quantize(GgmlType.Q4_0, x, np.ones(95, np.float32))
    broken = Tensor.from_numpy("a", np.where(np.arange(64).reshape(2, 32) == 40, np.nan, 1).astype(np.float32))
    with pytest.raises(ModelError, match="'a' holds values that are no numbers"):
        tensors.encode(broken, GgmlType.Q4_0, tensors.uniform(broken), 1)


def test_options_of_a_tensor_are_judged_as_the_whole_is() -> None:
    tensor = Tensor.from_numpy("a.weight", normal(3000, 256))
    rng = np.random.default_rng(3)
    cost = Importance(rng.uniform(1, 2, 256).astype(np.float32), rng.uniform(1, 2, 3000).astype(np.float32), 7.0)
    for option in tensors.options(tensor, cost, 1):
        whole, loss = tensors.encode(tensor, option.type, cost, 1)
        assert option.size == whole.nbytes
        assert option.loss == pytest.approx(loss, rel=0.05)
        error = (tensor.numpy() - whole.numpy()).astype(np.float64) ** 2
        expected = 0.5 * np.sum(cost.rows[:, None] * cost.columns * error)
        expected += 0.5 * 7.0 * np.sum(cost.columns * error) / cost.columns.sum()
        assert loss == pytest.approx(expected, rel=1e-4)
    assert {option.type for option in tensors.options(tensor, cost, 1)} == set(BELOW)


def test_a_matrix_keeps_its_own_blocks_where_it_keeps_its_type() -> None:
    x = normal(4, 96)
    own = Tensor("a", GgmlType.Q4_1, (4, 96), gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_1).reshape(-1))
    same, loss = tensors.encode(own, GgmlType.Q4_1, tensors.uniform(own), 1)
    assert same is own and loss == 0
    kinds = tensors.possible(own)
    assert GgmlType.Q4_1 in kinds and GgmlType.Q4_K not in kinds  # 96 values are no whole super-block
    assert tensors.fitting(own, GgmlType.Q4_K) is GgmlType.Q4_1 and tensors.fitting(own, GgmlType.Q4_0) is GgmlType.Q4_0
