"""Llama and its near relatives: pre-norm layers of rotary attention and a gated feed-forward network.

One plan serves llama (Touvron et al., 2023), mistral and phi3, qwen2 (biases on q, k and v), qwen3 (a norm on every q
and k head), hunyuan-dense (a norm on each, too, but behind its rotation), ernie4_5, smollm3 (layers that are not
rotated), granite and minicpm (which scale what a layer adds, and more) and gemma (which scales its embedding; its norm
weights include the +1 of the formula, as GGUF stores them).
Buffers: x the residual stream, h its norm, qkv, a the attention's output, f the inside of the feed-forward network,
s the selected rows, n their norm, logits.

What a layer adds is multiplied by granite's residual scale r. x holds the stream divided by r instead, so that layers
add to it as they are; a norm of it is the same with eps / r².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millis.models.config import ModelConfig
from millis.models.plan import Attention, Embed, GatedMatMul, MatMul, Norm, Op, Plan, Select
from millis.models.rope import rope_table
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens."""
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight", scale=config.embedding_scale / config.residual_scale)]
    for layer in range(config.layers):
        blk = f"blk.{layer}"
        ops += [
            Norm(out="h", x="x", weight=f"{blk}.attn_norm.weight", eps=_stream_eps(config)),
            *attention(config, layer, rope="rope" if not config.rotated or config.rotated[layer] else None),
            MatMul(out="x", x="a", weights=(f"{blk}.attn_output.weight",), residual="x"),
            Norm(out="h", x="x", weight=f"{blk}.ffn_norm.weight", eps=_stream_eps(config)),
            gated(config, layer),
            MatMul(out="x", x="f", weights=(f"{blk}.ffn_down.weight",), residual="x"),
        ]
    return finish(config, tensors, context, ops, rotations(config, tensors, context))


def rotations(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> dict[str, NDArray[np.float32]]:
    """The table "rope" of all layers that are rotated."""
    factors = tensors.get("rope_freqs.weight")
    listed = None if factors is None else factors.numpy()
    return {"rope": rope_table(context, config.rotated_dim, config.rope_theta, config.rope_scaling, listed)}


def attention(config: ModelConfig, layer: int, rope: str | None, x: str = "h") -> tuple[MatMul, Attention]:
    """x → qkv → a: projections, with biases where the model has them, then attention, with its head norms."""
    names = [f"blk.{layer}.attn_{part}" for part in "qkv"]
    scale = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
    return (
        MatMul(
            out="qkv",
            x=x,
            weights=tuple(f"{name}.weight" for name in names),
            biases=tuple(f"{name}.bias" for name in names) if config.attention_bias else (),
        ),
        Attention(
            out="a",
            qkv="qkv",
            layer=layer,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            scale=scale,
            rope=rope,
            rope_style=config.rope_style,
            window=config.windows[layer] if config.windows else 0,
            q_norm=f"blk.{layer}.attn_q_norm.weight" if config.norms_heads else None,
            k_norm=f"blk.{layer}.attn_k_norm.weight" if config.norms_heads else None,
            norm_eps=config.norm_eps,
            norm_rotated=config.architecture == "hunyuan-dense",
        ),
    )


def _stream_eps(config: ModelConfig) -> float:
    """Of a norm of x."""
    return config.norm_eps / config.residual_scale**2


def gated(config: ModelConfig, layer: int, x: str = "h") -> GatedMatMul:
    """x → f."""
    gate, up = f"blk.{layer}.ffn_gate.weight", f"blk.{layer}.ffn_up.weight"
    return GatedMatMul(out="f", x=x, gate=gate, up=up, activation=config.activation)


def finish(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    context: int,
    ops: Sequence[Op],
    ropes: Mapping[str, NDArray[np.float32]],
) -> Plan:
    """`ops`, then x → logits of the selected rows. The embedding serves as output matrix where no other is held."""
    output = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    heads = config.heads * config.head_dim
    scale = 1.0 if config.reads else 1 / config.logit_scale  # of what reads, no logits are made
    ends = (
        Select(out="s", x="x"),
        Norm(out="n", x="s", weight=config.output_norm, eps=_stream_eps(config), scale=scale),
        MatMul(out="logits", x="n", weights=(output,)),
    )
    return Plan(
        ops=(*ops, *ends),
        widths={
            "x": config.hidden,
            "h": config.hidden,
            "qkv": heads + 2 * config.kv_heads * config.head_dim,
            "a": heads,
            "f": config.ffn,
            "s": config.hidden,
            "n": config.hidden,
            "logits": config.vocab,
        },
        ropes=ropes,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        context=context,
    )
