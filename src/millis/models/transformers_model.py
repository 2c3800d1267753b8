"""A checkpoint as a transformers model in float32: what training starts from, and an independent reference.

Its weights are dequantised. Needs the extra `train`; nothing here is imported when a model is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.models.checkpoint import Checkpoint
from millis.models.config import PERMUTED, ModelConfig
from millis.models.huggingface import gguf_name
from millis.models.tensor import CONVOLUTION
from millis.types import ModelError

Floats = NDArray[np.float32]


def torch_module(what: str = "the float32 reference") -> Any:
    """torch, or a ModelError that says how to get it."""
    try:
        import torch
        import transformers as library

        logging: Any = library.utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return torch
    except ImportError as error:
        raise ModelError(f"{what} needs {error.name}; install it with: pip install 'millis[train]'") from None


def transformers_model(checkpoint: Checkpoint, attention: str = "eager") -> Any:
    """A causal transformers model with the checkpoint's values. ModelError for an architecture it cannot be made of.

    `attention` is transformers' `attn_implementation`.
    """
    torch = torch_module()
    import transformers as library

    transformers: Any = library
    config = _config(checkpoint.config, "output.weight" not in checkpoint.tensors, attention)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: torch.from_numpy(values) for name, values in _weights(checkpoint, model)}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ModelError(f"{checkpoint.path}: no weights for the reference's {missing[0]}")
    for module in model.modules():  # tables that from_config left without memory
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.__init__(config)
        if hasattr(module, "embed_scale") and module.embed_scale.is_meta:
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    return model.eval()


def _config(config: ModelConfig, tied: bool, attention: str) -> Any:
    import transformers

    classes: dict[str, Any] = {
        "llama": transformers.MistralConfig if any(config.windows) else transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma": transformers.GemmaConfig,
        "gemma3": transformers.Gemma3TextConfig,
        "granite": transformers.GraniteConfig,
        "smollm3": transformers.SmolLM3Config,
        "ernie4_5": transformers.Ernie4_5Config,
        "exaone4": transformers.Exaone4Config,
        "hunyuan-dense": transformers.HunYuanDenseV1Config,
        "lfm2": transformers.Lfm2Config,
        "olmo2": transformers.Olmo3Config if any(config.windows) else transformers.Olmo2Config,
    }
    kind, scaling = config.architecture, config.rope_scaling
    scaled = scaling is not None and (scaling.kind != "yarn" or kind == "gemma3")
    own_scale = config.attention_scale is not None and kind not in ("gemma3", "granite")
    if (
        kind not in classes
        or scaled
        or own_scale
        or config.rotary_dim is not None
        or (kind != "smollm3" and config.rotated)
    ):
        raise ModelError(f"no float32 reference for architecture {kind} of this form")
    return classes[kind](
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=tied,
        attn_implementation=attention,
        **_attended(config),
        **_SPECIFIC.get(kind, _rotary)(config),
    )


def _attended(config: ModelConfig) -> dict[str, Any]:
    """What layers attend to. Mistral's configuration knows one window, for all of them."""
    if not any(config.windows):
        everything: dict[str, Any] = {"layer_types": ["full_attention"] * config.layers}
        if config.architecture == "exaone4":
            return everything | {"sliding_window": None}
        return everything if config.architecture == "gemma3" else {}
    window: dict[str, Any] = {"sliding_window": max(config.windows)}
    if config.architecture == "llama":
        return window
    kinds = ["sliding_attention" if size else "full_attention" for size in config.windows]
    used = {} if config.architecture in ("gemma3", "exaone4", "olmo2") else {"use_sliding_window": True}
    return window | used | {"layer_types": kinds}


def _rotary(config: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        found |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
        }
    return {"rope_parameters": found}


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": config.head_dim if config.attention_scale is None else config.attention_scale**-2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
        },
    }


def _olmo2(config: ModelConfig) -> dict[str, Any]:
    whole = _rotary(config)
    if not any(config.windows):
        return whole
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    return {"rope_parameters": {"full_attention": whole["rope_parameters"], "sliding_attention": local}}


def _granite(config: ModelConfig) -> dict[str, Any]:
    return _rotary(config) | {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "logits_scaling": config.logit_scale,
    }


def _smollm3(config: ModelConfig) -> dict[str, Any]:
    rotated = list(map(int, config.rotated or (True,) * config.layers))
    return _rotary(config) | {"no_rope_layers": rotated, "pad_token_id": None}


def _lfm2(config: ModelConfig) -> dict[str, Any]:
    return _rotary(config) | {
        "norm_eps": config.norm_eps,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": config.taps,
        "layer_types": ["conv" if config.convolves(layer) else "full_attention" for layer in range(config.layers)],
    }


_SPECIFIC = {"lfm2": _lfm2, "gemma3": _gemma3, "olmo2": _olmo2, "granite": _granite, "smollm3": _smollm3}


def _weights(checkpoint: Checkpoint, model: Any) -> Iterator[tuple[str, Floats]]:
    """What the checkpoint holds of the model's parameters, under their names and as transformers stores them."""
    config, left = checkpoint.config, set(checkpoint.tensors)
    for theirs, _ in model.named_parameters():
        name = gguf_name(theirs, config.architecture)
        if name is None or name not in checkpoint.tensors:
            continue  # an output that is tied; what is truly missing is seen after the tying
        left.discard(name)
        values = np.array(checkpoint.tensors[name].numpy())
        permuted = config.architecture in PERMUTED and config.rope_style == "interleaved"
        if permuted and (part := re.fullmatch(r"blk\.\d+\.attn_(q|k)\.\w+", name)):
            heads = config.heads if part[1] == "q" else config.kv_heads
            pairs = values.reshape(heads, config.head_dim // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if config.architecture in ("gemma", "gemma3") and name.endswith("norm.weight"):
            values = values - 1  # transformers adds the one itself
        if name.endswith(CONVOLUTION):
            values = values[:, None]
        yield theirs, values
    if left:
        raise ModelError(f"{checkpoint.path}: no float32 reference for a {config.architecture} with {min(left)}")
