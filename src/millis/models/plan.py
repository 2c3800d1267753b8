"""The op vocabulary: a model is a list of these over named buffers and named weights.

A buffer is [tokens, width] float32, one row for every token of a ragged step. A matrix weight is
(outputs, inputs): `MatMul` computes x · Wᵀ. Two executors run a plan: `models/oracle.py` in NumPy, plainly,
and the native runtime, fast. An op may read and write the same buffer only where its docstring says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from millis.models.tensor import Tensor

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "tanh"]  # gelu: the exact one, of erf


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """out = weight[token] · scale (+ positions[position], learned absolute positions) (+ types[type of the token])."""

    out: str
    weight: str  # [vocab, width]
    scale: float = 1.0
    positions: str | None = None  # [context, width]
    types: str | None = None  # [kinds, width]; a token is of kind 0 unless the step says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """out = norm(x) · weight · scale (+ bias) (+ residual); `out` may be `residual`, not `x`.

    Where columns are named, `out` is `x`, of which those alone are normed, and nothing is added.
    rms: x / sqrt(mean(x²) + eps) (Zhang and Sennrich, 2019). layer: (x − mean) / sqrt(var + eps) (Ba et al., 2016).
    """

    out: str
    x: str
    weight: str  # [width, or columns], of this norm alone where there is a scale
    eps: float
    scale: float = 1.0
    kind: Literal["rms", "layer"] = "rms"
    bias: str | None = None
    residual: str | None = None
    columns: tuple[int, int] | None = None  # from the first up to the second


@dataclass(frozen=True, slots=True, kw_only=True)
class MatMul:
    """out = activation(x · concat(weights)ᵀ + concat(biases)) (+ residual); `out` may be `residual`, not `x`."""

    out: str
    x: str
    weights: tuple[str, ...]  # each [outputs_i, inputs]; out's width is the sum of outputs
    biases: tuple[str, ...] = ()  # none, or one per weight
    activation: Activation | None = None
    residual: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMatMul:
    """out = activation(x · gateᵀ) ⊙ (x · upᵀ) (Shazeer, 2020)."""

    out: str
    x: str
    gate: str
    up: str
    activation: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal attention over the KV cache of `layer`, whose entries for this step's tokens it writes first.

    qkv: [tokens, (heads + 2 · kv_heads) · head_dim], q then k then v. Order: norm of each q and k head (rms over
    head_dim, where weights are named), rotation, or `norm_rotated` the other way round, write,
    softmax(q · kᵀ · scale + bias) · v. Token at position p attends to positions (p − window, p], or [0, p] when window
    is 0. out: [tokens, heads · head_dim].
    """

    out: str
    qkv: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: str | None = None  # name of a table of the plan
    rope_style: Literal["half", "interleaved"] = "half"
    window: int = 0
    q_norm: str | None = None  # [head_dim]
    k_norm: str | None = None
    norm_eps: float = 1e-6
    norm_rotated: bool = False
    bias: str | None = None  # name of a table of the plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolve:
    """out = c ⊙ conv(b ⊙ x): a causal convolution over a sequence, each column alone, gated on either side.

    bcx: [tokens, 3 · width], b then c then x; weight: [width, taps], the last tap for the token itself. b ⊙ x of this
    step's tokens is kept in the cache, in place of the keys and values of `layer` and, where a row takes more than
    those of one, of the layers behind it. out: [tokens, width].
    """

    out: str
    bcx: str
    weight: str
    layer: int
    taps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Remember:
    """Keeps keys and values of the source for the cross-attention of `layer`. In a plan's source only.

    kv: [tokens, 2 · kv_heads · head_dim], k then v.
    """

    kv: str
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAttention:
    """Attention of every token to all tokens of its source, over what `Remember` kept for `layer`.

    q: [tokens, heads · head_dim]. softmax(q · kᵀ · scale) · v. out: like q.
    """

    out: str
    q: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """out = the rows of x whose logits are wanted; every op after it runs on those rows only."""

    out: str
    x: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAttention:
    """Attention of every token to all tokens of its sequence, before it and behind it; nothing is kept for later steps.

    qkv: [tokens, (heads + 2 · kv_heads) · head_dim], q then k then v. Order: norm of each q and k head as in
    `Attention`, rotation in halves, softmax(q · kᵀ · scale + bias) · v. out: [tokens, heads · head_dim].
    """

    out: str
    qkv: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    bias: str | None = None  # name of a table of the plan
    rope: str | None = None  # name of a table of the plan
    window: int = 0  # tokens that are seen on either side; 0: all
    q_norm: str | None = None  # [head_dim]
    k_norm: str | None = None
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """out = one row for each sequence: the mean of its rows of x, or the first; every op after it runs on those."""

    out: str
    x: str
    kind: Literal["mean", "first"]


Mixing = Attention | Convolve | SelfAttention | CrossAttention
Op = Embed | Norm | MatMul | GatedMatMul | Mixing | Remember | Select | Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole model.

    One that writes text ends in the buffer "logits" [selected rows, vocab]. An encoder has a Pool and no Select:
    the first Pool gives the embedding [sequences, width]; what follows, if anything, is a classifier's head.
    An encoder-decoder model has a `source`: ops that run once over what is read; `ops` run over what is written.
    """

    ops: tuple[Op, ...]
    widths: Mapping[str, int]  # buffer → floats a row
    # table → [2, context, pairs]: cosines, sines; the first 2 · pairs coordinates of a head are rotated, others are not
    ropes: Mapping[str, NDArray[np.float32]]
    layers: int  # of the cache, each with keys and values of every token
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # longest sequence, in tokens
    source: tuple[Op, ...] = ()
    # table → [heads, 2 · context − 1]: what a head adds to the score of query i and key j, at j − i + context − 1
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def weights(self) -> list[str]:
        """Names of every weight the plan reads, in the order of first use, without repeats."""
        names: dict[str, None] = {}
        for op in (*self.source, *self.ops):
            for name in _weights_of(op):
                names.setdefault(name)
        return list(names)

    def matrices(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Of the same, in the same order, those with rows that are multiplied by or looked up."""
        kernels = {op.weight for op in self.ops if isinstance(op, Convolve)}
        return [name for name in self.weights() if len(tensors[name].shape) == 2 and name not in kernels]


def _weights_of(op: Op) -> list[str]:
    match op:
        case Embed():
            found = [op.weight, op.positions, op.types]
        case Norm():
            found = [op.weight, op.bias]
        case MatMul():
            found = [*op.weights, *op.biases]
        case GatedMatMul():
            found = [op.gate, op.up]
        case Attention() | SelfAttention():
            found = [op.q_norm, op.k_norm]
        case Convolve():
            found = [op.weight]
        case Remember() | CrossAttention() | Select() | Pool():
            found = []
    return [name for name in found if name is not None]
