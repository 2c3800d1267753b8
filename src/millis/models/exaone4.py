"""EXAONE 4.0 (LG AI Research, 2025): norms behind attention and feed-forward network, none before them.

Where some layers attend to a window, only those are rotated. Buffers as in llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from millis.models.config import ModelConfig
from millis.models.llama import attention, finish, gated, rotations
from millis.models.plan import Embed, MatMul, Norm, Op, Plan
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens."""
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight")]
    for layer in range(config.layers):
        rope = "rope" if not config.windows or config.windows[layer] else None
        ops += [*attention(config, layer, rope, x="x"), *behind_attention(config, layer)]
    return finish(config, tensors, context, ops, rotations(config, tensors, context))


def behind_attention(config: ModelConfig, layer: int) -> tuple[Op, ...]:
    """a → x: the attention's output, then the feed-forward network's, each normed and added."""
    blk = f"blk.{layer}"
    return (
        MatMul(out="h", x="a", weights=(f"{blk}.attn_output.weight",)),
        Norm(out="x", x="h", weight=f"{blk}.post_attention_norm.weight", eps=config.norm_eps, residual="x"),
        gated(config, layer, x="x"),
        MatMul(out="h", x="f", weights=(f"{blk}.ffn_down.weight",)),
        Norm(out="x", x="h", weight=f"{blk}.post_ffw_norm.weight", eps=config.norm_eps, residual="x"),
    )
