"""What a checkpoint says of its architecture, in one form for GGUF files and Hugging Face folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["llama", "qwen2", "qwen3", "gemma3", "gpt2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_context: int = 8192  # llama3 only


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder-only model."""

    architecture: Architecture
    name: str = ""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # tokens the model was made for
    norm_eps: float
    rope_theta: float = 10000.0
    # "interleaved" rotates (2i, 2i+1), "half" rotates (i, i + head_dim/2). GGUF stores llama's q and k permuted
    # for the former; Hugging Face folders and every other architecture use the latter.
    rope_style: Literal["half", "interleaved"] = "half"
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float = 10000.0  # base of windowed layers (gemma3)
    windows: tuple[int, ...] = ()  # per layer: positions attended, 0 for all; () means all layers attend to all
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_bias: bool = False
