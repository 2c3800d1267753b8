"""Which tensors an encoder-decoder model must have, and which it may, under GGUF's names."""

from __future__ import annotations

from millis.models.config import ModelConfig, Stack

Shapes = dict[str, tuple[int, ...]]


def expected(config: ModelConfig) -> Shapes:
    """Name → shape of every tensor that must be there."""
    assert config.encoder is not None
    decoder = Stack(layers=config.layers, heads=config.heads, head_dim=config.head_dim, ffn=config.ffn)
    layer = _t5_layer if config.architecture == "t5" else _marian_layer
    shapes: Shapes = {"token_embd.weight": (config.vocab, config.hidden)}
    for half, stack in (("enc", config.encoder), ("dec", decoder)):
        for index in range(stack.layers):
            named = layer(config, stack, half == "dec")
            shapes |= {f"{half}.blk.{index}.{name}": shape for name, shape in named.items()}
        if config.architecture == "t5":
            shapes[f"{half}.blk.0.attn_rel_b.weight"] = (config.buckets, stack.heads)
            shapes[f"{half}.output_norm.weight"] = (config.hidden,)
    if config.architecture == "marian":
        shapes |= {"position_embd.weight": (config.context, config.hidden), "output.bias": (config.vocab,)}
    return shapes


def optional(config: ModelConfig) -> Shapes:
    """Name → shape of tensors that may be there."""
    return {"output.weight": (config.vocab, config.hidden)}


def _t5_layer(config: ModelConfig, stack: Stack, crosses: bool) -> Shapes:
    hidden, heads = config.hidden, stack.heads * stack.head_dim
    shapes: Shapes = {
        "ffn_up.weight": (stack.ffn, hidden),
        "ffn_down.weight": (hidden, stack.ffn),
        "ffn_norm.weight": (hidden,),
    }
    if config.gated:
        shapes["ffn_gate.weight"] = (stack.ffn, hidden)
    for kind in ("attn", "cross_attn") if crosses else ("attn",):
        shapes |= {f"{kind}_{part}.weight": (heads, hidden) for part in "qkv"}
        shapes |= {f"{kind}_output.weight": (hidden, heads), f"{kind}_norm.weight": (hidden,)}
    return shapes


def _marian_layer(config: ModelConfig, stack: Stack, crosses: bool) -> Shapes:
    hidden = config.hidden
    shapes = affine("ffn_up", (stack.ffn, hidden)) | affine("ffn_down", (hidden, stack.ffn))
    shapes |= affine("layer_output_norm", (hidden,))
    for kind in ("attn", "cross_attn") if crosses else ("attn",):
        for part in ("q", "k", "v", "output"):
            shapes |= affine(f"{kind}_{part}", (hidden, hidden))
        shapes |= affine(f"{kind}_output_norm", (hidden,))
    return shapes


def affine(name: str, shape: tuple[int, ...]) -> Shapes:
    """A matrix, or a norm's weight, and the bias beside it."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
