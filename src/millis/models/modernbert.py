"""ModernBERT (Warner et al., 2024): pre-norm layers, most of which see a window on either side; gated, without biases.

Windowed layers rotate by `rope_local_theta`, the others by `rope_theta`. The first layer takes the normed embedding as
it is. Buffers: x the residual stream, h what a layer takes of it, qkv, a the attention's output, f the inside of the
feed-forward network, embedding; with a head: pooled, dense, inner, logits.
"""

from __future__ import annotations

from collections.abc import Mapping

from millis.models.config import Head, ModelConfig
from millis.models.plan import Embed, GatedMatMul, MatMul, Norm, Op, Plan, Pool, SelfAttention
from millis.models.rope import rope_table
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for texts of up to `context` tokens."""
    assert config.pooling != "last"
    ops: list[Op] = [
        Embed(out="h", weight="token_embd.weight"),
        _norm(config, "x", "h", "token_embd_norm"),
    ]
    for layer in range(config.layers):
        ops += _layer(config, layer)
    ops += [_norm(config, "h", "x", "output_norm"), Pool(out="embedding", x="h", kind=config.pooling)]
    widths = {
        **dict.fromkeys(("x", "h", "a", "embedding"), config.hidden),
        "qkv": 3 * config.hidden,
        "f": config.ffn,
    }
    if config.head is not None:
        ops += _head(config, config.head)
        widths |= dict.fromkeys(("pooled", "dense", "inner"), config.hidden) | {"logits": len(config.head.labels)}
    return Plan(
        ops=tuple(ops),
        widths=widths,
        ropes={
            "global": rope_table(context, config.head_dim, config.rope_theta),
            "local": rope_table(context, config.head_dim, config.rope_local_theta),
        },
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        context=context,
    )


def _layer(config: ModelConfig, layer: int) -> list[Op]:
    blk, window = f"blk.{layer}", config.windows[layer] // 2 if config.windows else 0
    attend = SelfAttention(
        out="a",
        qkv="qkv",
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        rope="local" if window else "global",
        window=window,
    )
    normed = [] if layer == 0 else [_norm(config, "h", "x", f"{blk}.attn_norm")]
    return [
        *normed,
        MatMul(out="qkv", x="h" if normed else "x", weights=tuple(f"{blk}.attn_{part}.weight" for part in "qkv")),
        attend,
        MatMul(out="x", x="a", weights=(f"{blk}.attn_output.weight",), residual="x"),
        _norm(config, "h", "x", f"{blk}.ffn_norm"),
        GatedMatMul(
            out="f", x="h", gate=f"{blk}.ffn_gate.weight", up=f"{blk}.ffn_up.weight", activation=config.activation
        ),
        MatMul(out="x", x="f", weights=(f"{blk}.ffn_down.weight",), residual="x"),
    ]


def _head(config: ModelConfig, head: Head) -> list[Op]:
    return [
        Pool(out="pooled", x="h", kind=head.pooling),
        MatMul(out="dense", x="pooled", weights=("cls.weight",), activation=head.activation),
        _norm(config, "inner", "dense", "cls.norm"),
        MatMul(out="logits", x="inner", weights=("cls.output.weight",), biases=("cls.output.bias",)),
    ]


def _norm(config: ModelConfig, out: str, x: str, name: str) -> Norm:
    return Norm(out=out, x=x, weight=f"{name}.weight", eps=config.norm_eps, kind="layer")
