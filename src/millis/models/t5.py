"""T5 (Raffel et al., 2020) and mT5: an encoder and a decoder, pre-norm, whose scores know how far apart two tokens are.

Buffers: x the residual stream, h its norm; of the source: source_qkv, kv what the decoder will look at; of the target:
qkv, q; a the attention's output, f the inside of the feed-forward network, s the selected rows, n their norm, logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from millis.models.config import ModelConfig
from millis.models.plan import (
    Attention,
    CrossAttention,
    Embed,
    GatedMatMul,
    MatMul,
    Norm,
    Op,
    Plan,
    Remember,
    Select,
    SelfAttention,
)
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sources and targets of up to `context` tokens each."""
    assert config.encoder is not None
    heads = config.heads * config.head_dim
    source: list[Op] = [Embed(out="x", weight="token_embd.weight")]
    for layer in range(config.encoder.layers):
        source += _source_layer(config, f"enc.blk.{layer}")
    source.append(_norm(config, "h", "x", "enc.output_norm"))
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight")]
    for layer in range(config.layers):
        source += [
            _linear("kv", "h", f"dec.blk.{layer}", "cross_attn_k", "cross_attn_v"),
            Remember(kv="kv", layer=layer),
        ]
        ops += _target_layer(config, layer)
    output = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    ops += [
        Select(out="s", x="x"),
        _norm(config, "n", "s", "dec.output_norm"),
        MatMul(out="logits", x="n", weights=(output,)),
    ]
    return Plan(
        source=tuple(source),
        ops=tuple(ops),
        widths={
            **dict.fromkeys(("x", "h", "s", "n"), config.hidden),
            **dict.fromkeys(("a", "q"), heads),
            **dict.fromkeys(("source_qkv", "qkv"), 3 * heads),
            "kv": 2 * heads,
            "f": config.ffn,
            "logits": config.vocab,
        },
        ropes={},
        biases={
            f"{half}.bias": _distances(
                config, tensors[f"{half}.blk.0.attn_rel_b.weight"].numpy(), context, half == "enc"
            )
            for half in ("enc", "dec")
        },
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        context=context,
    )


def _source_layer(config: ModelConfig, blk: str) -> list[Op]:
    attend = SelfAttention(
        out="a",
        qkv="source_qkv",
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
        scale=1.0,
        bias="enc.bias",
    )
    return [
        _norm(config, "h", "x", f"{blk}.attn_norm"),
        _linear("source_qkv", "h", blk, "attn_q", "attn_k", "attn_v"),
        attend,
        _added("a", f"{blk}.attn_output"),
        *_feed_forward(config, blk),
    ]


def _target_layer(config: ModelConfig, layer: int) -> list[Op]:
    blk = f"dec.blk.{layer}"
    attend = Attention(
        out="a",
        qkv="qkv",
        layer=layer,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=1.0,
        bias="dec.bias",
    )
    return [
        _norm(config, "h", "x", f"{blk}.attn_norm"),
        _linear("qkv", "h", blk, "attn_q", "attn_k", "attn_v"),
        attend,
        _added("a", f"{blk}.attn_output"),
        _norm(config, "h", "x", f"{blk}.cross_attn_norm"),
        _linear("q", "h", blk, "cross_attn_q"),
        cross(config, layer, 1.0),
        _added("a", f"{blk}.cross_attn_output"),
        *_feed_forward(config, blk),
    ]


def cross(config: ModelConfig, layer: int, scale: float) -> CrossAttention:
    """q → a."""
    return CrossAttention(
        out="a",
        q="q",
        layer=layer,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=scale,
    )


def _feed_forward(config: ModelConfig, blk: str) -> list[Op]:
    inside: Op = MatMul(out="f", x="h", weights=(f"{blk}.ffn_up.weight",), activation=config.activation)
    if config.gated:
        gate, up = f"{blk}.ffn_gate.weight", f"{blk}.ffn_up.weight"
        inside = GatedMatMul(out="f", x="h", gate=gate, up=up, activation=config.activation)
    return [_norm(config, "h", "x", f"{blk}.ffn_norm"), inside, _added("f", f"{blk}.ffn_down")]


def _norm(config: ModelConfig, out: str, x: str, name: str) -> Norm:
    return Norm(out=out, x=x, weight=f"{name}.weight", eps=config.norm_eps)


def _linear(out: str, x: str, blk: str, *parts: str) -> MatMul:
    return MatMul(out=out, x=x, weights=tuple(f"{blk}.{part}.weight" for part in parts))


def _added(x: str, name: str) -> MatMul:
    return MatMul(out="x", x=x, weights=(f"{name}.weight",), residual="x")


def _distances(config: ModelConfig, values: NDArray[np.float32], context: int, both: bool) -> NDArray[np.float32]:
    """[heads, 2 · context − 1] the bias of every distance, as a Plan has it. values: [buckets, heads]."""
    keys_ahead = np.arange(1 - context, context)
    return np.ascontiguousarray(values[buckets(keys_ahead, both, config.buckets, config.farthest)].T)


def buckets(keys_ahead: NDArray[np.int64], both: bool, count: int, farthest: int) -> NDArray[np.int64]:
    """Which of `count` buckets a distance belongs to (Raffel et al., 2020, section 2.1).

    keys_ahead: position of the key − that of the query. both: the buckets are shared out among keys before and behind
    the query; otherwise those behind it are as near as can be. Half of a side's buckets are single distances, the other
    half grow with the logarithm, up to `farthest`. Reckoned in float32, as the models were trained.
    """
    side = count // 2 if both else count
    near = side // 2
    found = np.where(keys_ahead > 0, side, 0) if both else np.zeros_like(keys_ahead)
    distance = np.abs(keys_ahead) if both else -np.minimum(keys_ahead, 0)
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(near)) / np.float32(
        math.log(farthest / near)
    )
    far = near + (steps * np.float32(side - near)).astype(np.int64)
    return found + np.where(distance < near, distance, np.minimum(far, side - 1))
