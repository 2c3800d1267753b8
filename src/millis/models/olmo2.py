"""OLMo 2 (Team OLMo, 2024) and OLMo 3 (2025): exaone4's layers, but with a norm of q and one of k, over all heads.

Layers that attend to a window are rotated by a base of their own, unscaled. Buffers as in llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from millis.models.config import ModelConfig
from millis.models.exaone4 import behind_attention
from millis.models.llama import attention, finish, rotations
from millis.models.plan import Embed, Norm, Op, Plan
from millis.models.rope import rope_table
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens."""
    ropes = rotations(config, tensors, context)
    if any(config.windows):
        ropes["local"] = rope_table(context, config.head_dim, config.rope_local_theta)
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight")]
    for layer in range(config.layers):
        windowed = bool(config.windows) and config.windows[layer] > 0
        project, attend = attention(config, layer, rope="local" if windowed else "rope", x="x")
        ops += [project, *_head_norms(config, layer), attend, *behind_attention(config, layer)]
    return finish(config, tensors, context, ops, ropes)


def _head_norms(config: ModelConfig, layer: int) -> tuple[Norm, Norm]:
    q = config.heads * config.head_dim
    k = q + config.kv_heads * config.head_dim

    def norm(part: str, begin: int, end: int) -> Norm:
        weight = f"blk.{layer}.attn_{part}_norm.weight"
        return Norm(out="qkv", x="qkv", weight=weight, eps=config.norm_eps, columns=(begin, end))

    return norm("q", 0, q), norm("k", q, k)
