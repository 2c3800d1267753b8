"""LFM2 (Liquid AI, 2025): llama's layers, in most of which a short gated convolution takes the place of attention.

A convolution sees a token and the two before it. What it needs of those is kept where attention keeps keys and
values, token by token, so prefixes are shared and guesses taken back as in any other model. Buffers as in llama.py; bcx
what a convolution reads, y what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from millis.models.config import ModelConfig
from millis.models.llama import attention, finish, gated, rotations
from millis.models.plan import Convolve, Embed, MatMul, Norm, Op, Plan
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens."""
    kept = 2 * config.kv_heads * config.head_dim  # of a token in a layer of the cache
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight")]
    cached = 0
    for layer in range(config.layers):
        blk = f"blk.{layer}"
        ops.append(Norm(out="h", x="x", weight=f"{blk}.attn_norm.weight", eps=config.norm_eps))
        if config.convolves(layer):
            ops += _convolution(config, blk, cached)
            cached += -(-config.hidden // kept)
        else:
            project, attend = attention(config, layer, "rope")
            ops += [project, replace(attend, layer=cached)]
            ops.append(MatMul(out="x", x="a", weights=(f"{blk}.attn_output.weight",), residual="x"))
            cached += 1
        ops += [
            Norm(out="h", x="x", weight=f"{blk}.ffn_norm.weight", eps=config.norm_eps),
            gated(config, layer),
            MatMul(out="x", x="f", weights=(f"{blk}.ffn_down.weight",), residual="x"),
        ]
    plan = finish(config, tensors, context, ops, rotations(config, tensors, context))
    widths = {**plan.widths, "bcx": 3 * config.hidden, "y": config.hidden}
    return replace(plan, widths=widths, layers=cached)


def _convolution(config: ModelConfig, blk: str, cached: int) -> tuple[Op, ...]:
    """h → x, by way of the cache's layer `cached` and those behind it."""
    conv = f"{blk}.shortconv"
    return (
        MatMul(out="bcx", x="h", weights=(f"{conv}.in_proj.weight",)),
        Convolve(out="y", bcx="bcx", weight=f"{conv}.conv.weight", layer=cached, taps=config.taps),
        MatMul(out="x", x="y", weights=(f"{conv}.out_proj.weight",), residual="x"),
    )
