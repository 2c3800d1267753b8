"""Hugging Face folders of encoder-decoder models, t5, mt5 and marian: their settings and the names of their tensors.

Tensors get the names that GGUF has for T5 (`enc.blk.0.attn_q.weight`, `dec.blk.0.cross_attn_q.weight` …).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from millis.models.checkpoint import Checkpoint
from millis.models.config import ModelConfig, Stack
from millis.models.huggingface_config import Settings, divide, refuse_settings
from millis.models.marian import sinusoids
from millis.models.safetensors import read_folder_tensors
from millis.models.tensor import Tensor
from millis.models.tensors_expected import check_config, check_tensors
from millis.types import FormatError

LONGEST = 1 << 14  # tokens that a t5 may be asked to read: its distances have no end, but what it has learned does
TYPES: Mapping[str, Literal["t5", "marian"]] = {"t5": "t5", "mt5": "t5", "marian": "marian"}
_EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
_FORWARDS: dict[str, tuple[bool, Literal["relu", "gelu_tanh", "silu", "gelu"]]] = {
    "relu": (False, "relu"),
    "gated-gelu": (True, "gelu_tanh"),
    "gated-silu": (True, "silu"),
}
_ACTIVATIONS: dict[str, Literal["relu", "gelu_tanh", "silu", "gelu"]] = {
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
}
_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "t5": {"is_encoder_decoder": (True,), "is_decoder": (False,), "quantization_config": ()},
    "marian": {
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
        "quantization_config": (),
        "share_encoder_decoder_embeddings": (True,),
        "normalize_before": (False,),
        "normalize_embedding": (False,),
        "add_final_layer_norm": (False,),
        "static_position_embeddings": (True,),
    },
}
_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
_T5_SELF = {f"layer.0.SelfAttention.{theirs}": ours for theirs, ours in _ATTENTION.items()}
_T5_SELF |= {"layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.layer_norm": "attn_norm"}
_T5_CROSS = {f"layer.1.EncDecAttention.{theirs}": f"cross_{ours}" for theirs, ours in _ATTENTION.items()}
_MARIAN_SELF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn_layer_norm": "attn_output_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "final_layer_norm": "layer_output_norm",
}
_MARIAN_CROSS = {
    theirs.replace("self_attn", "encoder_attn"): f"cross_{ours}"
    for theirs, ours in _MARIAN_SELF.items()
    if theirs.startswith("self_attn")
}


def _t5_forward(layer: int) -> dict[str, str]:
    inside = {"wi": "ffn_up", "wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down"}
    named = {f"layer.{layer}.DenseReluDense.{theirs}": ours for theirs, ours in inside.items()}
    return named | {f"layer.{layer}.layer_norm": "ffn_norm"}


_INSIDE: dict[str, dict[str, dict[str, str]]] = {  # their name inside a layer → ours
    "t5": {
        "encoder": _T5_SELF | _t5_forward(1),
        "decoder": _T5_SELF | _T5_CROSS | {"layer.1.layer_norm": "cross_attn_norm"} | _t5_forward(2),
    },
    "marian": {"encoder": _MARIAN_SELF, "decoder": _MARIAN_SELF | _MARIAN_CROSS},
}
_LAYER = re.compile(r"(encoder|decoder)\.(?:block|layers)\.(0|[1-9][0-9]{0,3})\.(.+)\.(weight|bias)")
_OUTSIDE = {
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "decoder.final_layer_norm.weight": "dec.output_norm.weight",
    "final_logits_bias": "output.bias",
    "lm_head.weight": "output.weight",
}
# T5's first files carry it; no layer reads it.
_NOT_READ = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def is_kin(values: Mapping[str, Any]) -> bool:
    """Whether a config.json holding `values` is that of a family read here."""
    return isinstance(values.get("model_type"), str) and values["model_type"] in TYPES


def read(path: Path, values: Mapping[str, Any]) -> Checkpoint:
    """The model in a folder whose config.json holds `values`. FormatError names what is malformed or unknown."""
    settings = Settings(values)
    kind = TYPES[values["model_type"]]
    refuse_settings(settings, _NEUTRAL[kind])
    _check_head(settings)
    config = _CONFIGS[kind](settings, path.resolve().name)
    check_config(config)
    found = read_folder_tensors(path)
    tensors = _renamed(found, kind)
    _add_embedding(tensors, found, settings)
    if kind == "t5":
        _scale_output(tensors, config, settings)
    else:
        _add_positions(tensors, found, config)
        _flatten_bias(tensors, config)
    check_tensors(config, tensors)
    return Checkpoint(path=path, config=config, tensors=tensors)


def _check_head(settings: Settings) -> None:
    names = settings.get("architectures") or ["ForConditionalGeneration"]
    ends = ("ForConditionalGeneration", "MTModel", "WithLMHeadModel")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or not names[0].endswith(ends):
        raise FormatError(
            f"config.json: {names!r:.80} is not one model that writes text, which is what Millis runs of it"
        )


def _t5(settings: Settings, name: str) -> ModelConfig:
    heads, layers = settings.whole("num_heads"), settings.whole("num_layers")
    head_dim, ffn = settings.whole("d_kv"), settings.whole("d_ff")
    forward = settings.get("feed_forward_proj") or "relu"
    if not isinstance(forward, str) or forward not in _FORWARDS:
        raise FormatError(f"config.json: feed_forward_proj {forward!r:.40} is not one of {', '.join(_FORWARDS)}")
    gated, activation = _FORWARDS[forward]
    return ModelConfig(
        architecture="t5",
        name=name,
        layers=settings.whole("num_decoder_layers", layers),
        hidden=settings.whole("d_model"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=settings.whole("vocab_size"),
        context=LONGEST,
        text_tokens=settings.whole("n_positions", 512),
        norm_eps=settings.real("layer_norm_epsilon", 1e-6),
        activation=activation,
        encoder=Stack(layers=layers, heads=heads, head_dim=head_dim, ffn=ffn),
        gated=gated,
        buckets=settings.whole("relative_attention_num_buckets", 32),
        farthest=settings.whole("relative_attention_max_distance", 128),
    )


def _marian(settings: Settings, name: str) -> ModelConfig:
    hidden, heads = settings.whole("d_model"), settings.whole("decoder_attention_heads")
    encoder_heads, vocab = settings.whole("encoder_attention_heads"), settings.whole("vocab_size")
    activation = settings.get("activation_function") or "gelu"
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise FormatError(f"config.json: the activation {activation!r:.40} is not one of {', '.join(_ACTIVATIONS)}")
    if settings.whole("decoder_vocab_size", vocab) != vocab:
        raise FormatError("config.json: a decoder with a vocabulary of its own, which Millis does not support")
    return ModelConfig(
        architecture="marian",
        name=name,
        layers=settings.whole("decoder_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(hidden, heads),
        ffn=settings.whole("decoder_ffn_dim"),
        vocab=vocab,
        context=settings.whole("max_position_embeddings", 1024),
        norm_eps=1e-5,  # PyTorch's, which the configuration cannot change
        activation=_ACTIVATIONS[activation],
        attention_bias=True,
        encoder=Stack(
            layers=settings.whole("encoder_layers"),
            heads=encoder_heads,
            head_dim=divide(hidden, encoder_heads),
            ffn=settings.whole("encoder_ffn_dim"),
        ),
        embedding_scale=float(np.sqrt(hidden)) if settings.truth("scale_embedding", False) and hidden > 0 else 1.0,
    )


_CONFIGS: Mapping[str, Callable[[Settings, str], ModelConfig]] = {"t5": _t5, "marian": _marian}


def _renamed(found: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in found.items():
        name = _name(theirs, kind)
        if name is not None:
            tensors[name] = Tensor(name, tensor.type, tensor.shape, tensor.data)
    return tensors


def _name(theirs: str, kind: str) -> str | None:
    """Our name of a tensor; None for embeddings, which are looked at elsewhere. FormatError where it is unknown."""
    bare = theirs.removeprefix("model.")
    part = bare.removesuffix(".weight")
    if bare == _NOT_READ or part in _EMBEDDINGS or (kind == "marian" and part.endswith(".embed_positions")):
        return None
    if match := _LAYER.fullmatch(bare):
        half, layer, inside, ending = match.groups()
        if inside in _INSIDE[kind][half]:
            return f"{half[:3]}.blk.{layer}.{_INSIDE[kind][half][inside]}.{ending}"
    if bare in _OUTSIDE:
        return _OUTSIDE[bare]
    raise FormatError(f"the tensor {theirs!r} has no place in a {kind} model as Millis knows it")


def _add_embedding(tensors: dict[str, Tensor], found: Mapping[str, Tensor], settings: Settings) -> None:
    """One table serves encoder and decoder, and the output where that has none of its own; files may repeat it."""
    bare = {theirs.removeprefix("model.").removesuffix(".weight"): tensor for theirs, tensor in found.items()}
    tables = [bare[name] for name in _EMBEDDINGS if name in bare]
    output = tensors.get("output.weight")
    if not tables and output is not None and settings.truth("tie_word_embeddings", True):
        tables = [output]
    if not tables:
        raise FormatError("the tensor 'shared.weight' is missing: not a whole model")
    if not all(_same(tables[0], table) for table in tables):
        raise FormatError("encoder and decoder have embeddings of their own, which Millis does not support")
    if output is None and settings.get("tie_word_embeddings") is False and settings.get("model_type") != "mt5":
        raise FormatError("the tensor 'lm_head.weight' is missing, though config.json does not tie it")
    if output is not None and _same(tables[0], output):
        del tensors["output.weight"]
    table, name = tables[0], "token_embd.weight"
    tensors[name] = Tensor(name, table.type, table.shape, table.data)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        (one.type, one.shape) == (other.type, other.shape) and bool(np.array_equal(one.data, other.data))
    )


def _scale_output(tensors: dict[str, Tensor], config: ModelConfig, settings: Settings) -> None:
    """What t5 scales its last hidden states by, where embedding and output were trained as one: into their norm."""
    name = "dec.output_norm.weight"
    tied = settings.get("model_type") == "t5" and settings.get("tie_word_embeddings") is not False
    if settings.truth("scale_decoder_outputs", tied) and name in tensors:
        tensors[name] = Tensor.from_numpy(name, tensors[name].numpy() * np.float32(config.hidden**-0.5))


def _add_positions(tensors: dict[str, Tensor], found: Mapping[str, Tensor], config: ModelConfig) -> None:
    """The table of positions: the files' where they hold it, otherwise reckoned."""
    name = "position_embd.weight"
    stored = [tensor for theirs, tensor in found.items() if theirs.endswith(".embed_positions.weight")]
    if not all(_same(stored[0], table) for table in stored):
        raise FormatError("encoder and decoder have positions of their own, which Millis does not support")
    if stored:
        tensors[name] = Tensor(name, stored[0].type, stored[0].shape, stored[0].data)
    else:
        tensors[name] = Tensor.from_numpy(name, sinusoids(config.context, config.hidden))


def _flatten_bias(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """The bias of the logits, [1, vocab] in files; zeros where they leave it out."""
    name = "output.bias"
    found = tensors.get(name)
    if found is None:
        tensors[name] = Tensor.from_numpy(name, np.zeros(config.vocab, np.float32))
    elif len(found.shape) == 2 and found.shape[0] == 1:
        tensors[name] = Tensor(name, found.type, found.shape[1:], found.data)
