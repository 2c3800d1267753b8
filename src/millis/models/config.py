"""What a checkpoint says of its architecture, in one form for GGUF files and Hugging Face folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal[
    "llama", "qwen2", "qwen3", "gemma", "gemma3", "granite", "smollm3", "ernie4_5", "exaone4",
    "hunyuan-dense", "olmo2", "lfm2", "gpt2", "bert", "modernbert", "t5", "marian",
]  # fmt: skip
Pooling = Literal["mean", "first", "last"]  # of a text's hidden states; the first is bert's, the last a decoder's
# Architectures whose q and k rows GGUF stores in the order that rotates neighbours, transformers in that of halves.
PERMUTED: tuple[Architecture, ...] = ("llama", "granite", "smollm3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_context: int = 8192  # all but linear
    beta_fast: float = 32.0  # yarn only
    beta_slow: float = 1.0  # yarn only
    attention_factor: float = 1.0  # yarn and longrope: by which cosines and sines are multiplied
    # longrope only: what each frequency is divided by, in contexts up to the original one and in longer ones.
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a classifier was trained to tell."""

    labels: tuple[str, ...]
    problem: Literal["single_label", "multi_label", "regression"]
    # Between its two matrices, of which a decoder's has one.
    activation: Literal["tanh", "relu", "gelu", "gelu_tanh"] = "tanh"
    pooling: Literal["first", "mean"] = "first"  # of what it reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Sizes of an encoder-decoder model's encoder."""

    layers: int
    heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a model."""

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
    # "interleaved" rotates (2i, 2i+1), "half" rotates (i, i + head_dim/2). GGUF stores q and k of PERMUTED
    # architectures for the former, which ernie4_5 always uses; all else uses the latter.
    rope_style: Literal["half", "interleaved"] = "half"
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float = 10000.0  # base of windowed layers (gemma3, olmo2, modernbert)
    rotary_dim: int | None = None  # how many coordinates of a head are rotated, the first ones; None: all
    rotated: tuple[bool, ...] = ()  # per layer: whether q and k are rotated at all; () means in all layers
    windows: tuple[int, ...] = ()  # per layer: positions attended, 0 for all; () means all layers attend to all
    convolved: tuple[bool, ...] = ()  # per layer: whether a convolution takes attention's place; () means in none
    taps: int = 0  # of each column's convolution (lfm2)
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    attention_bias: bool = False
    embedding_scale: float = 1.0  # (gemma, granite, marian)
    residual_scale: float = 1.0  # of what a layer adds to its input (granite)
    logit_scale: float = 1.0  # by which logits are divided (granite)
    # Models that read and write nothing: encoders, and decoders trained for embeddings or labels.
    reads: bool = False
    both_ways: bool = False  # whether tokens see those behind them, too
    token_types: int = 0  # rows of the table of token types (bert)
    pooling: Pooling = "mean"  # how an embedding is made of a text's hidden states
    dense: int = 0  # width of what a last matrix makes of an embedding, 0 without one (gemma3)
    text_tokens: int | None = None  # longest text it was trained on, where that is less than its context
    head: Head | None = None
    # Encoder-decoder models only, whose decoder's sizes stand above.
    encoder: Stack | None = None
    gated: bool = False  # the feed-forward networks (t5)
    buckets: int = 32  # of distances between tokens, each with a bias of its own (t5)
    farthest: int = 128  # distances from here on share a bucket (t5)

    @property
    def rotated_dim(self) -> int:
        """How many coordinates of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def norms_heads(self) -> bool:
        """Whether each head of q and k has a norm of its own."""
        return self.architecture in ("qwen3", "gemma3", "exaone4", "hunyuan-dense", "lfm2")

    @property
    def output_norm(self) -> str:
        """The last norm's weight, by the name that GGUF files have for it."""
        return "token_embd_norm.weight" if self.architecture == "lfm2" else "output_norm.weight"

    def convolves(self, layer: int) -> bool:
        """Whether a convolution takes attention's place in a layer."""
        return bool(self.convolved) and self.convolved[layer]
