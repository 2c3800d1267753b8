"""GPT-2 (Radford et al., 2019): learned positions, layer norms with biases, one matrix for q, k and v, a plain MLP."""

from __future__ import annotations

from collections.abc import Mapping

from millis.models.config import ModelConfig
from millis.models.plan import Activation, Attention, Embed, MatMul, Norm, Op, Plan, Select
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens, each of which needs a learned position."""
    ops: list[Op] = [Embed(out="x", weight="token_embd.weight", positions="position_embd.weight")]
    for layer in range(config.layers):
        ops += _layer(config, layer)
    output = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    ops += [
        Select(out="s", x="x"),
        _norm(config, "n", "s", "output_norm"),
        MatMul(out="logits", x="n", weights=(output,)),
    ]
    return Plan(
        ops=tuple(ops),
        widths={
            **dict.fromkeys(("x", "h", "s", "n"), config.hidden),
            "qkv": (config.heads + 2 * config.kv_heads) * config.head_dim,
            "a": config.heads * config.head_dim,
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


def _layer(config: ModelConfig, layer: int) -> list[Op]:
    blk = f"blk.{layer}"
    attend = Attention(
        out="a",
        qkv="qkv",
        layer=layer,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5,
    )
    return [
        _norm(config, "h", "x", f"{blk}.attn_norm"),
        _linear("qkv", "h", f"{blk}.attn_qkv"),
        attend,
        _linear("x", "a", f"{blk}.attn_output", residual="x"),
        _norm(config, "h", "x", f"{blk}.ffn_norm"),
        _linear("f", "h", f"{blk}.ffn_up", activation=config.activation),
        _linear("x", "f", f"{blk}.ffn_down", residual="x"),
    ]


def _norm(config: ModelConfig, out: str, x: str, name: str) -> Norm:
    return Norm(out=out, x=x, weight=f"{name}.weight", bias=f"{name}.bias", eps=config.norm_eps, kind="layer")


def _linear(out: str, x: str, name: str, activation: Activation | None = None, residual: str | None = None) -> MatMul:
    weights, biases = (f"{name}.weight",), (f"{name}.bias",)
    return MatMul(out=out, x=x, weights=weights, biases=biases, activation=activation, residual=residual)
