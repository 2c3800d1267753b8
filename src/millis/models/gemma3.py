"""Gemma 3 (Gemma Team, 2025), text only: norms around each half of a layer, and two kinds of attention.

Windowed layers rotate by `rope_local_theta`, the others by `rope_theta` with its scaling. Norm weights include the
+1 of the original formula, as GGUF stores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from millis.models.config import ModelConfig
from millis.models.llama import attention, finish, gated
from millis.models.plan import Embed, MatMul, Norm, Op, Plan
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
        ops += [
            _norm(config, "h", "x", f"{blk}.attn_norm"),
            *attention(config, layer, rope="local" if windowed else "global"),
            MatMul(out="h", x="a", weights=(f"{blk}.attn_output.weight",)),
            _norm(config, "x", "h", f"{blk}.post_attention_norm", residual="x"),
            _norm(config, "h", "x", f"{blk}.ffn_norm"),
            gated(config, layer),
            MatMul(out="h", x="f", weights=(f"{blk}.ffn_down.weight",)),
            _norm(config, "x", "h", f"{blk}.post_ffw_norm", residual="x"),
        ]
    return finish(config, tensors, context, ops, ropes)


def _norm(config: ModelConfig, out: str, x: str, name: str, residual: str | None = None) -> Norm:
    return Norm(out=out, x=x, weight=f"{name}.weight", eps=config.norm_eps, residual=residual)
