"""A Hugging Face folder's config.json → ModelConfig. A setting that would change the computation is refused.

Keys and defaults are those of transformers' configuration classes; rotary settings are read in the form up to
version 4 (`rope_theta`, `rope_scaling`) and in that of version 5 (`rope_parameters`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from millis.models.config import Architecture, ModelConfig, RopeScaling
from millis.models.rope import longrope_attention_factor, yarn_attention_factor
from millis.models.tensors_expected import MOST_FFN, MOST_LAYERS, check_config
from millis.types import FormatError

_TYPES: dict[str, Architecture] = {
    "llama": "llama",
    "mistral": "llama",
    "phi3": "llama",  # whose matrices are stored in fewer parts
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "granitemoehybrid": "granite",
    "minicpm": "granite",  # whose scales have other names
    "smollm3": "smollm3",
    "ernie4_5": "ernie4_5",
    "exaone4": "exaone4",
    "hunyuan_v1_dense": "hunyuan-dense",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "lfm2": "lfm2",
    "gpt2": "gpt2",
}
# Whose embedding is the output matrix unless the file says no.
_TIED = ("gemma", "gemma3_text", "minicpm", "smollm3", "ernie4_5", "lfm2", "gpt2")
# Values that leave the computation as Millis runs it; null always does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attn_logit_softcapping": (),
    "block_use_swiglu": (True,),
    "clip_qkv": (),
    "conv_bias": (False,),
    "final_logit_softcapping": (),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "sparse_config": (),
    "use_bias": (False,),
    "use_cla": (False,),
    "use_pos_enc": (True,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (True,),
    "use_rotary_pos_emb": (True,),
}
_READ = {
    "gemma3_text": ("use_bidirectional_attention",),
    "phi3": ("partial_rotary_factor",),
}  # what is read there and neutral elsewhere
# transformers' defaults of configurations whose published files may leave them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "phi3": {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6},
    "ernie4_5": {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    "exaone4": {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "hunyuan_v1_dense": {"rms_norm_eps": 1e-5},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    "lfm2": {"num_key_value_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e6},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
    "granitemoehybrid": {"num_local_experts": 8, "shared_intermediate_size": 1024},
}
# transformers' defaults of Gemma3TextConfig, which the published multimodal files rely on.
_GEMMA3 = {
    "attention_heads": 8,
    "key_value_heads": 4,
    "head_dim": 256,
    "vocab": 262208,
    "context": 131072,
    "theta": 1e6,
    "scalar": 256,
    "period": 6,
}


class Settings:
    """Typed look-ups in a JSON object; null means absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._required(key, default)
        if type(value) is not int or abs(value) >= 1 << 63:  # JSON's have no bound
            raise FormatError(f"config.json: {key} must be a whole number, not {value!r:.40}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._required(key, default)
        if type(value) not in (int, float) or abs(value) > 1e30:
            raise FormatError(f"config.json: {key} must be a number, not {value!r:.40}")
        return float(value)

    def truth(self, key: str, default: bool) -> bool:
        value = self._required(key, default)
        if type(value) is not bool:
            raise FormatError(f"config.json: {key} must be true or false, not {value!r:.40}")
        return value

    def part(self, key: str) -> Settings:
        """The object under `key`, empty where absent."""
        value = self._values.get(key)
        if not isinstance(value, dict | None):
            raise FormatError(f"config.json: {key} must be an object, not {value!r:.40}")
        return Settings(value or {})

    def names(self) -> list[str]:
        """The keys, as the file has them."""
        return list(self._values)

    def _required(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"config.json: {key} is missing")
        return value


def huggingface_config(values: Mapping[str, Any], name: str) -> tuple[ModelConfig, bool]:
    """The configuration, and whether the embedding serves as output matrix. Raises FormatError."""
    settings = Settings(values)
    if values.get("model_type") == "gemma3":  # with a vision tower: its language half
        settings = Settings({"model_type": "gemma3_text"} | dict(settings.part("text_config")._values))
    kind = settings.get("model_type")
    if kind is None and settings.get("architectures") == ["MiniCPMForCausalLM"]:
        kind = "minicpm"  # whose file may leave it out
    if not isinstance(kind, str) or kind not in _TYPES:
        known = ", ".join(
            (
                *_TYPES,
                "gemma3",
                "bert",
                "roberta",
                "xlm-roberta",
                "distilbert",
                "roformer",
                "modernbert",
                "t5",
                "mt5",
                "marian",
            )
        )
        raise FormatError(f"config.json: the model type {kind!r:.40} is not one of {known}")
    refuse_settings(settings, {key: _NEUTRAL[key] for key in _NEUTRAL if key not in _READ.get(kind, ())})
    fields = _SPECIFIC[kind](Settings(_DEFAULTS.get(kind, {}) | dict(settings._values)))
    config = ModelConfig(architecture=_TYPES[kind], name=name, **fields)
    check_config(config)
    tied = settings.truth("tie_word_embeddings", kind in _TIED)
    if kind == "lfm2":
        tied = settings.truth("tie_embedding", tied)
    return config, tied


def refuse_settings(settings: Settings, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises FormatError where one of the `neutral` settings has another value than those listed for it."""
    for key, allowed in neutral.items():
        if settings.get(key) is not None and settings.get(key) not in allowed:
            raise FormatError(f"config.json sets {key} to {settings.get(key)!r:.40}, which Millis does not support")


def _common(settings: Settings) -> dict[str, Any]:
    """llama's keys, shared by all but gpt2."""
    hidden, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    check_activation(settings.get("hidden_act"), ("silu",))
    return {
        "layers": settings.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": settings.whole("num_key_value_heads", heads),
        "head_dim": settings.whole("head_dim", 0) or divide(hidden, heads),
        "ffn": settings.whole("intermediate_size"),
        "vocab": settings.whole("vocab_size"),
        "context": settings.whole("max_position_embeddings"),
        "norm_eps": settings.real("rms_norm_eps", 1e-6),
        "attention_bias": settings.truth("attention_bias", False),
        **_rotary(settings, settings.part("rope_parameters"), 10000.0),
    }


def divide(hidden: int, heads: int) -> int:
    if heads < 1 or hidden % heads:
        raise FormatError(f"config.json: a hidden size of {hidden} does not divide into {heads} heads")
    return hidden // heads


def check_activation(found: Any, allowed: tuple[str, ...]) -> None:
    if found is not None and found not in allowed:
        raise FormatError(f"config.json: the activation {found!r:.40} is not {' or '.join(allowed)}")


def _rotary(settings: Settings, parameters: Settings, theta: float) -> dict[str, Any]:
    """`parameters`: version 5's; what they leave out is looked for in version 4's places."""
    theta = parameters.real("rope_theta", settings.real("rope_theta", theta))
    scaling = parameters if parameters.get("rope_type") else settings.part("rope_scaling")
    for part in (parameters, scaling):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise FormatError("config.json: only a part of each head is rotated, which Millis does not support")
    return {"rope_theta": theta, "rope_scaling": _scaling(scaling, settings)}


def _scaling(scaling: Settings, settings: Settings) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=scaling.real("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=scaling.real("factor"),
            low_freq_factor=scaling.real("low_freq_factor"),
            high_freq_factor=scaling.real("high_freq_factor"),
            original_context=scaling.whole("original_max_position_embeddings"),
        )
    if kind == "yarn":
        return _yarn(scaling, settings)
    if kind == "longrope":
        return _longrope(scaling, settings)
    raise FormatError(
        f"config.json: the rope scaling {kind!r:.40} is not one of default, linear, llama3, yarn, longrope"
    )


def _longrope(scaling: Settings, settings: Settings) -> RopeScaling:
    context, key = settings.whole("max_position_embeddings"), "original_max_position_embeddings"
    original = settings.whole(key, scaling.whole(key, context))
    factor = scaling.real("factor", context / max(original, 1))
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_context=original,
        attention_factor=scaling.real("attention_factor", longrope_attention_factor(factor, original)),
        short_factors=_factors(scaling, "short_factor"),
        long_factors=_factors(scaling, "long_factor"),
    )


def _factors(scaling: Settings, key: str) -> tuple[float, ...]:
    values = scaling.get(key)
    if not isinstance(values, list) or not all(type(value) in (int, float) and abs(value) < 1e30 for value in values):
        raise FormatError(f"config.json: {key} must list numbers, not {values!r:.40}")
    return tuple(map(float, values))


def _yarn(scaling: Settings, settings: Settings) -> RopeScaling:
    refuse_settings(scaling, {"truncate": (True,)})
    context, key = settings.whole("max_position_embeddings"), "original_max_position_embeddings"
    original = settings.whole(key, scaling.whole(key, context))
    factor = scaling.real("factor", context / max(original, 1))
    attention = yarn_attention_factor(factor)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        above, below = (yarn_attention_factor(factor, scaling.real(key)) for key in ("mscale", "mscale_all_dim"))
        attention = above / below if below > 0 else -1.0  # which no model has
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=scaling.real("beta_fast", 32.0) or 32.0,
        beta_slow=scaling.real("beta_slow", 1.0) or 1.0,
        attention_factor=scaling.real("attention_factor", attention),
    )


def layer_kinds(settings: Settings) -> list[str]:
    """`layer_types`: of each layer full_attention or sliding_attention. FormatError for others."""
    kinds = settings.get("layer_types")
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise FormatError(f"config.json: layer_types must list full_attention or sliding_attention, not {kinds!r:.60}")
    return kinds


def _windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """Positions attended per layer, from `layer_types`; () where every layer attends to all."""
    kinds = layer_kinds(settings)
    if "sliding_attention" not in kinds:
        return ()
    window = settings.whole("sliding_window")
    if len(kinds) != layers or window < 1:
        raise FormatError(f"config.json: a window of {window} in {len(kinds)} layer_types for {layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _qwen(settings: Settings) -> dict[str, Any]:
    fields = _common(settings)
    if settings.truth("use_sliding_window", False):
        if settings.get("layer_types") is None:
            raise FormatError("config.json: use_sliding_window without layer_types; save it again with transformers 5")
        fields["windows"] = _windows(settings, fields["layers"])
    return fields


def _qwen2(settings: Settings) -> dict[str, Any]:
    return _qwen(settings) | {"attention_bias": True}


def _mistral(settings: Settings) -> dict[str, Any]:
    """All layers attend to a window, or all to everything."""
    fields = _common(settings)
    layers = fields["layers"]
    window = None if settings.get("sliding_window") is None else settings.whole("sliding_window")
    if not 1 <= layers <= MOST_LAYERS or (window is not None and window < 1):
        raise FormatError(f"config.json: {layers} layers that attend to {window} positions make no sense")
    said = settings.get("layer_types")
    if said is not None and said != ["sliding_attention" if window else "full_attention"] * layers:
        raise FormatError("config.json: all of its layers attend to a window or none; its layer_types differ")
    return fields | {"windows": (window,) * layers if window and window < fields["context"] else ()}


def _phi3(settings: Settings) -> dict[str, Any]:
    """Older files call longrope su or yarn. Of each head a part may be rotated (Phi-4-mini)."""
    given, key = dict(settings._values), "partial_rotary_factor"
    rotated = settings.real(key, 1.0)
    for part in ("rope_parameters", "rope_scaling"):
        scaling = dict(settings.part(part)._values)
        rotated = Settings(scaling).real(key, rotated)
        if (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):
            scaling["rope_type"] = "longrope"
        given[part] = scaling | {key: None}
    fields = _mistral(Settings(given))
    return fields if rotated == 1 else fields | {"rotary_dim": int(fields["head_dim"] * rotated)}


def _smollm3(settings: Settings) -> dict[str, Any]:
    """One layer in four is not rotated, unless the file lists or counts otherwise."""
    fields = _qwen(settings)
    layers, period = fields["layers"], settings.whole("no_rope_layer_interval", 4)
    rotated = settings.get("no_rope_layers")  # 1: rotated
    if rotated is None:
        if not (1 <= period <= MOST_LAYERS and 1 <= layers <= MOST_LAYERS):
            raise FormatError(f"config.json: {layers} layers with every {period}th not rotated make no sense")
        rotated = [int((index + 1) % period != 0) for index in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(value not in (0, 1) for value in rotated):
        raise FormatError(f"config.json: no_rope_layers must list 0 or 1 for {layers} layers, not {rotated!r:.60}")
    return fields | {"rotated": tuple(map(bool, rotated[:layers]))}


def _ernie4_5(settings: Settings) -> dict[str, Any]:
    return _common(settings) | {"rope_style": "interleaved"}


def _granite(settings: Settings) -> dict[str, Any]:
    return _common(settings) | {
        "embedding_scale": settings.real("embedding_multiplier", 1.0),
        "residual_scale": settings.real("residual_multiplier", 1.0),
        "attention_scale": settings.real("attention_multiplier", 1.0),
        "logit_scale": settings.real("logits_scaling", 1.0),
    }


def _minicpm(settings: Settings) -> dict[str, Any]:
    """Keys and defaults of openbmb's own code. It takes the long factors of longrope for any text where the context
    is longer than the original one, which is refused."""
    fields = _common(settings)
    depth, base, scaling = (
        settings.real("scale_depth", 1.0),
        settings.real("dim_model_base", 1.0),
        fields["rope_scaling"],
    )
    if fields["layers"] < 1 or base <= 0:
        raise FormatError(f"config.json: {fields['layers']} layers and a dim_model_base of {base} make no sense")
    if scaling is not None and scaling.kind == "longrope" and scaling.original_context != fields["context"]:
        raise FormatError("config.json: longrope of minicpm beyond its original context is not supported")
    return fields | {
        "embedding_scale": settings.real("scale_emb", 1.0),
        "residual_scale": depth / math.sqrt(fields["layers"]),
        "logit_scale": fields["hidden"] / base,
    }


def _granite_hybrid(settings: Settings) -> dict[str, Any]:
    """Those without experts whose layers are all attention: granite, with other names."""
    layers, experts = settings.whole("num_hidden_layers"), settings.whole("num_local_experts")
    kinds = settings.get("layer_types") or settings.get("layers_block_type")
    plain = isinstance(kinds, list) and all(kind in ("attention", "full_attention") for kind in kinds)
    if experts or not plain or len(kinds) != layers:
        raise FormatError(
            f"config.json: of granitemoehybrid Millis runs models of attention layers without experts, not one of "
            f"{experts} experts and the layers {kinds!r:.60}"
        )
    given = dict(settings._values) | {"intermediate_size": settings.get("shared_intermediate_size")}
    fields = _granite(Settings(given))
    return fields if settings.get("position_embedding_type") == "rope" else fields | {"rotated": (False,) * layers}


def _gemma(settings: Settings) -> dict[str, Any]:
    """Published files say gelu and mean its approximation by tanh."""
    check_activation(settings.get("hidden_act"), ("gelu", "gelu_pytorch_tanh"))
    check_activation(settings.get("hidden_activation"), ("gelu_pytorch_tanh",))
    fields = _common(Settings(dict(settings._values) | {"hidden_act": None}))
    return fields | {"embedding_scale": math.sqrt(abs(fields["hidden"])), "activation": "gelu_tanh"}


def _exaone4(settings: Settings) -> dict[str, Any]:
    """One layer in four attends to all, unless the file lists or counts otherwise, or has no window."""
    fields, given = _common(settings), dict(settings._values)
    layers, kinds = fields["layers"], settings.get("layer_types")
    windowed = settings.get("sliding_window") is not None
    if kinds is None and windowed:
        period = settings.whole("sliding_window_pattern")
        if not (1 <= period <= MOST_LAYERS and 1 <= layers <= MOST_LAYERS):
            raise FormatError(f"config.json: {layers} layers with every {period}th attending to all make no sense")
        kinds = _periodic(layers, period)
    windows = _windows(Settings(given | {"layer_types": kinds}), layers) if kinds is not None else ()
    if windowed and not windows:
        raise FormatError("config.json: a sliding_window that no layer has would leave all layers without rotation")
    return fields | {"windows": windows}


def _periodic(layers: int, period: int) -> list[str]:
    """The `layer_types` of a model in which every period-th layer attends to all."""
    return ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(layers)]


def _hunyuan(settings: Settings) -> dict[str, Any]:
    """A dynamic scaling with an alpha is none: it stretches the base once and for all, whatever the text's length."""
    experts = settings.get("num_experts")
    if experts not in (None, 0, 1):
        raise FormatError(f"config.json: hunyuan_v1_dense of {experts!r:.40} experts is not supported")
    key = "rope_parameters" if settings.part("rope_parameters").get("rope_type") else "rope_scaling"
    scaling = settings.part(key)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind != "dynamic" or not scaling.get("alpha"):
        return _common(settings)
    plain = dict(scaling._values) | {"rope_type": "default"}
    fields, alpha = _common(Settings(dict(settings._values) | {key: plain})), scaling.real("alpha")
    head_dim = fields["head_dim"]
    if alpha <= 0 or head_dim <= 2:
        raise FormatError(f"config.json: an alpha of {alpha} for heads of {head_dim} makes no sense")
    return fields | {"rope_theta": fields["rope_theta"] * alpha ** (head_dim / (head_dim - 2))}


def _gemma3(settings: Settings) -> dict[str, Any]:
    defaults = {
        "num_attention_heads": _GEMMA3["attention_heads"],
        "num_key_value_heads": _GEMMA3["key_value_heads"],
        "head_dim": _GEMMA3["head_dim"],
        "vocab_size": _GEMMA3["vocab"],
        "max_position_embeddings": _GEMMA3["context"],
    }
    given = {key: value for key, value in settings._values.items() if value is not None}
    settings = Settings(defaults | given)
    check_activation(settings.get("hidden_activation"), ("gelu_pytorch_tanh",))
    whole, local = _rotary_by_layer_type(settings)
    fields = _common(settings) | _rotary(settings, whole, _GEMMA3["theta"])
    layers = fields["layers"]
    return fields | {
        "windows": _gemma3_windows(settings, layers),
        "rope_local_theta": local.real("rope_theta", settings.real("rope_local_base_freq", 10000.0)),
        "attention_scale": _inverse_root(settings.real("query_pre_attn_scalar", _GEMMA3["scalar"])),
        "activation": "gelu_tanh",
        "both_ways": settings.truth("use_bidirectional_attention", False),
    }


def _rotary_by_layer_type(settings: Settings) -> tuple[Settings, Settings]:
    """The rotary settings of layers that attend to all and of windowed ones, whose rotation must not be scaled."""
    rope = settings.part("rope_parameters")
    if unknown := rope._values.keys() - {"full_attention", "sliding_attention"}:
        kind = settings.get("model_type")
        raise FormatError(f"config.json: rope_parameters of {kind} are per layer type; {min(unknown)!r:.40} is none")
    local = rope.part("sliding_attention")
    if local.get("partial_rotary_factor") not in (None, 1) or _scaling(local, settings) is not None:
        raise FormatError("config.json: scaled or partial rotation of windowed layers is not supported")
    return rope.part("full_attention"), local


def _olmo3(settings: Settings) -> dict[str, Any]:
    """One layer in four attends to all, unless the file lists others; it alone is rotated by a scaled rotation."""
    whole, local = _rotary_by_layer_type(settings)
    fields = _common(settings) | _rotary(settings, whole, 5e5)
    layers, kinds = fields["layers"], settings.get("layer_types")
    if kinds is None and 1 <= layers <= MOST_LAYERS:
        kinds = _periodic(layers, 4)
    return fields | {
        "windows": _windows(Settings(dict(settings._values) | {"layer_types": kinds}), layers),
        "rope_local_theta": local.real("rope_theta", settings.real("rope_theta", 5e5)),
    }


def _lfm2(settings: Settings) -> dict[str, Any]:
    """Layers are convolutions where they do not attend: those that are listed so, or not listed among those that do."""
    hidden, ffn = settings.whole("hidden_size"), settings.whole("block_ff_dim", settings.whole("intermediate_size", 0))
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        if settings.whole(key, hidden) != hidden:
            raise FormatError(f"config.json: a {key} other than hidden_size, {hidden}, is not supported")
    if settings.truth("block_auto_adjust_ff_dim", True):
        multiple, factor = settings.whole("block_multiple_of", 256), settings.real("block_ffn_dim_multiplier", 1.0)
        if not (1 <= multiple <= MOST_FFN and 0 < ffn <= MOST_FFN and 0 < factor <= MOST_FFN):
            raise FormatError(f"config.json: a feed-forward width of {ffn} · {factor} by {multiple} makes no sense")
        ffn = -(-int(factor * int(2 * ffn / 3)) // multiple) * multiple
    given = dict(settings._values) | {"intermediate_size": ffn, "rms_norm_eps": settings.real("norm_eps")}
    fields = _common(Settings(given))
    return fields | {"convolved": _convolved(settings, fields["layers"]), "taps": settings.whole("conv_L_cache", 3)}


def _convolved(settings: Settings, layers: int) -> tuple[bool, ...]:
    kinds, attending = settings.get("layer_types"), settings.get("full_attn_idxs")
    if kinds is None and isinstance(attending, list) and 1 <= layers <= MOST_LAYERS:
        kinds = ["full_attention" if index in attending else "conv" for index in range(layers)]
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "conv") for kind in kinds):
        raise FormatError(f"config.json: layer_types must list full_attention or conv, not {kinds!r:.60}")
    return tuple(kind == "conv" for kind in kinds)


def _gemma3_windows(settings: Settings, layers: int) -> tuple[int, ...]:
    if settings.get("layer_types") is not None:
        return _windows(settings, layers)
    period = settings.whole("sliding_window_pattern", settings.whole("_sliding_window_pattern", 6))
    window = settings.whole("sliding_window", 4096)
    if not (1 <= period <= MOST_LAYERS and 1 <= layers <= MOST_LAYERS):
        raise FormatError(f"config.json: {layers} layers with every {period}th attending to all make no sense")
    return tuple(0 if index % period == period - 1 else window for index in range(layers))


def _inverse_root(value: float) -> float:
    if value <= 0:
        raise FormatError(f"config.json: query_pre_attn_scalar must be positive, not {value}")
    return float(value**-0.5)


def _gpt2(settings: Settings) -> dict[str, Any]:
    hidden, heads = settings.whole("n_embd"), settings.whole("n_head")
    check_activation(settings.get("activation_function"), ("gelu_new", "gelu_pytorch_tanh"))
    return {
        "layers": settings.whole("n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": divide(hidden, heads),
        "ffn": settings.whole("n_inner", 4 * hidden),
        "vocab": settings.whole("vocab_size"),
        "context": settings.whole("n_positions"),
        "norm_eps": settings.real("layer_norm_epsilon", 1e-5),
        "activation": "gelu_tanh",
        "attention_bias": True,
    }


_SPECIFIC: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "llama": _common,
    "mistral": _mistral,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen,
    "gemma": _gemma,
    "gemma3_text": _gemma3,
    "granite": _granite,
    "granitemoehybrid": _granite_hybrid,
    "minicpm": _minicpm,
    "smollm3": _smollm3,
    "ernie4_5": _ernie4_5,
    "exaone4": _exaone4,
    "hunyuan_v1_dense": _hunyuan,
    "olmo2": _common,
    "olmo3": _olmo3,
    "lfm2": _lfm2,
    "gpt2": _gpt2,
}
