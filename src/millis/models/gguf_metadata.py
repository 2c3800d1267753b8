"""A ModelConfig → the key-values of a GGUF file, and a checkpoint's tensors as such a file stores them.

Key names: the GGUF specification. What it has no key for is refused, so that no file computes something else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from millis.models.checkpoint import Checkpoint
from millis.models.config import PERMUTED, ModelConfig, RopeScaling
from millis.models.gguf_config import EXAONE4_WINDOWED_LAYERS, smollm3_rotated
from millis.models.rope import frequencies, yarn_attention_factor
from millis.models.tensor import CONVOLUTION, Tensor
from millis.types import FormatError

_SWA_PERIOD = 6  # of gemma3's layers, every sixth attends to all; readers of GGUF files take that for granted


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """general.* and the architecture's keys. FormatError: a setting that GGUF cannot say for this architecture."""
    prefix = config.architecture
    keys: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "vocab_size": config.vocab,
    }
    _check_rotated(config)
    keys |= _gpt2(config) if config.architecture == "gpt2" else _rotary(config)
    general = {"general.architecture": prefix, "general.type": "model", "general.name": config.name or prefix}
    return general | {f"{prefix}.{key}": value for key, value in keys.items()}


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": config.norm_eps}


def _rotary(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.attention_scale is not None and not np.isclose(config.attention_scale, config.head_dim**-0.5):
        keys["attention.scale"] = config.attention_scale
    if config.rope_scaling is not None and config.rope_scaling.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": config.rope_scaling.kind, "rope.scaling.factor": config.rope_scaling.factor}
    if config.rope_scaling is not None and config.rope_scaling.kind == "yarn":
        keys |= _yarn(config.architecture, config.rope_scaling)
    if config.architecture == "gemma3":
        keys |= _gemma3(config)
    elif config.architecture == "exaone4":
        keys |= _exaone4(config)
    elif config.architecture == "olmo2":
        keys |= _olmo2(config)
    elif config.architecture == "lfm2":
        keys |= _lfm2(config)
    elif any(config.windows):
        raise FormatError(f"windowed attention of {config.architecture} cannot be said in a GGUF file")
    return keys | _granite(config) if config.architecture == "granite" else keys


def _yarn(architecture: str, scaling: RopeScaling) -> dict[str, Any]:
    """The attention factor is said beside what YaRN recommends, by which readers multiply it."""
    if architecture == "gemma3":
        raise FormatError("yarn of gemma3 cannot be said in a GGUF file: readers would scale windowed layers, too")
    return {
        "rope.scaling.original_context_length": scaling.original_context,
        "rope.scaling.attn_factor": scaling.attention_factor / yarn_attention_factor(scaling.factor),
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }


def _granite(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_scale,
        "rope.scaling.finetuned": not config.rotated or any(config.rotated),  # llama.cpp's word for "rotated"
    }


def _check_rotated(config: ModelConfig) -> None:
    """FormatError where the layers that are rotated are not those that readers of the file take for granted."""
    every = (True,) * config.layers
    rotated = config.rotated or every
    usual = smollm3_rotated(config.layers) if config.architecture == "smollm3" else every
    if rotated != usual and (config.architecture != "granite" or any(rotated)):
        raise FormatError(f"{config.architecture} in a GGUF file cannot say which of its layers are rotated")


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    windows = {window for window in config.windows if window}
    usual = all(bool(window) == (i % _SWA_PERIOD != _SWA_PERIOD - 1) for i, window in enumerate(config.windows))
    if not usual or len(windows) > 1 or not config.windows:
        raise FormatError(f"gemma3 in a GGUF file has windows of one size in all but every {_SWA_PERIOD}th layer")
    window = max(windows, default=config.context)
    return {"attention.sliding_window": window, "rope.freq_base_swa": config.rope_local_theta}


def _exaone4(config: ModelConfig) -> dict[str, Any]:
    windowed = [window > 0 for window in config.windows]
    if any(windowed) != (config.layers == EXAONE4_WINDOWED_LAYERS):
        raise FormatError(
            f"exaone4 in a GGUF file has windows where it has {EXAONE4_WINDOWED_LAYERS} layers, and nowhere else"
        )
    if not windowed:
        return {}
    return _windows(config)


def _olmo2(config: ModelConfig) -> dict[str, Any]:
    if not any(config.windows):
        return {}
    return _windows(config) | {"rope.freq_base_swa": config.rope_local_theta}


def _lfm2(config: ModelConfig) -> dict[str, Any]:
    listed = [0 if config.convolves(layer) else config.kv_heads for layer in range(config.layers)]
    return {"attention.head_count_kv": listed, "shortconv.l_cache": config.taps}


def _windows(config: ModelConfig) -> dict[str, Any]:
    """Of layers that attend to a window of one size, or to all."""
    windowed = [window > 0 for window in config.windows]
    return {"attention.sliding_window": max(config.windows), "attention.sliding_window_pattern": windowed}


def gguf_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with tensors and rotation as a GGUF file has them; one from a GGUF file is returned as is.

    Rows of q and k are put in the order that rotates neighbours, where GGUF has them so; Llama 3.1's scaling becomes a
    tensor, and kernels of convolutions are in float32.
    """
    config, scaling = checkpoint.config, checkpoint.config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        raise FormatError(
            f"longrope cannot be said in the GGUF file of a {config.architecture}, as which this one is written"
        )
    if config.rotary_dim is not None:
        raise FormatError(
            f"rotation of a part of each head cannot be said in the GGUF file of a {config.architecture}, "
            "as which this one is written"
        )
    if scaling is not None and scaling.kind == "llama3" and config.architecture not in ("llama", "exaone4"):
        raise FormatError(f"llama3's rope scaling of a {config.architecture} model cannot be said in a GGUF file")
    if checkpoint.metadata:
        return checkpoint
    tensors, permuted = dict(checkpoint.tensors), config.architecture in PERMUTED
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(CONVOLUTION):
            tensors[name] = Tensor.from_numpy(name, tensor.numpy())
    if permuted and config.rope_style == "half":
        for name, tensor in checkpoint.tensors.items():
            part = name.split(".")[2] if name.startswith("blk.") else ""
            if part in ("attn_q", "attn_k"):
                tensors[name] = _interleaved(tensor, config.heads if part == "attn_q" else config.kv_heads)
    if scaling is not None and scaling.kind == "llama3":
        tensors["rope_freqs.weight"] = _rope_factors(config)
        scaling = None
    style = "interleaved" if permuted else config.rope_style
    config = replace(config, rope_style=style, rope_scaling=scaling)
    return replace(checkpoint, config=config, tensors=tensors)


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows (or biases) of each head in the order 0, d/2, 1, d/2 + 1 …: pairs that rotate together become neighbours."""
    rows = tensor.data.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return replace(tensor, data=np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1))


def _rope_factors(config: ModelConfig) -> Tensor:
    """What each frequency of llama3's scaling is divided by: GGUF's rope_freqs."""
    plain = frequencies(config.head_dim, config.rope_theta)
    scaled = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return Tensor.from_numpy("rope_freqs.weight", (plain / scaled).astype(np.float32))
