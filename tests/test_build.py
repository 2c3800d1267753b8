"""What the native runtime refuses while it is built and asked: sizes, names and arrays that may be hostile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from millis import _native
from tiny_runtime import NONE, SHAPE, SIZES, Tiny, ints, stored

LARGE = 2**31 - 1


def tiny() -> Tiny:
    """x [16], qkv [48], out [16]; a matrix, a norm's weight and a rotation's table that fit."""
    made = Tiny(np.eye(16, dtype=np.float32), 16, pages=3, context=64)
    for name, width in (
        ("y", 16),
        ("qkv", 48),
        ("logits", 16),
        ("narrow", 8),
        ("thrice", 24),
        ("three", 48),
        ("nine", 144),
    ):
        made.native.add_buffer(name, width)
    made.matrix("square", np.eye(16))
    made.matrix("wide", np.ones((48, 16)))
    made.matrix("short", np.ones((15, 16)))
    made.vector("weight", np.ones(16))
    made.vector("taps", np.ones(48))
    made.vector("rope", np.ones(64 * 16))
    return made


BAD_SIZES = {
    "threads": (0, -1, 1025, LARGE),
    "max_tokens": (0, 65537, LARGE, -LARGE),
    "max_outputs": (0, 257, LARGE),
    "pages": (0, -1, LARGE),
    "layers": (0, LARGE),
    "kv_heads": (0, 4097, LARGE),
    "head_dim": (0, 8, 24, -16, 1040, LARGE),
    "vocab": (0, LARGE, -LARGE),
    "context": (0, LARGE),
    "isa": ("sse9", ""),
}


@pytest.mark.parametrize("name", sorted(BAD_SIZES))
def test_sizes_out_of_range_are_named(name: str) -> None:
    for value in BAD_SIZES[name]:
        with pytest.raises(ValueError, match=name if name != "isa" else "ISA"):
            _native.Runtime(**{**SIZES, **SHAPE, "vocab": 16, name: value})


def test_a_cache_beyond_all_memory_is_a_memory_error() -> None:
    made = Tiny(np.eye(16, dtype=np.float32), 16, pages=1 << 26, layers=1 << 16, kv_heads=4096)
    with pytest.raises(MemoryError):
        made.finish("x")
    with pytest.raises(MemoryError):
        tiny().native.add_vector("rest", np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (2**44,), (4,)))


BAD_OPS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "buffer of no width": ("width", lambda n: n.add_buffer("b", 0)),
    "buffer too wide": ("width", lambda n: n.add_buffer("b", LARGE)),
    "buffer twice": ("twice", lambda n: n.add_buffer("x", 16)),
    "matrix twice": ("twice", lambda n: n.add_matrix("square", 0, 1, 1, stored(np.ones((1, 1))))),
    "vector twice": ("twice", lambda n: n.add_vector("weight", np.ones(3, np.float32))),
    "matrix without rows": ("m: 0 rows", lambda n: n.add_matrix("m", 0, 0, 16, stored(np.ones((0, 16))))),
    "matrix of negative size": ("m: -1 rows of -16", lambda n: n.add_matrix("m", 0, -1, -16, stored(np.ones((1, 16))))),
    "matrix too large": ("m: .*range", lambda n: n.add_matrix("m", 0, LARGE, LARGE, np.zeros(4, np.uint8))),
    "matrix of another size": ("m: 64 bytes", lambda n: n.add_matrix("m", 0, 2, 16, stored(np.ones((1, 16))))),
    "row of half a block": ("m: .*blocks", lambda n: n.add_matrix("m", 12, 1, 128, np.zeros(72, np.uint8))),
    "unknown type": ("GGML type 99", lambda n: n.add_matrix("m", 99, 1, 16, np.zeros(16, np.uint8))),
    "embed of another width": ("does not fit", lambda n: n.embed("qkv", "square", 1.0, "")),
    "embed with too few rows": ("does not fit", lambda n: n.embed("x", "short", 1.0, "")),
    "embed with too few positions": ("does not fit", lambda n: n.embed("x", "square", 1.0, "square")),
    "norm in place": ("do not fit", lambda n: n.norm("x", "x", "weight", "", 1e-6, False, "")),
    "norm of columns elsewhere": ("do not fit", lambda n: n.norm("y", "x", "weight", "", 1e-6, False, "", 0, 16)),
    "norm of columns beyond": ("do not fit", lambda n: n.norm("x", "x", "weight", "", 1e-6, False, "", 1, 17)),
    "norm of columns before": ("do not fit", lambda n: n.norm("x", "x", "weight", "", 1e-6, False, "", -1, 15)),
    "norm of columns and a residual": ("do not fit", lambda n: n.norm("x", "x", "weight", "", 1e-6, False, "y", 0, 16)),
    "norm of fewer columns": ("weight must hold 8", lambda n: n.norm("x", "x", "weight", "", 1e-6, False, "", 8, 16)),
    "norm of another width": ("do not fit", lambda n: n.norm("qkv", "x", "weight", "", 1e-6, False, "")),
    "norm's residual": ("do not fit", lambda n: n.norm("y", "x", "weight", "", 1e-6, False, "qkv")),
    "norm without a weight": ("weight", lambda n: n.norm("y", "x", "", "", 1e-6, False, "")),
    "norm's weight": ("rope must hold 16", lambda n: n.norm("y", "x", "rope", "", 1e-6, False, "")),
    "norm's bias": ("rope must hold 16", lambda n: n.norm("y", "x", "weight", "rope", 1e-6, True, "")),
    "product in place": ("bad buffers", lambda n: n.matmul("x", "x", ["square"], [], "", "", "")),
    "product of nothing": ("no weights", lambda n: n.matmul("y", "x", [], [], "", "", "")),
    "product of another input": ("does not fit", lambda n: n.matmul("y", "qkv", ["square"], [], "", "", "")),
    "product too narrow": ("do not fit", lambda n: n.matmul("y", "x", ["short"], [], "", "", "")),
    "product too wide": ("does not fit", lambda n: n.matmul("y", "x", ["square", "square"], [], "", "", "")),
    "product's residual": ("do not fit", lambda n: n.matmul("y", "x", ["square"], [], "", "qkv", "")),
    "biases for some": ("one bias", lambda n: n.matmul("qkv", "x", ["wide"], ["weight"] * 2, "", "", "")),
    "bias of another size": ("weight must hold 48", lambda n: n.matmul("qkv", "x", ["wide"], ["weight"], "", "", "")),
    "bias without a name": ("without a name", lambda n: n.matmul("y", "x", ["square"], [""], "", "", "")),
    "unknown activation": ("swish", lambda n: n.matmul("y", "x", ["square"], [], "swish", "", "")),
    "gate of another size": ("does not fit", lambda n: n.matmul("y", "x", ["square"], [], "silu", "", "wide")),
    "layer below": ("layer", lambda n: attention(n, layer=-1)),
    "layer above": ("layer", lambda n: attention(n, layer=1)),
    "no heads": ("heads", lambda n: attention(n, heads=0)),
    "heads beyond the buffer": ("buffers", lambda n: attention(n, heads=2)),
    "heads beyond all": ("heads", lambda n: attention(n, heads=LARGE)),
    "negative window": ("window", lambda n: attention(n, window=-1)),
    "rotation of another size": ("weight must rotate an even number", lambda n: attention(n, rope="weight")),
    "head norm of another size": ("rope must hold 16", lambda n: attention(n, norm="rope")),
    "convolution in place": ("do not fit", lambda n: n.convolve("qkv", "qkv", "taps", 0, 3)),
    "convolution of another width": ("do not fit", lambda n: n.convolve("x", "y", "taps", 0, 3)),
    "convolution of no taps": ("1 to 8 taps", lambda n: n.convolve("y", "qkv", "taps", 0, 0)),
    "convolution of many taps": ("1 to 8 taps", lambda n: n.convolve("y", "qkv", "taps", 0, LARGE)),
    "convolution's weight": ("taps must hold 32", lambda n: n.convolve("y", "qkv", "taps", 0, 2)),
    "convolution without a weight": ("needs a weight", lambda n: n.convolve("y", "qkv", "", 0, 3)),
    "convolution's layer below": ("no layer -1", lambda n: n.convolve("y", "qkv", "taps", -1, 3)),
    "convolution's layer above": ("no layer 1", lambda n: n.convolve("y", "qkv", "taps", 1, 3)),
    "convolution beyond the layers": ("no layer 1", lambda n: n.convolve("three", "nine", "taps", 0, 1)),
    "convolution of odd columns": ("multiple of 16", lambda n: n.convolve("narrow", "thrice", "taps", 0, 1)),
    "select in place": ("do not fit", lambda n: n.select("x", "x")),
    "select of another width": ("do not fit", lambda n: n.select("qkv", "x")),
}  # fmt: skip


def attention(native: Any, layer: int = 0, heads: int = 1, window: int = 0, rope: str = "", norm: str = "") -> None:
    native.attention("y", "qkv", layer, heads, 1.0, rope, False, window, norm, norm, 1e-6)


@pytest.mark.parametrize("case", sorted(BAD_OPS))
def test_ops_that_do_not_fit_are_refused_by_name(case: str) -> None:
    message, build = BAD_OPS[case]
    with pytest.raises(ValueError, match=message):
        build(tiny().native)


def test_names_must_exist() -> None:
    native = tiny().native
    for build in (
        lambda: native.embed("none", "square", 1.0, ""),
        lambda: native.embed("x", "none", 1.0, ""),
        lambda: native.norm("y", "none", "weight", "", 1e-6, False, ""),
        lambda: native.norm("y", "x", "none", "", 1e-6, False, ""),
        lambda: native.matmul("y", "x", ["none"], [], "", "", ""),
        lambda: native.convolve("y", "none", "taps", 0, 3),
        lambda: native.convolve("y", "qkv", "none", 0, 3),
        lambda: native.select("y", "none"),
    ):
        with pytest.raises(ValueError, match="no (buffer|matrix|vector) none"):
            build()


def test_only_the_last_op_may_use_the_logits() -> None:
    """They have as many rows as outputs, not as tokens: an op before the select would write past their end."""
    early = tiny().native
    early.matmul("logits", "x", ["square"], [], "", "", "")
    late = tiny().native
    late.select("y", "x")
    late.matmul("logits", "y", ["square"], [], "", "logits", "")
    for native in (early, late):
        native.select("y", "x")
        native.matmul("logits", "y", ["square"], [], "", "", "")
        with pytest.raises(ValueError, match="logits"):
            native.finish()


def test_nothing_is_added_once_finished() -> None:
    made = Tiny(np.eye(16, dtype=np.float32), 16).finish("x")
    want = made.run([1, 2, 3])
    for build in (
        lambda n: n.add_buffer("b", 4),
        lambda n: n.add_matrix("m", 0, 1, 1, stored(np.ones((1, 1)))),
        lambda n: n.add_vector("v", np.ones(1, np.float32)),
        lambda n: n.embed("x", "table", 1.0, ""),
        lambda n: n.norm("selected", "x", "v", "", 1e-6, False, ""),
        lambda n: n.matmul("logits", "x", ["table"], [], "", "", ""),
        lambda n: n.select("selected", "x"),
        lambda n: n.finish(),
    ):
        with pytest.raises(ValueError, match="finished"):
            build(made.native)
    np.testing.assert_array_equal(made.run([1, 2, 3]), want)


def test_arrays_are_taken_only_as_they_are_meant() -> None:
    """A 64-bit id would wrap, a table of no bytes may claim any width, and lengths may sum to more than an int."""
    made = Tiny(np.eye(16, dtype=np.float32), 16).finish("x")
    good = made.arrays([1, 2], [3])
    want = made.native.logits(*good)
    for at, wrong in ((0, np.array([2**32 + 1, 2, 3])), (3, np.zeros((2, 2), np.int32)[:, :1]), (0, [1, 2, 3])):
        with pytest.raises(TypeError):
            made.native.logits(*good[:at], wrong, *good[at + 1 :])
    sixteen = (ints([0] * 16), ints([0] * 16), ints([1] * 16))
    for tables in (np.zeros((0, 2**60), np.int32), np.zeros((16, 0), np.int32), np.zeros((0, 0), np.int32)):
        with pytest.raises(ValueError, match="page table"):
            made.native.logits(*sixteen, tables)
    with pytest.raises(ValueError, match="batch"):
        made.native.logits(ints([1, 2]), ints([0, 0]), ints([LARGE, LARGE]), ints([[0], [1]]))
    odd = [np.concatenate([np.zeros(1, np.uint8), a.reshape(-1).view(np.uint8)])[1:].view(np.int32) for a in good]
    assert not odd[0].flags.aligned
    np.testing.assert_array_equal(made.native.logits(*odd[:3], odd[3].reshape(2, 1)), want)


def test_samplers_must_belong_to_the_model_and_the_sequence() -> None:
    made = Tiny(np.eye(16, dtype=np.float32), 16).finish("x")
    arrays = made.arrays([1, 2], [3])
    with pytest.raises(ValueError, match="another vocabulary"):
        made.native.step(*arrays, [_native.Sampler(15), None], NONE)
    for wrong in ([None, 3], [None, "x"], None, 5):
        with pytest.raises(TypeError):
            made.native.step(*arrays, wrong, NONE)
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match="each sequence"):
            made.native.step(*arrays, [None] * count, NONE)
    samplers = (_native.Sampler(16), _native.Sampler(16))
    assert [token for ((token, _, _),) in made.native.step(*arrays, samplers, NONE)] == [2, 3]
