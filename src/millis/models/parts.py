"""Matrices that files keep as one, as the parts that plans run: gate and up; q, k and v."""

from __future__ import annotations

from collections.abc import Mapping

from millis.models.config import ModelConfig
from millis.models.tensor import Tensor
from millis.types import FormatError

# How the name of a whole ends → how those of its parts do: two for gate and up, three for q, k and v.
_FOLDER = {
    "shared_mlp.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
}
_GGUF = {
    "ffn_up.weight": ("ffn_gate.weight", "ffn_up.weight"),
    "attn_qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
}


def folder_parts(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, each part a view of its whole. FormatError: rows that do not fit."""
    return _parted(tensors, config, _FOLDER)


def gguf_parts(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same under GGUF's names, without the factors of phi3's rotation, which are in the configuration."""
    return _parted({name: t for name, t in tensors.items() if not name.startswith("rope_factors_")}, config, _GGUF)


def part_names(name: str) -> list[str]:
    """The names of what a folder's tensor of this name holds: of its parts, or its own."""
    end = _end(name, _FOLDER)
    return [name] if end is None else [name.removesuffix(end) + part for part in _FOLDER[end]]


def split(tensor: Tensor, config: ModelConfig, wholes: Mapping[str, tuple[str, ...]] = _FOLDER) -> list[Tensor]:
    """The parts of a tensor that has some. FormatError: it has not as many rows as they have together."""
    end = _end(tensor.name, wholes) or ""
    parts, kv = wholes[end], config.kv_heads * config.head_dim
    rows = (config.ffn, config.ffn) if len(parts) == 2 else (config.heads * config.head_dim, kv, kv)
    if len(tensor.shape) != 2 or tensor.shape[0] != sum(rows):
        raise FormatError(f"the tensor {tensor.name!r} must be a matrix of {sum(rows)} rows, not {tensor.shape}")
    row_bytes, at, found = tensor.nbytes // sum(rows), 0, []
    for part, count in zip(parts, rows, strict=True):
        data = tensor.data[at : at + count * row_bytes]
        found.append(Tensor(tensor.name.removesuffix(end) + part, tensor.type, (count, tensor.shape[1]), data))
        at += count * row_bytes
    return found


def _end(name: str, wholes: Mapping[str, tuple[str, ...]]) -> str | None:
    return next((end for end in wholes if name.endswith(f".{end}")), None)


def _parted(
    tensors: Mapping[str, Tensor], config: ModelConfig, wholes: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for part in split(tensor, config, wholes) if _end(name, wholes) else [tensor]:
            if part.name in found or part.name in tensors and part.name != name:
                raise FormatError(f"the tensor {part.name!r} is there twice, alone and as a part of {name!r}")
            found[part.name] = part
    return found
