"""LoRA adapters (Hu et al., 2021) in peft's format or llama.cpp's: pairs of matrices under GGUF's names.

A product's output changes by scale · B (A x). What an adapter asks for beyond that is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.models.config import PERMUTED, ModelConfig
from millis.models.gguf import parse_gguf
from millis.models.huggingface import gguf_name
from millis.models.mapped import map_file, read_json
from millis.models.parts import part_names, split
from millis.models.safetensors import read_safetensors
from millis.models.tensor import Tensor
from millis.models.tensors_expected import expected_shapes
from millis.types import FormatError, ModelError

MOST_RANK: int = _native.MOST_RANK
_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_PEFT = re.compile(r"(.+)\.lora_([AB])\.weight")
_GGUF = re.compile(r"(blk\..+\.weight)\.lora_([ab])")

# What an adapter's configuration may say without changing how it is applied.
_REMARKS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision",
    "target_modules", "use_rslora",
}  # fmt: skip
# Settings with values other than "not set" that change nothing either.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # those that leave the model's own weights alone
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What is added to one weight: scale · b · a."""

    weight: str
    a: NDArray[np.float32]  # [rank, inputs]
    b: NDArray[np.float32]  # [outputs, rank], in the order of the checkpoint's rows
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter as it was read, every size checked against its model."""

    path: Path
    rank: int  # the largest
    pairs: tuple[Pair, ...]


def read_adapter(path: Path, config: ModelConfig) -> AdapterWeights:
    """A folder as peft saves it, or a GGUF file, for the model of `config`.

    ModelError: nothing there. FormatError names what is malformed, does not fit the model, or is not supported.
    """
    path = Path(path)
    try:
        if path.is_file():
            pairs = _from_gguf(path, config)
        elif (path / "adapter_config.json").is_file():
            pairs = _from_folder(path, config)
        else:
            raise ModelError(f"there is no adapter at {path}; give a folder with adapter_config.json or a .gguf file")
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None
    if not pairs:
        raise FormatError(f"{path.name}: the adapter changes no weight")
    return AdapterWeights(path, max(len(pair.a) for pair in pairs), pairs)


def _from_folder(path: Path, config: ModelConfig) -> tuple[Pair, ...]:
    rank, scale, targets = _settings(read_json(path / "adapter_config.json", _MAX_CONFIG_BYTES))
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise FormatError(f"{file.name} is missing; save the adapter as safetensors (Millis reads no pickles)")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(file).items():
        match = _PEFT.fullmatch(name)
        if match is None or not name.startswith(_PREFIX):
            raise FormatError(f"the tensor {name!r} is no lora_A or lora_B of a weight: not supported")
        module, half = match[1].removeprefix(_PREFIX), match[2]
        if targets is not None and not any(module == t or module.endswith(f".{t}") for t in targets):
            raise FormatError(f"the tensor {name!r} belongs to none of the target_modules")
        weight = f"{module}.weight"
        names = part_names(weight)
        # Of a matrix that is run in parts, each has its own rows of B, and all have the same A.
        several = half == "B" and len(names) > 1
        values = split(replace(tensor, name=weight), config) if several else [tensor] * len(names)
        for part, value in zip(names, values, strict=True):
            both = halves.setdefault(gguf_name(part, config.architecture) or name, {})
            if half in both:
                raise FormatError(f"the adapter changes {part} twice, alone and as a part of another matrix")
            both[half] = value
    pairs = _pairs(halves, config, lambda _: scale)
    for pair in pairs:
        if len(pair.a) != rank:
            raise FormatError(f"{pair.weight} has rank {len(pair.a)}; adapter_config.json says r = {rank}")
    permuted = config.architecture in PERMUTED and config.rope_style == "interleaved"
    return tuple(_permuted(pair, config, 1) if permuted else pair for pair in pairs)


def _settings(settings: Mapping[str, Any]) -> tuple[int, float, list[str] | None]:
    """Rank, scale and, where they are listed, the modules that may change. Raises FormatError."""
    if settings.get("peft_type") != "LORA":
        raise FormatError(f"peft_type {settings.get('peft_type')!r:.40} is not supported; Millis reads LORA")
    for name, value in settings.items():
        unset = value is None or value is False or value in ([], {}, "")
        if name not in _REMARKS and not unset and value not in _PLAIN.get(name, ()):
            raise FormatError(f"adapter_config.json: {name} = {value!r:.60} is not supported")
    rank, alpha, targets = settings.get("r"), settings.get("lora_alpha"), settings.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise FormatError(f"adapter_config.json: r must lie in [1, {MOST_RANK}], not {rank!r:.40}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(f"adapter_config.json: lora_alpha must be a number, not {alpha!r:.40}")
    if not isinstance(settings.get("use_rslora", False), bool):
        raise FormatError("adapter_config.json: use_rslora must be true or false")
    if isinstance(targets, str):
        targets = None  # a pattern; the tensors say what it matched
    elif not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        raise FormatError("adapter_config.json: target_modules must list modules")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), targets


def _from_gguf(path: Path, config: ModelConfig) -> tuple[Pair, ...]:
    """llama.cpp's format: rows of q and k lie as in that program's own models."""
    metadata, tensors = parse_gguf(map_file(path))
    for key, wanted in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", config.architecture),
    ):
        if metadata.get(key) != wanted:
            raise FormatError(f"{key} is {metadata.get(key)!r:.40}, not {wanted!r}: no adapter of this model")
    alpha = metadata.get("adapter.lora.alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(f"adapter.lora.alpha must be a number, not {alpha!r:.40}")
    if other := sorted(
        key for key in metadata if key.startswith("adapter.") and key not in ("adapter.type", "adapter.lora.alpha")
    ):
        raise FormatError(f"{other[0]} is not supported")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _GGUF.fullmatch(name)
        if match is None:
            raise FormatError(f"the tensor {name!r} is no lora_a or lora_b of a layer's weight: not supported")
        halves.setdefault(match[1], {})[match[2].upper()] = tensor
    pairs = _pairs(halves, config, lambda rank: alpha / rank)
    permuted = config.architecture in PERMUTED and config.rope_style == "half"
    return tuple(_permuted(pair, config, -1) if permuted else pair for pair in pairs)


def _pairs(halves: Mapping[str, Mapping[str, Tensor]], config: ModelConfig, scale: Any) -> list[Pair]:
    """Both matrices of each weight, checked."""
    shapes = expected_shapes(config)
    found = []
    for weight, both in halves.items():
        shape = shapes.get(weight)
        if shape is None or len(shape) != 2 or not weight.startswith("blk."):
            raise FormatError(f"an adapter of {weight} is not supported; Millis applies those of a layer's matrices")
        if set(both) != {"A", "B"}:
            raise FormatError(f"{weight} has a lora_{next(iter(both))} alone; A and B belong together")
        a, b = both["A"], both["B"]
        rank = a.shape[0] if len(a.shape) == 2 else 0
        if not 1 <= rank <= MOST_RANK:
            raise FormatError(f"{weight}: the rank must lie in [1, {MOST_RANK}], not {rank}")
        if a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
            raise FormatError(
                f"{weight} is {_text(shape)}; its adapter's A {_text(a.shape)} and B {_text(b.shape)} do not fit"
            )
        values = a.numpy(), b.numpy()
        if not all(np.isfinite(value).all() for value in values):
            raise FormatError(f"the adapter of {weight} holds a value that is no finite number")
        found.append(Pair(weight, *values, float(scale(rank))))
    return found


def _text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"


def _permuted(pair: Pair, config: ModelConfig, way: int) -> Pair:
    """The rows of B as GGUF orders those of q and k (way 1), or as transformers does (−1).

    Within a head, GGUF's row 2i + j is row i + j · head_dim / 2 (llama.cpp, convert_hf_to_gguf).
    """
    if not pair.weight.endswith(("attn_q.weight", "attn_k.weight")):
        return pair
    outputs, rank = pair.b.shape
    split = (-1, 2, config.head_dim // 2, rank) if way == 1 else (-1, config.head_dim // 2, 2, rank)
    rows = pair.b.reshape(split).swapaxes(1, 2).reshape(outputs, rank)
    return Pair(pair.weight, pair.a, np.ascontiguousarray(rows), pair.scale)
