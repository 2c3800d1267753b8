"""Which tensors a configuration calls for, under GGUF's names, and whether a checkpoint holds exactly those."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from millis.models.config import ModelConfig, RopeScaling, Stack
from millis.models.seq2seq_shapes import Shapes, affine, expected, optional
from millis.models.tensor import Tensor
from millis.types import FormatError

MOST_LAYERS, MOST_FFN = 1 << 10, 1 << 20
# Far above any model that this engine could run; they keep a hostile file from asking for endless work.
_LIMITS = {
    "layers": MOST_LAYERS,
    "hidden": 1 << 17,
    "heads": 1 << 10,
    "kv_heads": 1 << 10,
    "head_dim": 1 << 10,
    "ffn": MOST_FFN,
    "vocab": 1 << 22,
    "context": 1 << 24,
}
MOST_LABELS = 1 << 16
MOST_TAPS = 8
_MOST_BUCKETS = 1 << 12
_MOST_SCALE = 1e6


def check_config(config: ModelConfig) -> None:
    """Raises FormatError where a size is absurd or two do not agree."""
    for name, limit in _LIMITS.items():
        if not 1 <= getattr(config, name) <= limit:
            raise FormatError(f"{name} must lie in [1, {limit}], not {getattr(config, name)}")
    if config.heads % config.kv_heads:
        raise FormatError(f"{config.heads} heads cannot share {config.kv_heads} key-value heads evenly")
    whole = config.hidden == config.heads * config.head_dim == _kv_width(config)
    if config.architecture in ("gpt2", "bert", "modernbert") and not whole:
        raise FormatError(
            f"{config.architecture}'s {config.heads} heads of {config.head_dim} must make up its {config.hidden} values"
        )
    if config.head is not None and not 1 <= len(config.head.labels) <= MOST_LABELS:
        raise FormatError(f"a head must tell 1 to {MOST_LABELS} labels apart, not {len(config.head.labels)}")
    if config.encoder is not None:
        _check_encoder(config, config.encoder)
    if config.head_dim % 2:
        raise FormatError(f"head_dim must be even to be rotated, not {config.head_dim}")
    if not 2 <= config.rotated_dim <= config.head_dim or config.rotated_dim % 2:
        raise FormatError(f"of heads of {config.head_dim} an even part is rotated, not {config.rotated_dim}")
    if config.windows and len(config.windows) != config.layers:
        raise FormatError(f"{len(config.windows)} attention windows for {config.layers} layers")
    if not all(0 <= window <= _LIMITS["context"] for window in config.windows):
        raise FormatError(f"an attention window is out of range: {min(config.windows)} to {max(config.windows)}")
    if config.convolved and (len(config.convolved) != config.layers or all(config.convolved)):
        raise FormatError(
            f"of {config.layers} layers {len(config.convolved)} are said to be convolutions or not; one must attend"
        )
    if any(config.convolved) and not 1 <= config.taps <= MOST_TAPS:
        raise FormatError(f"a convolution must have 1 to {MOST_TAPS} taps, not {config.taps}")
    if any(config.convolved) and config.hidden % 16:
        raise FormatError(f"a convolution's width must be a multiple of 16, not {config.hidden}")
    if config.rotated and len(config.rotated) != config.layers:
        raise FormatError(f"{len(config.rotated)} layers are said to be rotated or not, of {config.layers}")
    for name in ("norm_eps", "rope_theta", "rope_local_theta", "attention_scale"):
        _check_positive(name, getattr(config, name))
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        if not 1 / _MOST_SCALE <= getattr(config, name) <= _MOST_SCALE:
            raise FormatError(f"{name} must lie in [1e-6, 1e6], not {getattr(config, name)}")
    if config.rope_scaling:
        _check_scaling(config.rope_scaling, config.rope_theta)
        _check_factors(config.rope_scaling, config.rotated_dim // 2)


def _check_factors(scaling: RopeScaling, count: int) -> None:
    for name, factors in (("short", scaling.short_factors), ("long", scaling.long_factors)):
        if scaling.kind == "longrope" and len(factors) != count:
            raise FormatError(f"longrope needs {count} {name} factors for its frequencies, not {len(factors)}")
        for factor in factors:
            _check_positive(f"longrope's {name} factor", factor)


def _check_encoder(config: ModelConfig, encoder: Stack) -> None:
    for name in ("layers", "heads", "head_dim", "ffn"):
        if not 1 <= getattr(encoder, name) <= _LIMITS[name]:
            raise FormatError(f"the encoder's {name} must lie in [1, {_LIMITS[name]}], not {getattr(encoder, name)}")
    if not 4 <= config.buckets <= _MOST_BUCKETS or config.buckets % 4:
        raise FormatError(f"distances need 4 to {_MOST_BUCKETS} buckets, a multiple of 4, not {config.buckets}")
    if not config.buckets // 2 < config.farthest <= _LIMITS["context"]:
        raise FormatError(f"the farthest distance of {config.buckets} buckets cannot be {config.farthest}")


def _check_scaling(scaling: RopeScaling, theta: float) -> None:
    for name in (
        "factor", "low_freq_factor", "high_freq_factor", "original_context", "beta_fast", "beta_slow",
        "attention_factor",
    ):  # fmt: skip
        _check_positive(f"rope scaling's {name}", getattr(scaling, name))
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise FormatError(f"rope scaling's band is empty: {scaling.low_freq_factor} to {scaling.high_freq_factor}")
    if scaling.beta_slow >= scaling.beta_fast:
        raise FormatError(f"rope scaling's band is empty: {scaling.beta_slow} to {scaling.beta_fast} turns")
    if scaling.kind == "yarn" and theta <= 1:
        raise FormatError(f"yarn needs a rope_theta above 1, not {theta}")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise FormatError(f"{name} must be a positive number, not {value}")


def check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises FormatError naming the first tensor that is missing, misshapen or unknown to the architecture."""
    needed, allowed = expected_shapes(config), optional_shapes(config)
    for name in needed:
        if name not in tensors:
            raise FormatError(f"the tensor {name!r} is missing: not a whole {config.architecture} model")
    for name, tensor in tensors.items():
        expected = needed.get(name) or allowed.get(name)
        if expected is None:
            raise FormatError(f"the tensor {name!r} has no place in a {config.architecture} model as Millis knows it")
        if tensor.shape != expected:
            raise FormatError(f"the tensor {name!r} is {_text(tensor.shape)}; its configuration asks {_text(expected)}")


def _text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"


def expected_shapes(config: ModelConfig) -> Shapes:
    """Name → shape of every tensor that must be there."""
    if config.architecture == "bert":
        return _bert(config)
    if config.architecture == "modernbert":
        return _modernbert(config)
    if config.encoder is not None:
        return expected(config)
    shapes: Shapes = {"token_embd.weight": (config.vocab, config.hidden), config.output_norm: (config.hidden,)}
    if config.architecture == "gpt2":
        shapes["position_embd.weight"] = (config.context, config.hidden)
        shapes["output_norm.bias"] = (config.hidden,)
    if config.head is not None:
        shapes["cls.output.weight"] = (len(config.head.labels), config.hidden)
    if config.dense:
        shapes["dense.weight"] = (config.dense, config.hidden)
    layer = _gpt2_layer(config) if config.architecture == "gpt2" else _llama_layer(config)
    for index in range(config.layers):
        own = _convolved_layer(config) if config.convolves(index) else layer
        shapes.update({f"blk.{index}.{name}": shape for name, shape in own.items()})
    return shapes


def optional_shapes(config: ModelConfig) -> Shapes:
    """Name → shape of tensors that may be there: an output matrix of its own, rotary factors, a pooler."""
    if config.architecture == "bert":
        return {"cls.weight": (config.hidden, config.hidden), "cls.bias": (config.hidden,)}
    if config.architecture == "modernbert":
        return {}
    if config.encoder is not None:
        return optional(config)
    # GGUF files of gemma have the embedding as output matrix always.
    shapes: Shapes = {} if config.architecture == "gemma" else {"output.weight": (config.vocab, config.hidden)}
    if config.architecture in ("llama", "exaone4"):
        shapes["rope_freqs.weight"] = (config.rotated_dim // 2,)
    if config.architecture == "granite" and config.rope_scaling and config.rope_scaling.kind == "longrope":
        shapes |= {f"rope_factors_{size}.weight": (config.head_dim // 2,) for size in ("short", "long")}
    return shapes


def _kv_width(config: ModelConfig) -> int:
    return config.kv_heads * config.head_dim


def _llama_layer(config: ModelConfig) -> Shapes:
    """The layer of llama and its kin, and of others, which add to it; the norms of exaone4 and olmo2 differ."""
    hidden, ffn = config.hidden, config.ffn
    q_width, kv_width = config.heads * config.head_dim, _kv_width(config)
    shapes: Shapes = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_width, hidden),
        "attn_k.weight": (kv_width, hidden),
        "attn_v.weight": (kv_width, hidden),
        "attn_output.weight": (hidden, q_width),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (ffn, hidden),
        "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn),
    }
    if config.attention_bias:
        shapes |= {"attn_q.bias": (q_width,), "attn_k.bias": (kv_width,), "attn_v.bias": (kv_width,)}
    if config.norms_heads:
        shapes |= {"attn_q_norm.weight": (config.head_dim,), "attn_k_norm.weight": (config.head_dim,)}
    if config.architecture == "olmo2":
        shapes |= {"attn_q_norm.weight": (q_width,), "attn_k_norm.weight": (kv_width,)}
    if config.architecture in ("gemma3", "exaone4", "olmo2"):
        shapes |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    if config.architecture in ("exaone4", "olmo2"):
        del shapes["attn_norm.weight"], shapes["ffn_norm.weight"]
    return shapes


def _convolved_layer(config: ModelConfig) -> Shapes:
    """The same without attention."""
    shapes = {name: shape for name, shape in _llama_layer(config).items() if not re.match("attn_(q|k|v|output)", name)}
    return shapes | {
        "shortconv.in_proj.weight": (3 * config.hidden, config.hidden),
        "shortconv.conv.weight": (config.hidden, config.taps),
        "shortconv.out_proj.weight": (config.hidden, config.hidden),
    }


def _bert(config: ModelConfig) -> Shapes:
    hidden = config.hidden
    shapes: Shapes = {
        "token_embd.weight": (config.vocab, hidden),
        **affine("token_embd_norm", (hidden,)),
    }
    if config.rotated:  # said of each layer: none is
        shapes["position_embd.weight"] = (config.context, hidden)
    if config.token_types:
        shapes["token_types.weight"] = (config.token_types, hidden)
    for index in range(config.layers):
        blk = f"blk.{index}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes |= affine(f"{blk}.{part}", (hidden, hidden))
        shapes |= affine(f"{blk}.ffn_up", (config.ffn, hidden)) | affine(f"{blk}.ffn_down", (hidden, config.ffn))
        shapes |= affine(f"{blk}.attn_output_norm", (hidden,)) | affine(f"{blk}.layer_output_norm", (hidden,))
    if config.head is not None:
        shapes |= affine("cls", (hidden, hidden)) | affine("cls.output", (len(config.head.labels), hidden))
    return shapes


def _modernbert(config: ModelConfig) -> Shapes:
    hidden, ffn = config.hidden, config.ffn
    shapes: Shapes = {"token_embd.weight": (config.vocab, hidden)}
    shapes |= {f"{name}.weight": (hidden,) for name in ("token_embd_norm", "output_norm")}
    for index in range(config.layers):
        blk = f"blk.{index}"
        shapes |= {f"{blk}.attn_{part}.weight": (hidden, hidden) for part in ("q", "k", "v", "output")}
        shapes |= {f"{blk}.ffn_{part}.weight": (ffn, hidden) for part in ("gate", "up")}
        shapes |= {f"{blk}.ffn_down.weight": (hidden, ffn), f"{blk}.ffn_norm.weight": (hidden,)}
        if index > 0:
            shapes[f"{blk}.attn_norm.weight"] = (hidden,)
    if config.head is not None:
        shapes |= {"cls.weight": (hidden, hidden), "cls.norm.weight": (hidden,)}
        shapes |= affine("cls.output", (len(config.head.labels), hidden))
    return shapes


def _gpt2_layer(config: ModelConfig) -> Shapes:
    hidden, ffn = config.hidden, config.ffn
    return {
        "attn_norm.weight": (hidden,),
        "attn_norm.bias": (hidden,),
        "attn_qkv.weight": (3 * hidden, hidden),
        "attn_qkv.bias": (3 * hidden,),
        "attn_output.weight": (hidden, hidden),
        "attn_output.bias": (hidden,),
        "ffn_norm.weight": (hidden,),
        "ffn_norm.bias": (hidden,),
        "ffn_up.weight": (ffn, hidden),
        "ffn_up.bias": (ffn,),
        "ffn_down.weight": (hidden, ffn),
        "ffn_down.bias": (hidden,),
    }
