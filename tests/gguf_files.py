"""Small valid GGUF files for tests, written by the gguf package: one tiny random model per architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, CONTEXT, LAYERS = 64, 4, 2, 16, 96, 50, 32, 2
ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "gemma", "gemma3", "granite", "smollm3", "ernie4_5", "exaone4", "hunyuan-dense",
    "olmo2", "lfm2", "gpt2",
)  # fmt: skip
DROP = object()  # as the value of a key or tensor: leave it out


def settings(architecture: str) -> dict[str, Any]:
    """Key-values of the tiny model; a key that starts with a dot is the architecture's."""
    gpt2 = architecture == "gpt2"
    found: dict[str, Any] = {
        "general.name": "tiny",
        ".block_count": LAYERS,
        ".context_length": CONTEXT,
        ".embedding_length": HIDDEN,
        ".feed_forward_length": FFN,
        ".attention.head_count": HEADS,
        ".attention.layer_norm_epsilon" if gpt2 else ".attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token {index} é" for index in range(VOCAB)],
        "tokenizer.ggml.scores": [float(-index) for index in range(VOCAB)],
        "tokenizer.ggml.token_type": [1] * VOCAB,
        "tokenizer.ggml.add_bos_token": False,
    }
    if not gpt2:
        found |= {".attention.head_count_kv": KV_HEADS, ".rope.freq_base": 5e4}
    if architecture == "gemma3":
        found |= {".attention.key_length": HEAD_DIM, ".attention.sliding_window": 8}
    if architecture == "lfm2":
        found |= {".attention.head_count_kv": [0, KV_HEADS], ".shortconv.l_cache": 3}
    if architecture in ("granite", "minicpm"):
        found |= {".embedding_scale": 6.0, ".residual_scale": 0.25, ".attention.scale": 0.125, ".logit_scale": 4.0}
    return found


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the tiny model."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "attn_output.weight": (HIDDEN, q),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_up.weight": (FFN, HIDDEN),
        "ffn_down.weight": (HIDDEN, FFN),
    }
    outside: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if architecture == "gpt2":
        outside |= {"position_embd.weight": (CONTEXT, HIDDEN), "output_norm.bias": (HIDDEN,)}
        layer |= {"attn_qkv.weight": (3 * HIDDEN, HIDDEN)}
        layer |= {name.replace("weight", "bias"): (shape[0],) for name, shape in layer.items()}
    else:
        layer |= {"attn_q.weight": (q, HIDDEN), "attn_k.weight": (kv, HIDDEN), "attn_v.weight": (kv, HIDDEN)}
        layer |= {"ffn_gate.weight": (FFN, HIDDEN)}
    if architecture == "phi3":
        layer = {
            name: shape for name, shape in layer.items() if name[:6] not in ("attn_q", "attn_k", "attn_v", "ffn_ga")
        }
        layer |= {"attn_qkv.weight": (q + 2 * kv, HIDDEN), "ffn_up.weight": (2 * FFN, HIDDEN)}
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if architecture in ("qwen3", "gemma3", "exaone4", "hunyuan-dense", "lfm2"):
        layer |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
    if architecture == "olmo2":
        layer |= {"attn_q_norm.weight": (q,), "attn_k_norm.weight": (kv,)}
    if architecture in ("gemma3", "exaone4", "olmo2"):
        layer |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
    if architecture in ("exaone4", "olmo2"):
        del layer["attn_norm.weight"], layer["ffn_norm.weight"]
    if architecture == "lfm2":
        outside["token_embd_norm.weight"] = outside.pop("output_norm.weight")
    found = {f"blk.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    if architecture == "lfm2":  # the first layer is a convolution
        found = {name: shape for name, shape in found.items() if not name.startswith("blk.0.attn_") or "norm" in name}
        del found["blk.0.attn_q_norm.weight"], found["blk.0.attn_k_norm.weight"]
        for part, shape in (("in_proj", (3 * HIDDEN, HIDDEN)), ("conv", (HIDDEN, 3)), ("out_proj", (HIDDEN, HIDDEN))):
            found[f"blk.0.shortconv.{part}.weight"] = shape
    return outside | found


def write_tiny(
    path: Path,
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes the tiny model with `keys` and `tensors` (name → shape, or values) amended; returns the values written."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (settings(architecture) | dict(keys or {})).items():
        if value is not DROP:
            _add(writer, architecture + key if key.startswith(".") else key, value)
    rng = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    for name, shape in (shapes(architecture) | dict(tensors or {})).items():
        if shape is DROP:
            continue
        given = shape if isinstance(shape, np.ndarray) else rng.normal(0, 0.1, shape)
        values[name] = given.astype(np.float32)
        if values[name].ndim == 2 and name.startswith("blk.") and values[name].shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values[name], gguf.GGMLQuantizationType.Q8_0)
            values[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":  # the writer has put one already
        writer.kv_data[0][key].value = value
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
