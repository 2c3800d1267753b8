"""Gemma 3 (Gemma Team, 2025), text only: norms around each half of a layer, and two kinds of attention.

EmbeddingGemma (2025) is the same, looking both ways, and ends in a vector of the text.

Windowed layers rotate by `rope_local_theta`, the others by `rope_theta` with its scaling. Norm weights include the
+1 of the original formula, as GGUF stores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from millis.models.config import ModelConfig
from millis.models.llama import attention, finish, gated
from millis.models.plan import Attention, Embed, MatMul, Norm, Op, Plan, Pool, SelfAttention
from millis.models.rope import rope_table
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens."""
    ropes = {
        "global": rope_table(context, config.head_dim, config.rope_theta, config.rope_scaling),
        "local": rope_table(context, config.head_dim, config.rope_local_theta),
    }
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight", scale=math.sqrt(config.hidden))]
    for layer in range(config.layers):
        blk = f"blk.{layer}"
        windowed = bool(config.windows) and config.windows[layer] > 0
        project, attend = attention(config, layer, rope="local" if windowed else "global")
        ops += [
            _norm(config, "h", "x", f"{blk}.attn_norm"),
            project,
            _both_ways(attend) if config.both_ways else attend,
            MatMul(out="h", x="a", weights=(f"{blk}.attn_output.weight",)),
            _norm(config, "x", "h", f"{blk}.post_attention_norm", residual="x"),
            _norm(config, "h", "x", f"{blk}.ffn_norm"),
            gated(config, layer),
            MatMul(out="h", x="f", weights=(f"{blk}.ffn_down.weight",)),
            _norm(config, "x", "h", f"{blk}.post_ffw_norm", residual="x"),
        ]
    plan = finish(config, tensors, context, ops, ropes)
    return _reader(config, plan, ops) if config.both_ways else plan


def _both_ways(op: Attention) -> SelfAttention:
    """Half of the window on either side."""
    return SelfAttention(
        out=op.out,
        qkv=op.qkv,
        heads=op.heads,
        kv_heads=op.kv_heads,
        head_dim=op.head_dim,
        scale=op.scale,
        rope=op.rope,
        window=op.window // 2,
        q_norm=op.q_norm,
        k_norm=op.k_norm,
        norm_eps=op.norm_eps,
    )


def _reader(config: ModelConfig, plan: Plan, ops: list[Op]) -> Plan:
    """`ops`, then x → an embedding, by a last matrix where there is one: for every token, whose mean is the same."""
    assert config.pooling != "last"
    ends: list[Op] = [_norm(config, "h", "x", "output_norm")]
    if config.dense:
        ends.append(MatMul(out="dense", x="h", weights=("dense.weight",)))
    width, x = (config.dense, "dense") if config.dense else (config.hidden, "h")
    ends.append(Pool(out="embedding", x=x, kind=config.pooling))
    widths = {name: size for name, size in plan.widths.items() if name not in ("s", "n", "logits")}
    return replace(plan, ops=(*ops, *ends), widths=widths | {x: width, "embedding": width})


def _norm(config: ModelConfig, out: str, x: str, name: str, residual: str | None = None) -> Norm:
    return Norm(out=out, x=x, weight=f"{name}.weight", eps=config.norm_eps, residual=residual)
