"""Norms, products and their epilogues one at a time, on odd widths and every ISA, against float64 formulas."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from millis import _native
from tiny_runtime import Tiny, ints

ISAS = _native.supported_isas()
PAIRS = ("avx512bf16", "amx", "neon-bf16")  # wide products in pairs of bfloat16
RNG = np.random.default_rng(11)
COUNTS = [1, 4, 5, 33, 130]  # rows: private copies up to 4, kernel tiles of 32, blocks of 128


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float, layer: bool) -> np.ndarray:
    x = x.astype(np.float64)
    if layer:
        x = x - x.mean(-1, keepdims=True)
    out = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return out if bias is None else out + bias


def activated(x: np.ndarray, name: str) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 100, 577])
def test_norms(width: int, layer: bool, isa: str) -> None:
    """One by itself, one with a residual into the residual's buffer, one fused into the product behind it."""
    table, weight, bias = 3 * normal(40, width) + 0.7, normal(width), normal(width) if layer else None
    tiny = Tiny(table, width, isa=isa)
    for name in ("alone", "sum", "fused", "out"):
        tiny.native.add_buffer(name, width)
    tiny.vector("weight", weight)
    tiny.matrix("plain", np.eye(width))
    if bias is not None:
        tiny.vector("bias", bias)
    named = "bias" if layer else ""
    tiny.native.norm("alone", "x", "weight", named, 1e-5, layer, "")
    tiny.native.norm("x", "alone", "weight", named, 1e-2, layer, "x")
    tiny.native.norm("fused", "x", "weight", named, 1e-5, layer, "")
    tiny.native.matmul("out", "fused", ["plain"], [], "", "", "")
    alone = norm(table, weight, bias, 1e-5, layer)
    want = norm(norm(alone, weight, bias, 1e-2, layer) + table, weight, bias, 1e-5, layer)
    # Three norms in a row enlarge a rounding by up to 1 / sqrt(eps) where a row's variance is 0, at width 1.
    np.testing.assert_allclose(tiny.finish("out").run(np.arange(40)), want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(("begin", "end"), [(0, 5), (5, 64), (16, 17), (0, 67)])
def test_norms_of_some_columns_in_place(begin: int, end: int, layer: bool, isa: str) -> None:
    """The product behind reads the others as they were."""
    table, weight = 3 * normal(40, 67) + 0.7, normal(end - begin)
    tiny = Tiny(table, 67, isa=isa)
    tiny.native.add_buffer("out", 67)
    tiny.vector("weight", weight)
    tiny.matrix("plain", np.eye(67))
    tiny.native.norm("x", "x", "weight", "", 1e-3, layer, "", begin, end)
    tiny.native.matmul("out", "x", ["plain"], [], "", "", "")
    want = table.astype(np.float64)
    want[:, begin:end] = norm(table[:, begin:end], weight, None, 1e-3, layer)
    np.testing.assert_allclose(tiny.finish("out").run(np.arange(40)), want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("width", "taps"), [(16, 1), (48, 3), (80, 2), (96, 8)])
def test_convolutions(width: int, taps: int, exact: bool, isa: str) -> None:
    """Whole; then in pieces, each behind guesses that were wrong, beside another sequence, its pages scattered.

    What is kept is f16, but in exact.
    """
    table, weight = normal(70, 3 * width), normal(taps, width)
    layers = -(-width // 32)  # of keys and values, 32 floats a token each
    tiny = Tiny(table, width, isa=isa, exact=exact, layers=layers + 1, threads=3, screen=False)
    tiny.native.add_buffer("out", width)
    tiny.vector("weight", weight.reshape(-1))
    tiny.native.convolve("out", "x", "weight", 1, taps)
    tiny.finish("out")
    b, c, x = (part.astype(np.float64) for part in np.split(table, 3, axis=1))
    kept = np.concatenate([np.zeros((taps - 1, width)), b * x])
    want = c * sum(weight[tap] * kept[tap : tap + 70] for tap in range(taps))
    close = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.02, "atol": 0.03}
    whole = tiny.run(np.arange(70))
    np.testing.assert_allclose(whole, want, **close)
    other, at = [7, 3], 0
    for size in (1, 1, 29, 2, 30, 7):
        part = np.arange(at, at + size)
        tiny.run(part[::-1] // 2, starts=[at], pages=[[9, 4, 30]])
        got = tiny.run(part, other, starts=[at, 0], pages=[[9, 4, 30], [1]])
        np.testing.assert_array_equal(got[:size], whole[at : at + size])
        at += size


def test_what_a_convolution_keeps_ends_at_the_largest_half() -> None:
    """Beyond it would lie infinity, of which sums of others make NaN; NaN stays NaN."""
    table = np.full((3, 48), 1e3, np.float32)
    table[2] = np.nan
    tiny = Tiny(table, 16, exact=False, screen=False)
    tiny.native.add_buffer("out", 16)
    tiny.vector("weight", np.concatenate([np.full(16, 1e-3), np.zeros(16)]))
    tiny.native.convolve("out", "x", "weight", 0, 2)
    got = tiny.finish("out").run([0, 1, 2, 0])
    np.testing.assert_allclose(got[1], 65504.0, rtol=0.01)
    assert np.isnan(got[3]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
def test_a_product_with_everything_behind_it(activation: str, count: int, isa: str) -> None:
    """Three weights side by side, none a multiple of 16 rows, with bias, activation and the residual's own buffer."""
    inputs, outputs = 67, (1, 15, 21)
    table, residual = normal(count, inputs), normal(sum(outputs), inputs)
    weights, biases = [normal(rows, inputs) for rows in outputs], [normal(rows) for rows in outputs]
    tiny = Tiny(table, sum(outputs), isa=isa, threads=3, context=256)
    tiny.native.add_buffer("out", sum(outputs))
    tiny.matrix("residual", residual)
    for i in range(3):
        tiny.matrix(f"w{i}", weights[i])
        tiny.vector(f"b{i}", biases[i])
    tiny.native.matmul("out", "x", ["residual"], [], "", "", "")
    tiny.native.matmul("out", "x", ["w0", "w1", "w2"], ["b0", "b1", "b2"], activation, "out", "")
    x = table.astype(np.float64)
    want = activated(x @ np.concatenate(weights).T + np.concatenate(biases), activation) + x @ residual.T
    np.testing.assert_allclose(tiny.finish("out").run(np.arange(count)), want, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0"])
def test_a_gated_product(type: str, count: int, isa: str) -> None:
    inputs, outputs = 96, 37
    table, kind = normal(count, inputs), gguf.GGMLQuantizationType[type]
    tiny = Tiny(table, outputs, isa=isa, exact=False, context=256)
    values = []
    for name in ("gate", "up"):
        data = gguf.quants.quantize(normal(outputs, inputs), kind)
        tiny.native.add_matrix(name, int(kind), outputs, inputs, data.reshape(-1).view(np.uint8))
        values.append(gguf.quants.dequantize(data, kind).astype(np.float64))
    tiny.native.add_buffer("out", outputs)
    tiny.native.matmul("out", "x", ["up"], [], "silu", "", "gate")
    gate, up = (table @ w.T for w in values)
    # Sums of floats are off by some rounded terms, a rounded activation by half of 1 / 32512 of the largest; silu is
    # nowhere steeper than 1.1.
    off = [1e-6 * np.abs(table) @ np.abs(w).T for w in values]
    if type == "Q8_0":
        off = [np.abs(table).max() / 65024 * np.abs(w).sum(1) for w in values]
    if type == "Q8_0" and count > 16 and isa in PAIRS:  # both sides rounded, by 1 / 512
        off = [np.abs(table) @ np.abs(w).T / 250 for w in values]
    bound = 1.1 * off[0] * np.abs(up) + np.abs(activated(gate, "silu")) * off[1] + 5e-4
    assert (np.abs(tiny.finish("out").run(np.arange(count)) - activated(gate, "silu") * up) < bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 8, 9, 40, 47, 64, 300])
@pytest.mark.parametrize("gated", [True, False])
def test_products_that_hand_over_operands(gated: bool, count: int, isa: str) -> None:
    """The same bits, whether the second product alone reads what the first one writes or a norm does, too."""
    table, kind, found = normal(count, 96), gguf.GGMLQuantizationType.Q4_0, []
    shapes = {"gate": (160, 96), "up": (160, 96), "down": (96, 160)}
    weights = {name: gguf.quants.quantize(normal(*shape), kind) for name, shape in shapes.items()}
    for twice in (False, True):
        tiny = Tiny(table, 96, isa=isa, exact=False, max_tokens=320)
        for name, data in weights.items():
            tiny.native.add_matrix(name, int(kind), *shapes[name], data.reshape(-1).view(np.uint8))
        for name, width in {"inner": 160, "other": 160, "out": 96}.items():
            tiny.native.add_buffer(name, width)
        tiny.vector("ones", np.ones(160, np.float32))
        tiny.vector("bias", np.arange(160, dtype=np.float32) / 100)
        tiny.native.matmul("inner", "x", ["up"], [] if gated else ["bias"], "silu", "", "gate" if gated else "")
        tiny.native.matmul("out", "inner", ["down"], [], "", "x", "")
        if twice:
            tiny.native.norm("other", "inner", "ones", "", 1e-5, False, "")
        found.append(tiny.finish("out").run(np.arange(count)))
    assert np.isfinite(found[0]).all() and np.abs(found[0]).max() > 1
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_over_their_whole_range(activation: str, isa: str) -> None:
    values = np.concatenate([np.linspace(-12, 12, 97), [-1e30, -200, -88, 0, 88, 200, 1e30]]).astype(np.float32)
    tiny = Tiny(values[:, None], 1, isa=isa)
    tiny.native.add_buffer("out", 1)
    tiny.matrix("one", np.ones((1, 1)))
    tiny.native.matmul("out", "x", ["one"], [], activation, "", "")
    want = np.where(values < -80, 0, activated(np.maximum(values, -80).astype(np.float64), activation))
    np.testing.assert_allclose(tiny.finish("out").run(np.arange(104))[:, 0], want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh", "gelu", "relu", "tanh"])
def test_an_activation_of_no_number_is_none(activation: str, isa: str) -> None:
    tiny = Tiny(np.array([[np.nan], [1.0]], np.float32), 1, isa=isa)
    tiny.native.add_buffer("out", 1)
    tiny.matrix("one", np.ones((1, 1)))
    tiny.native.matmul("out", "x", ["one"], [], activation, "", "")
    assert np.isnan(tiny.finish("out").run([0, 1])[:, 0]).tolist() == [True, False]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [3, 40])  # by few queries, and by many
def test_keys_of_no_number_are_no_weights(count: int, exact: bool, isa: str) -> None:
    """One NaN among a layer's keys: its queries' answers are none, instead of a mean of all values."""
    table = normal(64, 32)
    tiny = Tiny(table, 16, isa=isa, exact=exact, kv_heads=1)
    weights = normal(48, 32)
    weights[16, 3] = np.nan  # of the keys
    tiny.matrix("w", weights)
    tiny.native.add_buffer("qkv", 48)
    tiny.native.add_buffer("out", 16)
    tiny.native.matmul("qkv", "x", ["w"], [], "", "", "")
    tiny.native.attention("out", "qkv", 0, 1, 0.25, "", False, 0, "", "", 1e-6)
    assert np.isnan(tiny.finish("out").run(range(count))).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", [True, False])
def test_scale_and_learned_positions(isa: str, exact: bool) -> None:
    table, positions = normal(40, 33), normal(64, 33)
    tiny = Tiny(table, 33, isa=isa, exact=exact, context=64)
    tiny.matrix("positions", positions)
    tiny.native.add_buffer("placed", 33)
    tiny.native.embed("placed", "table", 2.5, "positions")
    tokens = [7, 0, 7, 39]
    got = tiny.finish("placed").run(tokens, starts=[30])
    np.testing.assert_allclose(got, 2.5 * table[tokens] + positions[30:34], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_poisoned_row_leaves_its_neighbours_alone(poison: float, isa: str) -> None:
    """Through norm, quantised product, activation and attention; its own sequence is NaN, and sampling says so."""
    table = normal(8, 96)
    table[3, 17] = poison
    data = gguf.quants.quantize(normal(96, 96), gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    tiny = Tiny(table, 32, isa=isa, exact=False, kv_heads=2)
    tiny.native.add_matrix("w", 8, 96, 96, data)
    tiny.vector("weight", np.ones(96))
    for name, width in (("y", 96), ("qkv", 96), ("out", 32)):
        tiny.native.add_buffer(name, width)
    tiny.native.norm("y", "x", "weight", "", 1e-6, True, "")
    tiny.native.matmul("qkv", "y", ["w"], [], "gelu_tanh", "", "")
    tiny.native.attention("out", "qkv", 0, 2, 0.2, "", False, 0, "", "", 1e-6)
    tiny.finish("out")
    clean = tiny.run([1, 2], [4, 5])
    mixed = tiny.run([1, 2], [3, 7], [4, 5])
    np.testing.assert_array_equal(mixed[[0, 1, 4, 5]], clean)
    if np.isfinite(poison):
        return
    assert np.isnan(mixed[2:4]).all()
    samplers = [_native.Sampler(tiny.vocab) for _ in range(2)]
    found = tiny.native.step(*tiny.arrays([3, 7], [1, 2]), samplers, ints([0, 0]))
    assert [row[0][0] for row in found] == [_native.UNUSABLE, clean[1].argmax()]
