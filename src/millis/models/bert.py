"""BERT (Devlin et al., 2019) and its kin: post-norm layers of attention in both directions, an embedding, a head.

One plan serves bert, roberta (Liu et al., 2019), xlm-roberta and distilbert, which differ in their files only, and
roformer (Su et al., 2021), which rotates q and k and learns no positions.
Buffers: x the residual stream, r what is normed into it, qkv, a the attention's output, f the inside of the
feed-forward network, embedding; with a head: first the first token's state, dense, logits.
"""

from __future__ import annotations

from collections.abc import Mapping

from millis.models.config import Head, ModelConfig
from millis.models.plan import Activation, Embed, MatMul, Norm, Op, Plan, Pool, SelfAttention
from millis.models.rope import rope_table
from millis.models.tensor import Tensor


def build(config: ModelConfig, tensors: Mapping[str, Tensor], context: int) -> Plan:
    """The plan for sequences of up to `context` tokens, each of which needs a learned position unless it is rotated."""
    assert config.pooling != "last"
    rotated = not config.rotated
    types = "token_types.weight" if config.token_types else None
    ops: list[Op] = [
        Embed(out="r", weight="token_embd.weight", positions=None if rotated else "position_embd.weight", types=types),
        _norm(config, "token_embd_norm"),
    ]
    for layer in range(config.layers):
        ops += _layer(config, layer)
    ops.append(Pool(out="embedding", x="x", kind=config.pooling))
    widths = {
        **dict.fromkeys(("x", "r", "a", "embedding"), config.hidden),
        "qkv": 3 * config.hidden,
        "f": config.ffn,
    }
    if config.head is not None:
        ops += _head(config.head)
        widths |= {"first": config.hidden, "dense": config.hidden, "logits": len(config.head.labels)}
    return Plan(
        ops=tuple(ops),
        widths=widths,
        ropes={"rope": rope_table(context, config.head_dim, config.rope_theta)} if rotated else {},
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        context=context,
    )


def _layer(config: ModelConfig, layer: int) -> list[Op]:
    blk = f"blk.{layer}"
    parts = tuple(f"{blk}.attn_{part}" for part in "qkv")
    return [
        MatMul(
            out="qkv",
            x="x",
            weights=tuple(f"{part}.weight" for part in parts),
            biases=tuple(f"{part}.bias" for part in parts),
        ),
        SelfAttention(
            out="a",
            qkv="qkv",
            heads=config.heads,
            kv_heads=config.heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            rope=None if config.rotated else "rope",
        ),
        _linear("r", "a", f"{blk}.attn_output", residual="x"),
        _norm(config, f"{blk}.attn_output_norm"),
        _linear("f", "x", f"{blk}.ffn_up", activation=config.activation),
        _linear("r", "f", f"{blk}.ffn_down", residual="x"),
        _norm(config, f"{blk}.layer_output_norm"),
    ]


def _head(head: Head) -> list[Op]:
    return [
        Pool(out="first", x="x", kind="first"),
        _linear("dense", "first", "cls", activation=head.activation),
        _linear("logits", "dense", "cls.output"),
    ]


def _norm(config: ModelConfig, name: str) -> Norm:
    """r → x."""
    return Norm(out="x", x="r", weight=f"{name}.weight", bias=f"{name}.bias", eps=config.norm_eps, kind="layer")


def _linear(out: str, x: str, name: str, activation: Activation | None = None, residual: str | None = None) -> MatMul:
    weights, biases = (f"{name}.weight",), (f"{name}.bias",)
    return MatMul(out=out, x=x, weights=weights, biases=biases, activation=activation, residual=residual)
