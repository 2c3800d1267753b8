"""One pass forward and backward through a plan, in NumPy: what each product is fed, and how the loss depends on it.

The forward half is the oracle's. The backward half is reverse-mode differentiation over the same ops; it knows their
definitions (models/plan.py) and nothing of any architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millis.models.oracle import Oracle, convolved, rotate, softmax, visible
from millis.models.plan import (
    Activation,
    Attention,
    Convolve,
    Embed,
    GatedMatMul,
    MatMul,
    Norm,
    Op,
    Plan,
    Remember,
    Select,
)
from millis.models.tensor import Tensor

Floats = NDArray[np.float32]


class Observer(Protocol):
    """Hears of every product y = x · Wᵀ: x [T, inputs] and the loss's gradient by y [T, outputs]."""

    def product(self, name: str, x: Floats, gradient: Floats) -> None: ...

    def embedding(self, name: str, gradient: Floats) -> None: ...


class Gradients(Oracle):
    """Runs sequences; the loss is the summed negative log-probability, in nats, of tokens that the model itself drew.

    So its gradients are those of the Fisher information (Fisher, 1922): squared and averaged, they say how far the
    model's distribution moves, as a divergence, when a product's output moves.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], observer: Observer) -> None:
        super().__init__(plan, tensors)
        self._observer = observer

    def run(self, tokens: Sequence[int], rng: np.random.Generator) -> None:
        """One sequence from position 0."""
        ids = np.asarray(tokens)
        buffers: dict[str, Floats] = {}
        tape: list[tuple[Op, dict[str, Floats]]] = []
        for op in self._plan.ops:
            assert not isinstance(op, Remember), "a plan that writes reads no source"
            tape.append((op, dict(buffers)))
            buffers[op.out] = self._run(op, buffers, ids)
        gradients = {"logits": _drawn_loss_gradient(buffers["logits"], rng)}
        while tape:
            op, before = tape.pop()
            self._back(op, before, gradients)

    def _back(self, op: Op, before: Mapping[str, Floats], gradients: dict[str, Floats]) -> None:
        """Takes the gradient by the op's output away, and adds those by its inputs."""
        assert not isinstance(op, Remember)
        g = gradients.pop(op.out)

        def add(name: str, value: Floats) -> None:
            gradients[name] = gradients[name] + value if name in gradients else value

        if isinstance(op, MatMul | Norm) and op.residual is not None:
            add(op.residual, g)
        match op:
            case Embed():
                self._observer.embedding(op.weight, g * np.float32(op.scale))
            case Norm():
                add(op.x, self._norm_back(op, before[op.x], g))
            case MatMul():
                add(op.x, self._matmul_back(op, before, g))
            case GatedMatMul():
                add(op.x, self._gated_back(op, before[op.x], g))
            case Attention():
                add(op.qkv, self._attend_back(op, before[op.qkv], g))
            case Convolve():
                add(op.bcx, self._convolve_back(op, before[op.bcx], g))
            case Select():
                add(op.x, g)

    def _norm_back(self, op: Norm, x: Floats, g: Floats) -> Floats:
        if op.columns is not None:
            out, part = g.copy(), slice(*op.columns)
            out[:, part] = self._normed_back(op, x[:, part], g[:, part])
            return out
        return self._normed_back(op, x, g)

    def _normed_back(self, op: Norm, x: Floats, g: Floats) -> Floats:
        if op.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        g = _rms_back(x, g * (self._weight(op.weight) * np.float32(op.scale)), op.eps)
        return g - g.mean(axis=-1, keepdims=True) if op.kind == "layer" else g

    def _matmul_back(self, op: MatMul, before: Mapping[str, Floats], g: Floats) -> Floats:
        x = before[op.x]
        if op.activation is not None:
            plain = MatMul(out=op.out, x=op.x, weights=op.weights, biases=op.biases)
            g = g * _slope(self._matmul(plain, before), op.activation)
        out, at = np.zeros_like(x), 0
        for name in op.weights:
            weight = self._weight(name)
            part = g[:, at : at + len(weight)]
            self._observer.product(name, x, part)
            out += part @ weight
            at += len(weight)
        return out

    def _gated_back(self, op: GatedMatMul, x: Floats, g: Floats) -> Floats:
        gate, up = self._weight(op.gate), self._weight(op.up)
        inner = x @ gate.T
        by_gate: Floats = g * (x @ up.T) * _slope(inner, op.activation)
        by_up: Floats = g * _activated(inner, op.activation)
        self._observer.product(op.gate, x, by_gate)
        self._observer.product(op.up, x, by_up)
        out: Floats = (by_gate @ gate + by_up @ up).astype(np.float32, copy=False)
        return out

    def _attend_back(self, op: Attention, qkv: Floats, g: Floats) -> Floats:
        rows, group = len(qkv), op.heads // op.kv_heads
        heads = qkv.reshape(rows, op.heads + 2 * op.kv_heads, op.head_dim)
        q0, k0, v = np.split(heads, [op.heads, op.heads + op.kv_heads], axis=1)
        q, k = self._placed(op, q0, op.q_norm), self._placed(op, k0, op.k_norm)
        q = q.reshape(rows, op.kv_heads, group, op.head_dim)
        scores = np.einsum("tkgd,skd->kgts", q, k, optimize=True) * np.float32(op.scale)
        weights = softmax(np.where(visible(rows, op.window), scores, np.float32(-np.inf)))
        g = g.reshape(rows, op.kv_heads, group, op.head_dim)
        by_v = np.einsum("kgts,tkgd->skd", weights, g, optimize=True)
        by_weights = np.einsum("tkgd,skd->kgts", g, v, optimize=True)
        by_scores = weights * (by_weights - np.sum(by_weights * weights, axis=-1, keepdims=True)) * np.float32(op.scale)
        by_q = np.einsum("kgts,skd->tkgd", by_scores, k, optimize=True).reshape(rows, op.heads, op.head_dim)
        by_k = np.einsum("kgts,tkgd->skd", by_scores, q, optimize=True)
        parts = [self._placed_back(op, q0, op.q_norm, by_q), self._placed_back(op, k0, op.k_norm, by_k), by_v]
        return np.concatenate(parts, axis=1).reshape(rows, -1)

    def _convolve_back(self, op: Convolve, bcx: Floats, g: Floats) -> Floats:
        b, c, x = np.split(bcx, 3, axis=1)
        kernel = self._weight(op.weight)
        by_product = convolved((g * c)[::-1], kernel)[::-1]  # each row is in its own sum and those behind it
        return np.concatenate([by_product * x, g * convolved(b * x, kernel), by_product * b], axis=1)

    def _placed_back(self, op: Attention, x: Floats, norm: str | None, g: Floats) -> Floats:
        table = None if op.rope is None else self._plan.ropes[op.rope][:, : len(x), None]
        if norm is not None and op.norm_rotated:
            rotated = x if table is None else rotate(x, table, op.rope_style)
            g = _rms_back(rotated, g * self._weight(norm), op.norm_eps)
        if table is not None:
            back = table * np.array([1, -1], np.float32)[:, None, None, None]
            g = rotate(g, back, op.rope_style)  # back by the same angle
        return _rms_back(x, g * self._weight(norm), op.norm_eps) if norm is not None and not op.norm_rotated else g


def _drawn_loss_gradient(logits: Floats, rng: np.random.Generator) -> Floats:
    """[T, vocab]: of −log p(drawn), a token drawn for each row."""
    p = softmax(logits)
    drawn = (np.cumsum(p, axis=-1, dtype=np.float64) < rng.random((len(p), 1))).sum(axis=-1)
    p[np.arange(len(p)), np.minimum(drawn, p.shape[1] - 1)] -= 1
    return p


def _rms_back(x: Floats, g: Floats, eps: float) -> Floats:
    """Of x / sqrt(mean(x²) + eps)."""
    factor = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    out: Floats = factor * (g - x * factor * factor * np.mean(g * x, axis=-1, keepdims=True))
    return out


def _activated(x: Floats, activation: Activation) -> Floats:
    tanh, _ = _tanh(x, activation)
    out: Floats = np.float32(0.5) * x * (tanh + 1)
    return out


def _slope(x: Floats, activation: Activation) -> Floats:
    """The derivative of x / 2 · (1 + tanh(inner(x)))."""
    tanh, inner_slope = _tanh(x, activation)
    out: Floats = np.float32(0.5) * (1 + tanh + x * (1 - tanh * tanh) * inner_slope)
    return out


def _tanh(x: Floats, activation: Activation) -> tuple[Floats, Any]:
    """The hyperbolic tangent inside the activation, and the slope of what is inside that."""
    if activation == "silu":
        return np.tanh(np.float32(0.5) * x), np.float32(0.5)
    root, cubic = np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715)
    return np.tanh(root * (x + cubic * x * x * x)), root * (1 + 3 * cubic * x * x)
