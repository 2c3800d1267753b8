"""Hugging Face folders of ModernBERT and models of its form (mmBERT, Ettin): settings, names of tensors, the head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millis.models.bert_folder import HIDDEN_ACTIVATIONS, POOLINGS
from millis.models.checkpoint import Checkpoint
from millis.models.config import Head, ModelConfig
from millis.models.huggingface_config import Settings, check_activation, divide, layer_kinds, refuse_settings
from millis.models.parts import gguf_parts
from millis.models.reader_folder import head_of, longest_text, pooling_of
from millis.models.safetensors import read_folder_tensors, renamed
from millis.models.tensors_expected import MOST_LAYERS, check_config, check_tensors
from millis.types import FormatError

TYPE = "modernbert"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "classifier_bias": (False,),
    "mlp_bias": (False,),
    "norm_bias": (False,),
    "quantization_config": (),
    "rope_scaling": (),
}
_OUTSIDE = {
    "embeddings.tok_embeddings.weight": "token_embd.weight",
    "embeddings.norm.weight": "token_embd_norm.weight",
    "final_norm.weight": "output_norm.weight",
}
_HEAD = {
    "head.dense.weight": "cls.weight",
    "head.norm.weight": "cls.norm.weight",
    "classifier.weight": "cls.output.weight",
    "classifier.bias": "cls.output.bias",
}
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.(.+)\.weight")
_INSIDE = {
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
}
_PRETRAINING = re.compile(r"(head|decoder)\..*")  # what predicts masked words, where no classifier has it


def read(path: Path, values: Mapping[str, Any]) -> Checkpoint:
    """The encoder in a folder whose config.json holds `values`. FormatError names what is malformed or unknown."""
    config = _config(Settings(values), path)
    tensors = gguf_parts(renamed(read_folder_tensors(path), lambda theirs: _name(theirs, config.head)), config)
    check_tensors(config, tensors)
    return Checkpoint(path=path, config=config, tensors=tensors)


def _config(settings: Settings, path: Path) -> ModelConfig:
    refuse_settings(settings, _NEUTRAL)
    hidden, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    activation = settings.get("hidden_activation") or "gelu"
    check_activation(activation, tuple(HIDDEN_ACTIVATIONS))
    layers = settings.whole("num_hidden_layers")
    config = ModelConfig(
        architecture="modernbert",
        name=path.resolve().name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(hidden, heads),
        ffn=settings.whole("intermediate_size"),
        vocab=settings.whole("vocab_size"),
        context=settings.whole("max_position_embeddings", 8192),
        norm_eps=settings.real("norm_eps", 1e-5),
        rope_theta=_theta(settings, "full_attention", "global_rope_theta", 160_000.0),
        rope_local_theta=_theta(settings, "sliding_attention", "local_rope_theta", 10_000.0),
        windows=_windows(settings, layers),
        activation=HIDDEN_ACTIVATIONS[activation],
        pooling=pooling_of(path, POOLINGS),
        reads=True,
        both_ways=True,
        text_tokens=longest_text(path),
        head=_head(settings),
    )
    check_config(config)
    return config


def _theta(settings: Settings, kind: str, older: str, default: float) -> float:
    """The base of a kind of layers: version 5's `rope_parameters`, or version 4's name."""
    part = settings.part("rope_parameters").part(kind)
    refuse_settings(part, {"rope_type": ("default",), "partial_rotary_factor": (1,)})
    return part.real("rope_theta", settings.real(older, default))


def _windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """Per layer how many tokens it sees, half of them on either side; 0: all."""
    window, period = settings.whole("local_attention", 128), settings.whole("global_attn_every_n_layers", 3)
    if window < 2 or period < 1 or not 1 <= layers <= MOST_LAYERS:
        raise FormatError(f"config.json: {layers} layers, one in {period} global, others {window} wide, make no sense")
    if settings.get("layer_types") is None:
        return tuple(window if index % period else 0 for index in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_kinds(settings))


def _head(settings: Settings) -> Head | None:
    head = head_of(settings, "gelu")
    if head is None:
        return None
    check_activation(settings.get("classifier_activation"), ("gelu",))
    pooling = settings.get("classifier_pooling") or "cls"
    if pooling not in ("cls", "mean"):
        raise FormatError(f"config.json: classifier_pooling {pooling!r:.40} is not cls or mean")
    return replace(head, pooling="first" if pooling == "cls" else "mean")


def _name(theirs: str, head: Head | None) -> str | None:
    """Our name of a tensor; None for what is no part of an encoder. FormatError where it is unknown."""
    bare = theirs.removeprefix("model.")
    if head is None and _PRETRAINING.fullmatch(bare):
        return None
    if (match := _LAYER.fullmatch(bare)) and match[2] in _INSIDE:
        return f"blk.{match[1]}.{_INSIDE[match[2]]}.weight"
    found = _OUTSIDE.get(bare) or (_HEAD.get(bare) if head else None)
    if found is None:
        raise FormatError(f"the tensor {theirs!r} has no place in a {TYPE} encoder as Millis knows it")
    return found
