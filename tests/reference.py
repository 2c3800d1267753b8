"""The independent reference of the model tests: transformers in float32, eager attention, one thread.

Checkpoints are read by the gguf package and transformers, never by our readers: what agrees with this is right
about the file format, the renaming, the plan and the arithmetic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    Exaone4Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.initialization import no_init_weights

from gguf_peer import peer

torch.set_num_threads(1)

PARTS = {  # the middle of a GGUF name → the middle of a transformers name
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",  # gemma3, whose ffn_norm is renamed below
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.3,
    "beta_fast": 8.0,
}
PHI4_ROPE = {  # three quarters of heads of 16, within the original context
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.3 * i for i in range(6)],
    "long_factor": [1.0 + 2.0 * i for i in range(6)],
}
ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0}
LONGROPE = {  # of heads of 16; the original context is PHI3's
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.0 * i for i in range(8)],
}
PHI3 = {"original_max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MINICPM_ROPE = {  # of heads of 16
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "original_max_position_embeddings": SIZES["max_position_embeddings"],
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.0 * i for i in range(8)],
}
MINICPM = {"scale_emb": 6, "scale_depth": 1.4, "dim_model_base": 16}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 100.0}
GEMMA3 = {
    "num_hidden_layers": 7,  # the sixth attends to all
    "sliding_window": 5,
    "query_pre_attn_scalar": 48,
    "rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": LOCAL_ROPE},
}
GRANITE = {
    "num_hidden_layers": 3,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.7,
    "rms_norm_eps": 0.01,
    "rope_parameters": ROPE,
}
HYBRID = {
    "num_local_experts": 0,
    "shared_intermediate_size": SIZES["intermediate_size"],
    "layer_types": ["full_attention"] * 3,
    "position_embedding_type": "rope",
    "mamba_n_heads": 4,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

EXAONE4 = {  # as the small one: all layers attend to all, and are rotated
    "num_hidden_layers": 3,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 3,
    "rope_parameters": LLAMA3_ROPE,
    "tie_word_embeddings": True,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # olmo's own are beyond a tiny vocabulary
OLMO3 = {
    "num_hidden_layers": 4,  # the last attends to all
    "sliding_window": 5,
    "rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": LOCAL_ROPE},
}
LFM2 = {  # a convolution keeps half as much of a token as attention does; in lfm2_wide twice as much
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_multiple_of": 32,
    "rope_parameters": ROPE,
}
SMOLLM3 = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}  # its own are beyond a tiny vocabulary

TINY = {  # name → configuration of a tiny model
    "llama": lambda: LlamaConfig(**SIZES, num_hidden_layers=2, rope_parameters=ROPE),
    "llama3": lambda: LlamaConfig(**SIZES, num_hidden_layers=3, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES | {"head_dim": 16}, num_hidden_layers=2, rope_parameters=ROPE),
    "qwen3": lambda: Qwen3Config(**SIZES, num_hidden_layers=2, rope_parameters=ROPE, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **GEMMA3),
    "mistral": lambda: MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=None, rope_parameters=YARN_ROPE),
    "phi3": lambda: Phi3Config(**SIZES | {"head_dim": 16}, **PHI3, num_hidden_layers=2, rope_parameters=ROPE),
    "phi4_mini": lambda: Phi3Config(**SIZES | {"head_dim": 16}, **PHI3, num_hidden_layers=2, rope_parameters=PHI4_ROPE),
    "granite": lambda: GraniteConfig(**SIZES | {"head_dim": 16}, **GRANITE, tie_word_embeddings=True),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(**SIZES | {"head_dim": 16}, **GRANITE, **HYBRID),
    "smollm3": lambda: SmolLM3Config(**SIZES, **SMOLLM3, num_hidden_layers=5, rope_parameters=ROPE),
    "ernie4_5": lambda: Ernie4_5Config(**SIZES, num_hidden_layers=2, rope_parameters=ROPE),
    "gemma": lambda: GemmaConfig(**SIZES, num_hidden_layers=2, rope_parameters=ROPE),
    "exaone4": lambda: Exaone4Config(**SIZES, **EXAONE4),
    "hunyuan": lambda: HunYuanDenseV1Config(**SIZES, num_hidden_layers=2, rope_parameters=ALPHA_ROPE),
    "olmo2": lambda: Olmo2Config(**SIZES, **SPECIAL, num_hidden_layers=2, rope_parameters=ROPE),
    "olmo3": lambda: Olmo3Config(**SIZES, **SPECIAL, **OLMO3),
    "lfm2": lambda: Lfm2Config(**SIZES, **SPECIAL, **LFM2),
    "lfm2_wide": lambda: Lfm2Config(**SIZES | {"head_dim": 16, "num_key_value_heads": 1}, **SPECIAL, **LFM2),
    "gpt2": lambda: GPT2Config(**GPT2),
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@cache
def reference_model(path: Path) -> Any:
    """A GGUF file's model (llama, qwen2 or gemma3) in transformers, holding the file's dequantised weights."""
    reader = peer(path)
    config = _config(reader)
    state = {
        _name(tensor.name, config.model_type): torch.from_numpy(_values(tensor, config)) for tensor in reader.tensors
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(state, assign=True)
    return model.eval()


@lru_cache(maxsize=3)
def real_reference(path: Path) -> Any:
    """The same of a catalogue's model, made once for all tests: their packages take up to 15 seconds for it."""
    return reference_model(path)


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model of TINY."""
    return random_model(TINY[name](), seed)


def random_model(config: Any, seed: int = 0) -> Any:
    """A model whose every parameter matters: random norms and biases too, activations of order one."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, values in model.named_parameters():
            noise = torch.randn(values.shape, generator=generator)
            is_norm = "norm" in key or re.search(r"ln_\w\.weight", key)
            if is_norm and key.endswith("weight"):
                values.add_(0.3 * noise)  # around what it starts from: one, or zero for gemma's
            else:
                values.copy_(noise * (0.3 if values.ndim == 1 else 1.5 / values.shape[1] ** 0.5))
    return model.eval()


def minicpm(path: Path, tied: bool = False, rope: Mapping[str, Any] = ROPE) -> Any:
    """Writes a folder as openbmb publishes them, and returns a llama of two layers that has its scales in its weights.

    The formulas are those of openbmb's modeling_minicpm.py.
    """
    sizes = SIZES | {"head_dim": 16, "num_hidden_layers": 2}
    model = random_model(LlamaConfig(**sizes, rope_parameters=dict(rope), tie_word_embeddings=tied))
    model.save_pretrained(path)
    values = json.loads((path / "config.json").read_text()) | MINICPM | {"architectures": ["MiniCPMForCausalLM"]}
    for key in ("model_type", "head_dim", *(["tie_word_embeddings"] if tied else [])):
        del values[key]  # as there
    (path / "config.json").write_text(json.dumps(values))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * (16 / 64))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(1.4 / 2**0.5)
    return model


def folder_model(path: Path) -> Any:
    """A Hugging Face folder's model, as transformers itself reads it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def next_logits(model: Any, ids: list[int]) -> np.ndarray:
    """[T, vocab] float32: row t scores the token after ids[t]."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def greedy(model: Any, ids: list[int], n: int) -> tuple[list[int], list[float]]:
    """The n most likely tokens in a row, end-of-sequence or not, and by how much logit each beat the second best."""
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end-of-sequence token
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2)
    tokens = out.sequences[0, len(ids) :].tolist()
    assert tokens == best.indices[:, 0].tolist(), "generation applied more than argmax"
    return tokens, (best.values[:, 0] - best.values[:, 1]).tolist()


def _config(reader: gguf.GGUFReader) -> Any:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    names = {tensor.name for tensor in reader.tensors}
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}

    def value(name: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{name}", default)

    rope = {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)}
    common = {
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in names,
    }
    if architecture == "llama":
        return LlamaConfig(**common, rope_parameters=rope)
    if architecture == "qwen2":
        return Qwen2Config(**common, rope_parameters=rope)
    if architecture != "gemma3":
        raise ValueError(f"no reference for {architecture}")
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return Gemma3TextConfig(
        **common,
        head_dim=value("attention.key_length"),
        query_pre_attn_scalar=value("attention.key_length"),
        sliding_window=value("attention.sliding_window"),
        rope_parameters={"full_attention": rope, "sliding_attention": local},
    )


def _name(name: str, model_type: str) -> str:
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, middle, kind = found.groups()
        renamed = model_type == "gemma3_text" and middle == "ffn_norm"
        part = "pre_feedforward_layernorm" if renamed else PARTS[middle]
        return f"model.layers.{layer}.{part}.{kind}"
    middle, kind = name.rsplit(".", 1)
    return f"{WHOLE[middle]}.{kind}"


def _values(tensor: Any, config: Any) -> np.ndarray:
    values = np.require(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32, "W")
    if config.model_type == "gemma3_text" and "norm" in tensor.name:
        return values - 1  # the file includes the +1 that transformers adds itself
    if config.model_type == "llama" and re.search(r"attn_[qk]\.", tensor.name):
        # The file interleaves the two halves of each head.
        heads = config.num_attention_heads if "attn_q." in tensor.name else config.num_key_value_heads
        return np.ascontiguousarray(values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2)).reshape(values.shape)
    return values
