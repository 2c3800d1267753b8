"""Native attention alone, against a plain float64 loop: windows, grouped heads, rotations, norms, pages, the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from millis import _native
from tiny_runtime import PAGE, Tiny

ISAS = _native.supported_isas()
ROWS = 64  # distinct tokens
CONTEXT = 512


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 0
    rope: str = ""  # "", "half" or "interleaved"
    norms: bool = False
    norm_rotated: bool = False  # norms behind the rotation
    rotated: int = 0  # of each head's coordinates, the first so many; 0: all

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def scale(self) -> float:
        return 1.3 / self.head_dim**0.5


SHAPES = [
    Shape(heads=1, kv_heads=1, head_dim=16),
    Shape(heads=3, kv_heads=3, head_dim=48),
    Shape(heads=6, kv_heads=1, head_dim=80),
    Shape(heads=14, kv_heads=2, head_dim=64, rope="half"),
    Shape(heads=9, kv_heads=3, head_dim=64, rope="interleaved"),
    Shape(heads=4, kv_heads=1, head_dim=256, window=7, rope="half", norms=True),
    Shape(window=1),
    Shape(window=31, rope="interleaved", norms=True),
    Shape(window=32),
    Shape(window=33, rope="half"),
    Shape(window=2**31 - 1, norms=True),
    Shape(rope="half", norms=True, norm_rotated=True),
    Shape(window=40, rope="interleaved", norms=True, norm_rotated=True, rotated=6),
    Shape(heads=2, kv_heads=1, head_dim=128, rope="half", rotated=96),
]


class Case:
    """Random rows of q, k and v for every token, random weights, and what they give."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.table = rng.standard_normal((max(ROWS, shape.width), columns)).astype(np.float32)
        self.q_norm, self.k_norm = rng.uniform(0.5, 1.5, (2, shape.head_dim)).astype(np.float32)
        half = (shape.rotated or shape.head_dim) // 2
        angles = np.outer(np.arange(CONTEXT), 10000.0 ** (-np.arange(half) / half))
        self.rope = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)

    def runtime(self, **config: object) -> Tiny:
        shape = self.shape
        tiny = Tiny(
            self.table,
            shape.width,
            **{"kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "context": CONTEXT, **config},
        )
        tiny.vector("q_norm", self.q_norm)
        tiny.vector("k_norm", self.k_norm)
        tiny.vector("rope", self.rope.reshape(-1))
        tiny.native.add_buffer("out", shape.width)
        norms = ("q_norm", "k_norm") if shape.norms else ("", "")
        tiny.native.attention(
            "out", "x", 0, shape.heads, shape.scale, shape.rope and "rope", shape.rope == "interleaved",
            shape.window, *norms, 1e-6, norm_rotated=shape.norm_rotated,
        )  # fmt: skip
        return tiny.finish("out")

    def prepared(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] after norm and rotation, float64."""
        shape = self.shape
        rows = self.table[tokens].astype(np.float64).reshape(len(tokens), -1, shape.head_dim)
        q, k, v = np.split(rows, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        return self.placed(q, self.q_norm), self.placed(k, self.k_norm), v

    def placed(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        shape = self.shape
        if shape.rope and shape.norm_rotated:
            x = self.rotated(x)
        if shape.norms:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
        return self.rotated(x) if shape.rope and not shape.norm_rotated else x

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """Each pair of coordinates as one complex number, times e^(i angle)."""
        half = self.rope.shape[-1]
        pairs = [(i, i + half) if self.shape.rope == "half" else (2 * i, 2 * i + 1) for i in range(half)]
        turn = (self.rope[0].astype(np.float64) + 1j * self.rope[1].astype(np.float64))[: len(x), None]
        out = x.copy()
        for i, (a, b) in enumerate(pairs):
            turned = (x[..., a] + 1j * x[..., b]) * turn[..., i]
            out[..., a], out[..., b] = turned.real, turned.imag
        return out

    def half_precision_bound(self, tokens: np.ndarray) -> float:
        """What a cache of half precision may err: k and v are off by at most 2^-11 of themselves, so scores by `off`,
        weights by a factor of e^(2 off)."""
        q, k, v = self.prepared(tokens)
        lengths = np.repeat(np.abs(k), self.shape.heads // self.shape.kv_heads, axis=1)
        off = self.shape.scale * 2.0**-11 * np.einsum("thd,shd->ths", np.abs(q), lengths).max()
        return float((np.expm1(2 * off) + 2.0**-11) * np.abs(v).max() + 1e-5)

    def want(self, tokens: np.ndarray) -> np.ndarray:
        q, k, v = self.prepared(tokens)
        out = np.empty_like(q)
        for t in range(len(tokens)):
            seen = slice(max(0, t - self.shape.window + 1) if self.shape.window else 0, t + 1)
            for h in range(self.shape.heads):
                kv = h * self.shape.kv_heads // self.shape.heads
                scores = k[seen, kv] @ q[t, h] * self.shape.scale
                weights = np.exp(scores - scores.max())
                out[t, h] = weights @ v[seen, kv] / weights.sum()
        return out.reshape(len(tokens), -1)


def tokens_of(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ROWS, count)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_plain_loop(shape: Shape, isa: str, threads: int) -> None:
    case, tokens = Case(shape), tokens_of(75)
    np.testing.assert_allclose(case.runtime(isa=isa, threads=threads).run(tokens), case.want(tokens), atol=1e-5)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("threads", [1, 2, 9])
def test_sequences_of_one_step_do_not_see_each_other(window: int, threads: int) -> None:
    case = Case(Shape(heads=6, kv_heads=2, window=window, rope="half"))
    sequences = [tokens_of(count, count) for count in (1, 33, 64, 2, 100)]
    order = np.random.default_rng(2).permutation(32)
    pages = [order[5 * s : 5 * s + 5] for s in range(5)]
    got = case.runtime(threads=threads).run(*sequences, pages=pages)
    np.testing.assert_allclose(got, np.concatenate([case.want(tokens) for tokens in sequences]), atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 70, 300])
@pytest.mark.parametrize("chunk", [1, 31, 97, 256])
def test_a_long_context_in_chunks_over_scattered_pages(window: int, chunk: int, isa: str) -> None:
    count = CONTEXT if chunk > 1 else 2 * PAGE + 3
    case = Case(Shape(heads=2, kv_heads=1, head_dim=16, window=window, rope="interleaved"))
    runtime, tokens = case.runtime(isa=isa), tokens_of(count)
    pages = [np.random.default_rng(3).permutation(32)[: -(-count // PAGE)]]
    got = [runtime.run(tokens[at : at + chunk], starts=[at], pages=pages) for at in range(0, count, chunk)]
    np.testing.assert_allclose(np.concatenate(got), case.want(tokens), atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_the_half_precision_cache_errs_no_more_than_its_rounding(shape: Shape, isa: str) -> None:
    case, tokens = Case(shape), tokens_of(75)
    error = np.abs(case.runtime(isa=isa, exact=False).run(tokens) - case.want(tokens)).max()
    assert 1e-5 < error < case.half_precision_bound(tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [0, 70, 300])
@pytest.mark.parametrize("chunk", [9, 97, 256])
def test_many_queries_over_a_long_half_precision_cache(chunk: int, window: int, threads: int, isa: str) -> None:
    """Up to 1,280 queries of a KV head: several units of several passes over several blocks of keys."""
    case = Case(Shape(heads=10, kv_heads=2, head_dim=32, window=window, rope="half"))
    runtime, tokens = case.runtime(isa=isa, exact=False, threads=threads), tokens_of(CONTEXT)
    pages = [np.random.default_rng(3).permutation(32)[: CONTEXT // PAGE]]
    got = [runtime.run(tokens[at : at + chunk], starts=[at], pages=pages) for at in range(0, CONTEXT, chunk)]
    error = np.abs(np.concatenate(got) - case.want(tokens)).max()
    assert error < case.half_precision_bound(tokens)


@pytest.mark.parametrize("isa", ISAS)
def test_many_queries_neither_overflow_nor_vanish_nor_keep_what_a_page_held(isa: str) -> None:
    case, tokens = Case(Shape(heads=2, kv_heads=1, head_dim=16)), np.arange(60)
    case.table[:, : 2 * 16] *= 2e4  # queries: scores near 1e5, whose largest decides
    case.table[0], case.table[1] = np.nan, np.inf
    runtime = case.runtime(isa=isa, exact=False)
    assert np.isnan(runtime.run([0, 1] * 40)).all()
    tokens = tokens[2:]
    q, k, _ = case.prepared(tokens)
    got, want = runtime.run(tokens), case.want(tokens)
    scores = np.sort(np.where(np.tri(len(tokens))[:, None] > 0, np.einsum("thd,sd->ths", q, k[:, 0]), -np.inf), axis=-1)
    sure = (scores[..., -1] - scores[..., -2] > 2e-2 * np.abs(scores[..., -1])).all(axis=-1)  # whatever is rounded
    assert sure.sum() > 20
    np.testing.assert_allclose(got[sure], want[sure], rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_a_page_keeps_nothing_of_its_last_owner(isa: str) -> None:
    case = Case(Shape())
    case.table[0], case.table[1] = np.nan, np.inf
    runtime = case.runtime(isa=isa)
    assert np.isnan(runtime.run([0, 1] * 40)).all()
    tokens = tokens_of(37) % (ROWS - 2) + 2
    np.testing.assert_allclose(runtime.run(tokens), case.want(tokens), atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_neither_overflow_nor_vanish(isa: str) -> None:
    """Scores near 1e9: the softmax is the value of the best key."""
    case, tokens = Case(Shape(heads=2, kv_heads=1, head_dim=16)), np.arange(60)
    case.table[:, : 3 * 16] *= 2e4
    got, want = case.runtime(isa=isa).run(tokens), case.want(tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)
