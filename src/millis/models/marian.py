"""Marian (Junczys-Dowmunt et al., 2018) as OPUS-MT trained it: encoder and decoder, post-norm, sinusoidal positions.

Buffers: x the residual stream, r what is normed into it; of the source: source_qkv, source_a, source_f, kv what the
decoder will look at; of the target: qkv, q, a, f, s the selected rows, logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from millis.models.config import ModelConfig
from millis.models.plan import Activation, Attention, Embed, MatMul, Norm, Op, Plan, Remember, Select, SelfAttention
from millis.models.t5 import cross
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sources and targets of up to `context` tokens each, each of which needs a position."""
    assert config.encoder is not None
    encoder = config.encoder
    embed = Embed(out="x", weight="token_embd.weight", scale=config.embedding_scale, positions="position_embd.weight")
    source: list[Op] = [embed]
    for layer in range(encoder.layers):
        source += _source_layer(config, f"enc.blk.{layer}")
    ops: list[Op] = [embed]
    for layer in range(config.layers):
        source += [
            _linear("kv", "x", f"dec.blk.{layer}", "cross_attn_k", "cross_attn_v"),
            Remember(kv="kv", layer=layer),
        ]
        ops += _target_layer(config, layer)
    output = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    ops += [Select(out="s", x="x"), MatMul(out="logits", x="s", weights=(output,), biases=("output.bias",))]
    hidden = config.hidden
    return Plan(
        source=tuple(source),
        ops=tuple(ops),
        widths={
            **dict.fromkeys(("x", "r", "s", "source_a", "a", "q"), hidden),
            **dict.fromkeys(("source_qkv", "qkv"), 3 * hidden),
            "kv": 2 * hidden,
            "source_f": encoder.ffn,
            "f": config.ffn,
            "logits": config.vocab,
        },
        ropes={},
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        context=context,
    )


def _source_layer(config: ModelConfig, blk: str) -> list[Op]:
    assert config.encoder is not None
    heads, head_dim = config.encoder.heads, config.encoder.head_dim
    return [
        _linear("source_qkv", "x", blk, "attn_q", "attn_k", "attn_v"),
        SelfAttention(
            out="source_a", qkv="source_qkv", heads=heads, kv_heads=heads, head_dim=head_dim, scale=head_dim**-0.5
        ),
        *_added(config, "source_a", blk, "attn_output", "attn_output_norm"),
        _linear("source_f", "x", blk, "ffn_up", activation=config.activation),
        *_added(config, "source_f", blk, "ffn_down", "layer_output_norm"),
    ]


def _target_layer(config: ModelConfig, layer: int) -> list[Op]:
    blk, scale = f"dec.blk.{layer}", config.head_dim**-0.5
    attend = Attention(
        out="a",
        qkv="qkv",
        layer=layer,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=scale,
    )
    return [
        _linear("qkv", "x", blk, "attn_q", "attn_k", "attn_v"),
        attend,
        *_added(config, "a", blk, "attn_output", "attn_output_norm"),
        _linear("q", "x", blk, "cross_attn_q"),
        cross(config, layer, scale),
        *_added(config, "a", blk, "cross_attn_output", "cross_attn_output_norm"),
        _linear("f", "x", blk, "ffn_up", activation=config.activation),
        *_added(config, "f", blk, "ffn_down", "layer_output_norm"),
    ]


def _added(config: ModelConfig, x: str, blk: str, product: str, norm: str) -> list[Op]:
    """The residual stream with a product added, then normed."""
    name, weight = f"{blk}.{norm}", (f"{blk}.{product}.weight",)
    return [
        MatMul(out="r", x=x, weights=weight, biases=(f"{blk}.{product}.bias",), residual="x"),
        Norm(out="x", x="r", weight=f"{name}.weight", bias=f"{name}.bias", eps=config.norm_eps, kind="layer"),
    ]


def _linear(out: str, x: str, blk: str, *parts: str, activation: Activation | None = None) -> MatMul:
    names = [f"{blk}.{part}" for part in parts]
    weights, biases = tuple(f"{name}.weight" for name in names), tuple(f"{name}.bias" for name in names)
    return MatMul(out=out, x=x, weights=weights, biases=biases, activation=activation)


def sinusoids(positions: int, width: int) -> NDArray[np.float32]:
    """[positions, width] sines, then cosines, of a position over 10000^(2i / width) (Vaswani et al., 2017)."""
    rates = np.power(10000.0, -2.0 * np.arange((width + 1) // 2) / width)
    angles = np.arange(positions)[:, None] * rates[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(np.float32)
