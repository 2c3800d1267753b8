"""A GGUF file's key-values → ModelConfig. A setting of the architecture that we do not know is an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from millis.models.config import Architecture, ModelConfig, RopeScaling
from millis.models.gguf_values import StringArray
from millis.models.parts import gguf_parts
from millis.models.rope import yarn_attention_factor
from millis.models.tensor import Tensor
from millis.models.tensors_expected import MOST_LAYERS, check_config, check_tensors
from millis.types import FormatError

# Settings that change nothing here: descriptive, or of use only to a scaling type that is refused below.
_WITHOUT_EFFECT = {"rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"}
_LONGROPE = ("phi3", "minicpm")  # architectures that may have its factors among their tensors
# Settings that would change the computation, unless they have this value.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attn_logit_softcapping": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
_SMOLLM3_PERIOD = 4
EXAONE4_WINDOWED_LAYERS = 64  # how many layers the one Exaone 4 has that windows most of them
_GEMMA3_27B_LAYERS = 62  # the one Gemma 3 that scales scores by hidden / heads; the file does not say so


class _Settings:
    """Typed look-ups under "<architecture>."; remembers which keys were asked for."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.architecture, self._prefix = architecture, architecture + "."
        self._metadata = metadata
        self._known = _WITHOUT_EFFECT | _NEUTRAL.keys()

    def raw(self, key: str) -> Any:
        """The value, perhaps an array; None where absent."""
        self._known.add(key)
        return self._metadata.get(self._prefix + key)

    def get(self, key: str) -> Any:
        """The scalar value; None where absent."""
        self.raw(key)
        return _scalar(self._metadata, self._prefix + key)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._required(key, default)
        if type(value) is not int:
            raise FormatError(f"{self._prefix}{key} must be a whole number, not {_short(value)}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._required(key, default)
        if type(value) not in (int, float):
            raise FormatError(f"{self._prefix}{key} must be a number, not {_short(value)}")
        return float(value)

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"the key {self._prefix}{key} is missing: not a whole model")
        return value

    def refuse_others(self) -> None:
        """Raises FormatError on a setting that was never asked for, or on one whose value we cannot honour."""
        for key, value in self._metadata.items():
            name = key.removeprefix(self._prefix)
            if name == key:
                continue
            if name not in self._known or (name in _NEUTRAL and _scalar(self._metadata, key) != _NEUTRAL[name]):
                raise FormatError(f"the file sets {key} to {_short(value)}, which Millis does not support")


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | StringArray)


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if _is_array(value) else repr(value)[:60]


def _scalar(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if _is_array(value):
        raise FormatError(f"{key} is a list, one value for each layer perhaps; Millis supports a single value")
    return value


def gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The configuration, and the tensors in the parts that it calls for, all checked. Raises FormatError."""
    architecture = _scalar(metadata, "general.architecture")
    if not isinstance(architecture, str) or architecture not in _SPECIFIC:
        raise FormatError(f"the architecture {_short(architecture)} is not one of {', '.join(_SPECIFIC)}")
    _check_whole_model(metadata)
    settings = _Settings(metadata, architecture)
    known, specific = _SPECIFIC[architecture]
    fields = _common(settings) | specific(settings)
    fields["vocab"] = _vocab(settings, metadata, tensors)
    if architecture in _LONGROPE:
        if settings.get("rope.scaling.type") == "longrope" or "rope_factors_long.weight" in tensors:
            fields["rope_scaling"] = _longrope(settings, tensors)
    fields["attention_bias"] = architecture in ("qwen2", "gpt2") or "blk.0.attn_q.bias" in tensors
    name = metadata.get("general.name")
    config = ModelConfig(architecture=known, name=name if isinstance(name, str) else "", **fields)
    settings.refuse_others()
    check_config(config)
    tensors = gguf_parts(tensors, config) if architecture == "phi3" else tensors
    check_tensors(config, tensors)
    return config, tensors


def _check_whole_model(metadata: Mapping[str, Any]) -> None:
    kind, parts = _scalar(metadata, "general.type", "model"), _scalar(metadata, "split.count", 1)
    if kind != "model":
        raise FormatError(f"the file holds a {_short(kind)}, not a model")
    if parts not in (0, 1):
        raise FormatError(f"the file is one of {_short(parts)} parts; merge them into one file first")


def _common(settings: _Settings) -> dict[str, Any]:
    """What every architecture says under the same keys."""
    hidden, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    if heads < 1 or hidden < 1:
        raise FormatError(f"hidden and heads must be positive, not {hidden} and {heads}")
    head_dim = settings.whole("attention.key_length", 0) or _divide(hidden, heads)
    if settings.whole("attention.value_length", head_dim) != head_dim:
        raise FormatError("keys and values differ in length, which Millis does not support")
    return {
        "layers": settings.whole("block_count"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": max(_kv_heads(settings, heads)),
        "head_dim": head_dim,
        "ffn": settings.whole("feed_forward_length"),
        "context": settings.whole("context_length"),
        "attention_scale": settings.real("attention.scale", 0.0) or None,
    }


def _kv_heads(settings: _Settings, heads: int) -> tuple[int, ...]:
    """Of all layers; or of each, where the file may list layers that have none."""
    key = "attention.head_count_kv"
    listed = settings.raw(key)
    if settings.architecture != "lfm2" or not isinstance(listed, np.ndarray):
        return (settings.whole(key, heads),)
    found = tuple(listed.tolist())
    if listed.dtype.kind not in "iu" or len(found) != _layers(settings) or len({*found, 0}) != 2:
        raise FormatError(f"lfm2.{key} must list one number of heads, or none, for each layer, not {found!r:.60}")
    return found


def _divide(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise FormatError(f"a hidden size of {hidden} does not divide into {heads} heads")
    return hidden // heads


def _vocab(settings: _Settings, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    if "token_embd.weight" not in tensors:
        raise FormatError("the tensor 'token_embd.weight' is missing: not a whole model")
    rows = tensors["token_embd.weight"].shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    listed = len(tokens) if hasattr(tokens, "__len__") else 0
    for said, where in ((settings.whole("vocab_size", rows), "vocab_size"), (listed or rows, "the tokenizer")):
        if said != rows:
            raise FormatError(f"{where} counts {said} tokens, but token_embd.weight has {rows} rows")
    return rows


def _rotary(settings: _Settings) -> dict[str, Any]:
    """Keys of rotary embeddings and of RMS norms, shared by all but gpt2."""
    head_dim = _common(settings)["head_dim"]
    rotated = settings.whole("rope.dimension_count", head_dim)
    if rotated != head_dim and settings.architecture != "phi3":
        raise FormatError("only a part of each head is rotated, which Millis does not support but of phi3")
    return {
        "rotary_dim": None if rotated == head_dim else rotated,
        "norm_eps": settings.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(settings),
    }


def _rope_scaling(settings: _Settings) -> RopeScaling | None:
    kind = settings.get("rope.scaling.type")
    if kind == "longrope" and settings.architecture in _LONGROPE:
        return None  # but what the factors among its tensors say
    factor = settings.real("rope.scaling.factor", settings.real("rope.scale_linear", 1.0))
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=settings.whole("rope.scaling.original_context_length", settings.whole("context_length")),
            beta_fast=settings.real("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=settings.real("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=yarn_attention_factor(factor) * settings.real("rope.scaling.attn_factor", 1.0),
        )
    if kind not in (None, "none", "linear"):
        raise FormatError(f"the rope scaling {_short(kind)} is not supported; none, linear and yarn are")
    return RopeScaling(kind="linear", factor=factor) if kind != "none" and factor not in (0.0, 1.0) else None


def _llama(settings: _Settings) -> dict[str, Any]:
    return _rotary(settings) | {"rope_style": "interleaved"}


def _phi3(settings: _Settings) -> dict[str, Any]:
    layers, window = _layers(settings), settings.whole("attention.sliding_window", 0)
    return _rotary(settings) | {"windows": (window,) * layers if 0 < window < settings.whole("context_length") else ()}


def _longrope(settings: _Settings, tensors: Mapping[str, Tensor]) -> RopeScaling:
    """Of the attention factor, no other is recommended where the file names none."""
    context, factors = settings.whole("context_length"), []
    original = settings.whole("rope.scaling.original_context_length", context)
    for name in ("rope_factors_short.weight", "rope_factors_long.weight"):
        if name not in tensors or len(tensors[name].shape) != 1:
            raise FormatError(f"{name} must list factors; convert the model again")
        factors.append(tuple(tensors[name].numpy().tolist()))
    return RopeScaling(
        kind="longrope",
        factor=context / max(original, 1),
        original_context=original,
        attention_factor=settings.real("rope.scaling.attn_factor", 1.0),
        short_factors=factors[0],
        long_factors=factors[1],
    )


def _granite(settings: _Settings) -> dict[str, Any]:
    """llama.cpp rotates unless `rope.scaling.finetuned` is false, which means something else of other models."""
    rotates = settings.get("rope.scaling.finetuned")
    if not isinstance(rotates, bool | None):
        raise FormatError(f"granite.rope.scaling.finetuned must be true or false, not {_short(rotates)}")
    return _llama(settings) | {
        "embedding_scale": settings.real("embedding_scale", 0.0) or 1.0,
        "residual_scale": settings.real("residual_scale", 0.0) or 1.0,
        "logit_scale": settings.real("logit_scale"),
        "rotated": (False,) * _layers(settings) if rotates is False else (),
    }


def _gemma(settings: _Settings) -> dict[str, Any]:
    hidden = settings.whole("embedding_length")
    return _rotary(settings) | {"embedding_scale": math.sqrt(hidden), "activation": "gelu_tanh"}


def _minicpm(settings: _Settings) -> dict[str, Any]:
    """granite with a longrope of its own; llama.cpp's guesses for files without scales are not taken."""
    context = settings.whole("context_length")
    if settings.whole("rope.scaling.original_context_length", context) != context:
        raise FormatError("rotation of minicpm beyond its original context is not supported")
    return _llama(settings) | {
        name: settings.real(name) for name in ("embedding_scale", "residual_scale", "logit_scale")
    }


def smollm3_rotated(layers: int) -> tuple[bool, ...]:
    """Which layers of a smollm3 are rotated: all but every fourth. The file does not say so."""
    return tuple(index % _SMOLLM3_PERIOD != _SMOLLM3_PERIOD - 1 for index in range(layers))


def _smollm3(settings: _Settings) -> dict[str, Any]:
    return _llama(settings) | {"rotated": smollm3_rotated(_layers(settings))}


def _layers(settings: _Settings) -> int:
    layers = settings.whole("block_count")
    if not 1 <= layers <= MOST_LAYERS:
        raise FormatError(f"block_count must lie in [1, {MOST_LAYERS}], not {layers}")
    return layers


def _exaone4(settings: _Settings) -> dict[str, Any]:
    """Windows are those that the file says. llama.cpp has some in every file of so many layers, and in no other."""
    windowed = settings.get("attention.sliding_window") is not None or _layers(settings) == EXAONE4_WINDOWED_LAYERS
    return _rotary(settings) | {"windows": _patterned_windows(settings, 4) if windowed else ()}


def _olmo2(settings: _Settings) -> dict[str, Any]:
    """Olmo 3, too, whose files say a window. Of yarn, some say the attention factor itself, which is the one that YaRN
    recommends, where others say what that is multiplied by."""
    fields, windowed = _rotary(settings), settings.get("attention.sliding_window") is not None
    scaling = fields["rope_scaling"]
    if scaling is not None and scaling.kind == "yarn":
        usual = yarn_attention_factor(scaling.factor)
        if math.isclose(settings.real("rope.scaling.attn_factor", 1.0), usual, rel_tol=1e-5):
            fields["rope_scaling"] = replace(scaling, attention_factor=usual)
    return fields | {
        "windows": _patterned_windows(settings, 4) if windowed else (),
        "rope_local_theta": settings.real("rope.freq_base_swa", fields["rope_theta"]),
    }


def _lfm2(settings: _Settings) -> dict[str, Any]:
    """Layers without heads of keys and values are convolutions."""
    heads = _kv_heads(settings, settings.whole("attention.head_count"))
    return _rotary(settings) | {
        "convolved": tuple(count == 0 for count in heads) if len(heads) > 1 else (),
        "taps": settings.whole("shortconv.l_cache"),
    }


def _gemma3(settings: _Settings) -> dict[str, Any]:
    fields = _rotary(settings)
    if fields["rope_scaling"] is not None and fields["rope_scaling"].kind != "linear":
        raise FormatError("yarn of gemma3 is not supported: what becomes of its windowed layers is not said")
    fields |= {
        "windows": _patterned_windows(settings, 6),
        "rope_local_theta": settings.real("rope.freq_base_swa", 10000.0),
        "activation": "gelu_tanh",
    }
    common = _common(settings)
    if common["layers"] == _GEMMA3_27B_LAYERS and common["attention_scale"] is None:
        fields["attention_scale"] = (common["hidden"] / common["heads"]) ** -0.5
    return fields


def _patterned_windows(settings: _Settings, period: int) -> tuple[int, ...]:
    """One layer in `period` attends to all, unless the file lists or counts otherwise."""
    layers, window = _layers(settings), settings.whole("attention.sliding_window")
    pattern = settings.raw("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_ and len(pattern) == layers:
        return tuple(window if windowed else 0 for windowed in pattern.tolist())
    period = settings.whole("attention.sliding_window_pattern", period)
    if not 1 <= period <= MOST_LAYERS:
        raise FormatError(f"{layers} layers with every {period}th attending to all make no sense")
    return tuple(0 if index % period == period - 1 else window for index in range(layers))


def _gpt2(settings: _Settings) -> dict[str, Any]:
    return {"norm_eps": settings.real("attention.layer_norm_epsilon"), "activation": "gelu_tanh"}


_SPECIFIC: dict[str, tuple[Architecture, Callable[[_Settings], dict[str, Any]]]] = {
    "llama": ("llama", _llama),
    "phi3": ("llama", _phi3),
    "qwen2": ("qwen2", _rotary),
    "qwen3": ("qwen3", _rotary),
    "gemma": ("gemma", _gemma),
    "gemma3": ("gemma3", _gemma3),
    "granite": ("granite", _granite),
    "minicpm": ("granite", _minicpm),
    "smollm3": ("smollm3", _smollm3),
    "ernie4_5": ("ernie4_5", _llama),
    "exaone4": ("exaone4", _exaone4),
    "hunyuan-dense": ("hunyuan-dense", _rotary),
    "olmo2": ("olmo2", _olmo2),
    "lfm2": ("lfm2", _lfm2),
    "gpt2": ("gpt2", _gpt2),
}
