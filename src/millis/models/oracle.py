"""Runs a plan in NumPy, plainly: the answer that the native runtime is tested against. Slow, and meant to be read.

It knows one sequence from position 0, no cache and no steps; of an encoder-decoder model, its source beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millis.models.plan import (
    Activation,
    Attention,
    Convolve,
    CrossAttention,
    Embed,
    GatedMatMul,
    MatMul,
    Norm,
    Op,
    Plan,
    Pool,
    Remember,
    Select,
    SelfAttention,
)
from millis.models.tensor import Tensor
from millis.types import RequestError

Floats = NDArray[np.float32]


class Oracle:
    """Executes `plan` over `tensors` in float32. Each weight is dequantised at its first use and kept."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        self._plan = plan
        self._tensors = tensors
        self._weights: dict[str, Floats] = {}
        self._remembered: dict[int, Floats] = {}  # layer → keys and values of the source

    def logits(self, tokens: Sequence[int], source: Sequence[int] = ()) -> Floats:
        """[T, vocab] float32: row t scores the token after tokens[t]. source: what an encoder-decoder model has read.

        RequestError: no tokens, more than the plan's context, or an id outside the vocabulary.
        """
        if self._plan.source:
            self._buffers(source, None, self._plan.source)
        return self._buffers(tokens, None)["logits"]

    def encode(self, tokens: Sequence[int], types: Sequence[int] | None = None) -> tuple[Floats, Floats | None]:
        """An encoder's embedding [width], before it is made of unit length, and its head's logits [labels], if any.

        types: the kind of each token, 0 unless given. RequestError as `logits`.
        """
        buffers = self._buffers(tokens, types)
        pooled = next(op.out for op in self._plan.ops if isinstance(op, Pool))
        return buffers[pooled][0], buffers["logits"][0] if "logits" in buffers else None

    def _buffers(
        self, tokens: Sequence[int], types: Sequence[int] | None, ops: Sequence[Op] | None = None
    ) -> dict[str, Floats]:
        plan = self._plan
        if not 0 < len(tokens) <= plan.context:
            raise RequestError(f"the oracle takes 1 to {plan.context} tokens, not {len(tokens)}")
        if not all(0 <= token < plan.vocab for token in tokens):
            raise RequestError(f"token ids must lie in [0, {plan.vocab})")
        kinds = np.zeros(len(tokens), np.int64) if types is None else np.asarray(types)
        buffers: dict[str, Floats] = {}
        for op in plan.ops if ops is None else ops:
            if isinstance(op, Remember):
                self._remembered[op.layer] = buffers[op.kv]
            else:
                buffers[op.out] = self._run(op, buffers, np.asarray(tokens), kinds)
        return buffers

    def _weight(self, name: str) -> Floats:
        if name not in self._weights:
            self._weights[name] = self._tensors[name].numpy()
        return self._weights[name]

    def _run(
        self,
        op: Op,
        buffers: Mapping[str, Floats],
        tokens: NDArray[np.int64],
        kinds: NDArray[np.int64] | None = None,
    ) -> Floats:
        match op:
            case Embed():
                return self._embed(op, tokens, np.zeros_like(tokens) if kinds is None else kinds)
            case Norm():
                return self._norm(op, buffers)
            case MatMul():
                return self._matmul(op, buffers)
            case GatedMatMul():
                x = buffers[op.x]
                return _activate(x @ self._weight(op.gate).T, op.activation) * (x @ self._weight(op.up).T)
            case Attention() | SelfAttention():
                return self._attend(op, buffers[op.qkv])
            case Convolve():
                return self._convolve(op, buffers[op.bcx])
            case CrossAttention():
                return self._attend_source(op, buffers[op.q])
            case Pool():
                x = buffers[op.x]
                return x.mean(axis=0, keepdims=True) if op.kind == "mean" else x[:1]
            case Select():
                return buffers[op.x]  # every row is wanted here
        raise TypeError(f"the oracle runs no {type(op).__name__}")

    def _embed(self, op: Embed, tokens: NDArray[np.int64], kinds: NDArray[np.int64]) -> Floats:
        x = self._weight(op.weight)[tokens] * np.float32(op.scale)
        if op.positions is not None:
            x = x + self._weight(op.positions)[: len(tokens)]
        return x if op.types is None else x + self._weight(op.types)[kinds]

    def _norm(self, op: Norm, buffers: Mapping[str, Floats]) -> Floats:
        x = buffers[op.x]
        if op.columns is not None:
            out, part = x.copy(), slice(*op.columns)
            out[:, part] = self._normed(op, x[:, part])
            return out
        out = self._normed(op, x)
        return out if op.residual is None else out + buffers[op.residual]

    def _normed(self, op: Norm, x: Floats) -> Floats:
        if op.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        out = _rms(x, op.eps) * (self._weight(op.weight) * np.float32(op.scale))
        return out if op.bias is None else out + self._weight(op.bias)

    def _matmul(self, op: MatMul, buffers: Mapping[str, Floats]) -> Floats:
        out = np.concatenate([buffers[op.x] @ self._weight(name).T for name in op.weights], axis=-1)
        if op.biases:
            out = out + np.concatenate([self._weight(name) for name in op.biases])
        if op.activation is not None:
            out = _activate(out, op.activation)
        return out if op.residual is None else out + buffers[op.residual]

    def _attend(self, op: Attention | SelfAttention, qkv: Floats) -> Floats:
        rows, group = len(qkv), op.heads // op.kv_heads
        heads = qkv.reshape(rows, op.heads + 2 * op.kv_heads, op.head_dim)
        q, k, v = np.split(heads, [op.heads, op.heads + op.kv_heads], axis=1)
        q, k = self._placed(op, q, op.q_norm), self._placed(op, k, op.k_norm)
        q = q.reshape(rows, op.kv_heads, group, op.head_dim)  # query head h reads the keys of head h // group
        scores = np.einsum("tkgd,skd->kgts", q, k, optimize=True) * np.float32(op.scale)
        if op.bias is not None:
            scores = scores + self._bias(op.bias, rows).reshape(op.kv_heads, group, rows, rows)
        seen = visible(rows, op.window) if isinstance(op, Attention) else near(rows, op.window)
        weights = softmax(np.where(seen, scores, np.float32(-np.inf)))
        out: Floats = np.einsum("kgts,skd->tkgd", weights, v, optimize=True)
        return out.reshape(rows, op.heads * op.head_dim)

    def _placed(self, op: Attention | SelfAttention, x: Floats, norm: str | None) -> Floats:
        """Queries or keys [T, heads, head_dim], normed and rotated."""
        norm_rotated, style = isinstance(op, Attention) and op.norm_rotated, getattr(op, "rope_style", "half")
        if norm is not None and not norm_rotated:
            x = _rms(x, op.norm_eps) * self._weight(norm)
        if op.rope is not None:
            x = rotate(x, self._plan.ropes[op.rope][:, : len(x), None], style)
        return _rms(x, op.norm_eps) * self._weight(norm) if norm is not None and norm_rotated else x

    def _convolve(self, op: Convolve, bcx: Floats) -> Floats:
        b, c, x = np.split(bcx, 3, axis=1)
        return c * convolved(b * x, self._weight(op.weight))

    def _attend_source(self, op: CrossAttention, q: Floats) -> Floats:
        kv = self._remembered[op.layer]
        k, v = np.moveaxis(kv.reshape(len(kv), 2, op.kv_heads, op.head_dim), 1, 0)
        heads = q.reshape(len(q), op.kv_heads, op.heads // op.kv_heads, op.head_dim)
        weights = softmax(np.einsum("tkgd,skd->kgts", heads, k, optimize=True) * np.float32(op.scale))
        out: Floats = np.einsum("kgts,skd->tkgd", weights, v, optimize=True)
        return out.reshape(len(q), op.heads * op.head_dim)

    def _bias(self, name: str, rows: int) -> Floats:
        """[heads, T, T] what is added to the scores of every query and key."""
        distances = np.arange(rows)[None, :] - np.arange(rows)[:, None]
        return self._plan.biases[name][:, distances + self._plan.context - 1]


def _rms(x: Floats, eps: float) -> Floats:
    out: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return out


def _activate(x: Floats, activation: Activation) -> Floats:
    if activation == "relu":
        return np.maximum(x, np.float32(0))
    if activation == "tanh":
        return np.tanh(x)
    if activation == "gelu":
        return np.asarray(0.5 * x * (1 + _erf(x / np.sqrt(2))), np.float32)
    if activation == "silu":
        inner = np.float32(0.5) * x  # x · sigmoid(x) = x / 2 · (tanh(x / 2) + 1), which cannot overflow
    else:
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)  # Hendrycks and Gimpel, 2016
    out: Floats = np.float32(0.5) * x * (np.tanh(inner) + 1)
    return out


_erf = np.vectorize(math.erf, otypes=[np.float64])


def rotate(x: Floats, table: Floats, style: str) -> Floats:
    """x: [T, heads, head_dim]; table: [2, T, 1, pairs]. Turns each pair of the first coordinates by its angle."""
    half = table.shape[-1]
    x, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (x[..., :half], x[..., half:]) if style == "half" else (x[..., 0::2], x[..., 1::2])
    cosine, sine = table
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    parts = turned if style == "half" else (np.stack(turned, axis=-1).reshape(x.shape),)
    return np.concatenate((*parts, rest), axis=-1)


def convolved(x: Floats, kernel: Floats) -> Floats:
    """x: [T, width]; kernel: [width, taps]. Each row's sum of itself, by the last tap, and the rows before it."""
    taps = kernel.shape[1]
    padded = np.pad(x, ((taps - 1, 0), (0, 0)))
    rows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=0)  # [T, width, taps]
    out: Floats = np.sum(rows * kernel, axis=-1)
    return out


def visible(rows: int, window: int) -> NDArray[np.bool_]:
    """[T, T]: whether the row's token attends to the column's."""
    distance = np.arange(rows)[:, None] - np.arange(rows)[None, :]
    return (distance >= 0) & (distance < (window or rows))


def near(rows: int, window: int) -> NDArray[np.bool_]:
    """[T, T]: whether the row's token sees the column's, where it looks both ways."""
    distance: NDArray[np.int64] = np.abs(np.arange(rows)[:, None] - np.arange(rows)[None, :])
    return distance <= (window or rows)


def softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return out
