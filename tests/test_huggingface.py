"""Folders written by transformers: names, values and configurations against the model that wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from millis.models.config import ModelConfig, RopeScaling
from millis.models.huggingface import gguf_name, read_folder
from millis.models.huggingface_config import huggingface_config
from millis.models.tensor import GgmlType
from millis.types import FormatError, ModelError

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 8.0,
}
MINICPM = {"model_type": "minicpm", "scale_emb": 6, "scale_depth": 1.4, "dim_model_base": 16}
HYBRID = {
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "layer_types": ["full_attention"] * 2,
    "mamba_n_heads": 4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 8.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
}


LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "block_multiple_of": 32,
    "pad_token_id": 0,
}


def tiny(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a few thousand weights; norm weights and biases random as well."""
    torch.manual_seed(0)
    configs: dict[str, Callable[[], transformers.PretrainedConfig]] = {
        "llama": lambda: transformers.LlamaConfig(**SIZES, **changes),
        "qwen2": lambda: transformers.Qwen2Config(**SIZES, **changes),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32, **changes),
        "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, **changes),
        "mistral": lambda: transformers.MistralConfig(**SIZES, **changes),
        "phi3": lambda: transformers.Phi3Config(**SIZES, pad_token_id=0, **changes),
        "granite": lambda: transformers.GraniteConfig(**SIZES, **GRANITE, **changes),
        "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(**SIZES, **HYBRID, **changes),
        "smollm3": lambda: transformers.SmolLM3Config(**SIZES, pad_token_id=0, **changes),
        "ernie4_5": lambda: transformers.Ernie4_5Config(**SIZES, head_dim=32, **changes),
        "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=32, **changes),
        "exaone4": lambda: transformers.Exaone4Config(**SIZES, **changes),
        "olmo2": lambda: transformers.Olmo2Config(**SIZES, pad_token_id=0, **changes),
        "olmo3": lambda: transformers.Olmo3Config(**SIZES, pad_token_id=0, **changes),
        "lfm2": lambda: transformers.Lfm2Config(**SIZES, **LFM2 | changes),
        "hunyuan-dense": lambda: transformers.HunYuanDenseV1Config(**SIZES, head_dim=32, **changes),
        "gpt2": lambda: transformers.GPT2Config(**GPT2, **changes),
    }
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    return model


# Ours ← theirs, spelled out for one layer: the test must not share the table of the code it tests.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_LAYER = LAYER | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXAONE4_LAYER = {ours: name for ours, name in GEMMA3_LAYER.items() if ours not in ("attn_norm", "ffn_norm")}
LFM2_LAYER = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.out_proj",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def expected_tensors(model: transformers.PreTrainedModel, kind: str) -> dict[str, np.ndarray]:
    """What a GGUF of this model would hold, from its state_dict."""
    theirs = {name: value.float().numpy() for name, value in model.state_dict().items()}
    body, layers = ("transformer.", "h") if kind == "gpt2" else ("model.", "layers")
    outside = {"token_embd": "embed_tokens", "output_norm": "norm"}
    if kind == "gpt2":
        outside = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
    if kind == "lfm2":
        outside = {"token_embd": "embed_tokens", "token_embd_norm": "embedding_norm"}
    names = {ours: f"{body}{name}" for ours, name in outside.items()}
    layers_of = {"gpt2": GPT2_LAYER, "gemma3": GEMMA3_LAYER, "exaone4": EXAONE4_LAYER, "olmo2": EXAONE4_LAYER}
    layer = (layers_of | {"lfm2": LFM2_LAYER}).get(kind, LAYER)
    if kind == "hunyuan-dense":
        layer = layer | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
    if kind == "qwen3":
        layer = layer | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    for index in range(model.config.num_hidden_layers):
        names |= {f"blk.{index}.{ours}": f"{body}{layers}.{index}.{name}" for ours, name in layer.items()}
    if not model.config.tie_word_embeddings:
        names["output"] = "lm_head"
    found = {}
    for ours, name in names.items():
        for end in ("weight", "bias"):
            if f"{name}.{end}" in theirs:
                value = theirs[f"{name}.{end}"]
                value = value.T if kind == "gpt2" and value.ndim == 2 and ours.startswith("blk.") else value
                value = value[:, 0] if value.ndim == 3 else value
                found[f"{ours}.{end}"] = value + 1 if kind in ("gemma", "gemma3") and ours.endswith("norm") else value
    return found


def assert_same(folder: Path, model: transformers.PreTrainedModel, kind: str) -> ModelConfig:
    checkpoint = read_folder(folder)
    expected = expected_tensors(model, kind)
    assert set(checkpoint.tensors) == set(expected)
    for name, values in expected.items():
        assert checkpoint.tensors[name].name == name and checkpoint.tensors[name].shape == values.shape
        assert np.array_equal(checkpoint.tensors[name].numpy(), values), name
    assert checkpoint.path == folder and checkpoint.metadata == {}
    return checkpoint.config


KINDS = [
    "llama", "qwen2", "qwen3", "gemma", "gemma3", "granite", "smollm3", "ernie4_5", "exaone4", "hunyuan-dense",
    "olmo2", "lfm2", "gpt2",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["single", "sharded"])
def test_tensors_equal_the_state_dict(tmp_path: Path, kind: str, shard: str) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    config = assert_same(tmp_path, model, kind)
    assert config.architecture == kind and config.name == tmp_path.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind).to(dtype)
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, model, kind)
    matrix = "blk.0.ffn_up.weight"
    assert read_folder(tmp_path).tensors[matrix].type == (GgmlType.F16 if dtype == torch.float16 else GgmlType.BF16)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", True), ("qwen3", True), ("gemma3", False)])
def test_tied_and_untied(tmp_path: Path, kind: str, tied: bool) -> None:
    model = tiny(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, model, kind)
    assert ("output.weight" in read_folder(tmp_path).tensors) != tied


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_bias_that_no_plan_adds_is_refused(tmp_path: Path, kind: str) -> None:
    tiny(kind, attention_bias=True).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="'blk.0.attn_output.bias' has no place in a"):
        read_folder(tmp_path)


def saved(folder: Path, kind: str, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """A saved tiny model with its config.json edited."""
    tiny(kind).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sizes_of_llama(tmp_path: Path) -> None:
    config = read_folder(saved(tmp_path, "llama")).config
    assert config == ModelConfig(
        architecture="llama",
        name=tmp_path.name,
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=96,
        vocab=100,
        context=64,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_style="half",
    )


def test_sizes_of_the_others(tmp_path: Path) -> None:
    qwen2 = read_folder(saved(tmp_path / "a", "qwen2")).config
    assert qwen2.attention_bias and qwen2.windows == ()
    assert read_folder(saved(tmp_path / "b", "qwen3")).config.head_dim == 32
    gpt2 = read_folder(saved(tmp_path / "c", "gpt2")).config
    assert (gpt2.ffn, gpt2.context, gpt2.kv_heads, gpt2.norm_eps) == (256, 32, 4, 1e-5)
    assert gpt2.activation == "gelu_tanh"


def test_gemma3(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = tiny("gemma3", layer_types=kinds, query_pre_attn_scalar=64)
    model.save_pretrained(tmp_path)
    config = read_folder(tmp_path).config
    assert config.windows == (8, 0) and config.attention_scale == 1 / 8 and config.activation == "gelu_tanh"
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)


def test_gemma3_of_transformers_4(tmp_path: Path) -> None:
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    config = read_folder(saved(tmp_path, "gemma3", ("rope_parameters", "layer_types"), **old)).config
    assert (config.rope_theta, config.rope_local_theta) == (5e5, 2e4)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0) and config.windows == (8, 0)


def test_gemma3_inside_a_multimodal_folder(tmp_path: Path) -> None:
    model = tiny("gemma3")
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    for body, tower in (("model.language_model.", "model.vision_tower."), ("language_model.model.", "vision_tower.")):
        weights = {body + name: value for name, value in model.model.state_dict().items()}
        save_file({**weights, f"{tower}embeddings.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
        assert_same(tmp_path, model, "gemma3")


def test_gemma3_defaults_of_the_published_multimodal_files() -> None:
    """Their text_config leaves out whatever transformers' Gemma3TextConfig assumes."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config, tied = huggingface_config({"model_type": "gemma3", "text_config": text}, "gemma")
    theirs = transformers.Gemma3TextConfig(**text)
    assert (config.heads, config.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (config.head_dim, config.vocab) == (theirs.head_dim, theirs.vocab_size)
    assert (config.context, config.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert config.rope_theta == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert config.rope_local_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    assert [window == 0 for window in config.windows] == [kind == "full_attention" for kind in theirs.layer_types]
    assert tied == theirs.tie_word_embeddings


def rope_forms(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """version 5's form, version 4's, and the oldest."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    kind = {"type": scaling["rope_type"]} | {key: value for key, value in scaling.items() if key != "rope_type"}
    theta = {"rope_theta": parameters["rope_theta"]}
    return [{"rope_parameters": parameters}, theta | {"rope_scaling": scaling}, theta | {"rope_scaling": kind}]


@pytest.mark.parametrize("form", [0, 1, 2], ids=["rope_parameters", "rope_scaling", "oldest"])
def test_rope_scaling(tmp_path: Path, form: int) -> None:
    llama3 = rope_forms({"rope_theta": 5e5, **LLAMA3_ROPE})[form]
    config = read_folder(saved(tmp_path / "a", "llama", ("rope_parameters",), **llama3)).config
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_context=32)
    linear = rope_forms({"rope_theta": 2e4, "rope_type": "linear", "factor": 4.0})[form]
    config = read_folder(saved(tmp_path / "b", "qwen2", ("rope_parameters",), **linear)).config
    assert config.rope_theta == 2e4 and config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("form", [0, 1, 2], ids=["rope_parameters", "rope_scaling", "oldest"])
def test_longrope(name: str, form: int, tmp_path: Path) -> None:
    changes = rope_forms(LONGROPE | {"rope_type": name})[form] | {"original_max_position_embeddings": 32}
    config = read_folder(saved(tmp_path, "phi3", ("rope_parameters",), **changes)).config
    short, long = (1.0,) * 8, tuple(2.0 + i for i in range(8))
    assert config.architecture == "llama" and config.rope_scaling == RopeScaling(
        kind="longrope",
        factor=2.0,
        original_context=32,  # what stands beside the scaling comes first
        attention_factor=math.sqrt(1 + math.log(2) / math.log(32)),
        short_factors=short,
        long_factors=long,
    )


def test_the_part_of_phi3s_heads_that_is_rotated(tmp_path: Path) -> None:
    """As in published files of Phi-4-mini and as transformers 5 writes them."""
    published = {"partial_rotary_factor": 0.75, "rope_theta": 1e4}
    assert read_folder(saved(tmp_path / "old", "phi3", ("rope_parameters",), **published)).config.rotary_dim == 12
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert read_folder(saved(tmp_path / "new", "phi3", **new, partial_rotary_factor=0.75)).config.rotary_dim == 8
    assert read_folder(saved(tmp_path / "all", "phi3")).config.rotary_dim is None


def test_the_matrices_of_phi3(tmp_path: Path) -> None:
    model = tiny("phi3", sliding_window=16)
    model.save_pretrained(tmp_path)
    checkpoint, layer = read_folder(tmp_path), model.model.layers[1]
    assert checkpoint.config.windows == (16, 16) and checkpoint.config.rope_style == "half"
    q, k, v, gate, up = (
        checkpoint.tensors[f"blk.1.{name}.weight"].numpy()
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    )
    assert (q.shape, k.shape, gate.shape) == ((64, 64), (32, 64), (96, 64))
    assert np.array_equal(np.vstack([q, k, v]), layer.self_attn.qkv_proj.weight.detach().numpy())
    assert np.array_equal(np.vstack([gate, up]), layer.mlp.gate_up_proj.weight.detach().numpy())


def test_a_part_that_is_there_twice(tmp_path: Path) -> None:
    weights = dict(tiny("phi3").state_dict())
    tiny("phi3").save_pretrained(tmp_path)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="q_proj.weight' is there twice, alone and as a part of"):
        read_folder(tmp_path)


def test_windows_of_qwen2(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    changes = {"use_sliding_window": True, "sliding_window": 16, "layer_types": kinds}
    assert read_folder(saved(tmp_path, "qwen2", **changes)).config.windows == (0, 16)


def test_the_window_of_mistral_is_that_of_all_layers(tmp_path: Path) -> None:
    assert read_folder(saved(tmp_path / "a", "mistral", sliding_window=16)).config.windows == (16, 16)
    assert read_folder(saved(tmp_path / "b", "mistral", sliding_window=None)).config.windows == ()
    config = read_folder(saved(tmp_path / "c", "mistral", ("sliding_window",), max_position_embeddings=8192)).config
    assert config.windows == (4096, 4096) and config.architecture == "llama"  # transformers' default
    assert (
        read_folder(saved(tmp_path / "d", "mistral", sliding_window=64)).config.windows == ()
    )  # as long as the context


def test_scales_of_granite(tmp_path: Path) -> None:
    for kind in ("granite", "granitemoehybrid"):
        config = read_folder(saved(tmp_path / kind, kind, **GRANITE, position_embedding_type="rope")).config
        assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (12.0, 0.22, 8.0)
        assert config.attention_scale == 0.1 and config.ffn == 96 and config.rotated == ()
    assert read_folder(saved(tmp_path / "nope", "granitemoehybrid")).config.rotated == (False, False)


def test_scales_of_minicpm(tmp_path: Path) -> None:
    config = read_folder(saved(tmp_path / "a", "llama", **MINICPM)).config
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (6.0, 1.4 / math.sqrt(2), 4.0)
    config = read_folder(saved(tmp_path / "b", "llama", model_type="minicpm")).config
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (1.0, 1 / math.sqrt(2), 64.0)


def test_an_alpha_of_hunyuan_stretches_its_base(tmp_path: Path) -> None:
    """As in published files and as transformers 5 writes them; without an alpha, dynamic would know a text's length."""
    published = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"}
    old = {"rope_parameters": None, "rope_scaling": published, "rope_theta": 1e4, "num_experts": 1, "use_cla": False}
    new = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0}}
    for name, said in (("old", old), ("new", new)):
        config = read_folder(saved(tmp_path / name, "hunyuan-dense", **said)).config
        assert config.rope_theta == pytest.approx(1e4 * 1000 ** (32 / 30)) and config.rope_scaling is None
    plain = read_folder(saved(tmp_path / "plain", "hunyuan-dense")).config
    assert plain.rope_theta == 1e4


def test_windows_and_rotation_of_olmo3(tmp_path: Path) -> None:
    """As in published files and as transformers 5 writes them: a scaling is that of layers that attend to all."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "attention_factor": 1.2}
    gone = ("rope_parameters", "layer_types")
    old = {"rope_scaling": yarn, "rope_theta": 5e5, "num_hidden_layers": 2}
    by_type = {"full_attention": yarn | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}
    new = {"rope_parameters": by_type, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    first = read_folder(saved(tmp_path / "old", "olmo3", gone, **old)).config
    assert (first.windows, first.rope_theta, first.rope_local_theta) == ((4096, 4096), 5e5, 5e5)
    second = read_folder(saved(tmp_path / "new", "olmo3", **new)).config
    assert (second.windows, second.rope_theta, second.rope_local_theta) == ((0, 8), 5e5, 1e4)
    for config in (first, second):
        assert config.architecture == "olmo2" and config.rope_scaling is not None
        assert (config.rope_scaling.kind, config.rope_scaling.attention_factor) == ("yarn", 1.2)


def test_layers_of_lfm2(tmp_path: Path) -> None:
    """As transformers writes them and as the first published files do, which name the feed-forward width otherwise."""
    new = read_folder(saved(tmp_path / "new", "lfm2")).config
    assert (new.convolved, new.taps, new.ffn) == ((True, False), 3, 64)
    gone = ("layer_types", "intermediate_size", "tie_word_embeddings", "norm_eps", "rope_parameters")
    old = {"full_attn_idxs": [1], "block_ff_dim": SIZES["intermediate_size"], "conv_dim": 64, "tie_embedding": True}
    first = read_folder(saved(tmp_path / "old", "lfm2", gone, **old)).config
    assert first == replace(new, name="old", rope_theta=1e6)
    plain = saved(tmp_path / "plain", "lfm2", block_auto_adjust_ff_dim=False, intermediate_size=64)
    assert read_folder(plain).config.ffn == 64


@pytest.mark.parametrize(("ffn", "factor", "multiple"), [(6656, 1.0, 256), (100, 1.3, 8), (10, 0.5, 1), (7, 1.0, 5)])
def test_the_feed_forward_width_of_lfm2_is_that_of_transformers(ffn: int, factor: float, multiple: int) -> None:
    sizes = {"intermediate_size": ffn, "block_ffn_dim_multiplier": factor, "block_multiple_of": multiple}
    values = SIZES | LFM2 | sizes
    config, _ = huggingface_config(values | {"model_type": "lfm2"}, "")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.Lfm2Config(**values))
    assert config.ffn == theirs.model.layers[0].feed_forward.w1.out_features


def test_the_two_matrices_of_granitemoehybrid(tmp_path: Path) -> None:
    model = tiny("granitemoehybrid")
    model.save_pretrained(tmp_path)
    found = read_folder(tmp_path).tensors
    both = model.model.layers[1].shared_mlp.input_linear.weight.detach().numpy()
    assert np.array_equal(found["blk.1.ffn_gate.weight"].numpy(), both[:96])
    assert np.array_equal(found["blk.1.ffn_up.weight"].numpy(), both[96:])


def test_layers_of_smollm3_that_are_not_rotated(tmp_path: Path) -> None:
    assert read_folder(saved(tmp_path / "a", "smollm3", no_rope_layers=[0, 1, 1])).config.rotated == (False, True)
    gone = ("no_rope_layers", "layer_types", "no_rope_layer_interval")
    assert read_folder(saved(tmp_path / "b", "smollm3", gone)).config.rotated == (True, True)
    twice = read_folder(saved(tmp_path / "c", "smollm3", gone, no_rope_layer_interval=2)).config
    assert twice.rotated == (True, False)


@pytest.mark.parametrize(
    "kind", ["mistral", "phi3", "smollm3", "ernie4_5", "granite", "gemma", "exaone4", "hunyuan_v1_dense", "olmo2"]
)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    heads = 32 if kind == "exaone4" else 16
    values = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    values |= {"num_attention_heads": heads, "num_hidden_layers": 5}
    config, tied = huggingface_config(values | {"model_type": kind}, kind)
    theirs = transformers.AutoConfig.for_model(kind, **values, **({"pad_token_id": 0} if kind == "phi3" else {}))
    assert config.kv_heads == theirs.num_key_value_heads and config.norm_eps == theirs.rms_norm_eps
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 64 // heads)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] and tied == theirs.tie_word_embeddings


REFUSED = [
    ("llama", {"model_type": "mamba"}, "the model type 'mamba' is not one of llama, mistral, phi3, qwen2"),
    ("llama", {"model_type": ["llama"]}, "model type"),
    ("llama", {"hidden_act": "relu"}, "the activation 'relu'"),
    ("llama", {"mlp_bias": True}, "sets mlp_bias to True"),
    ("llama", {"quantization_config": {"bits": 4}}, "sets quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope scaling 'dynamic'"),
    ("llama", {"rope_parameters": LONGROPE | {"long_factor": None}}, "long_factor must list numbers, not None"),
    ("llama", {"rope_parameters": LONGROPE | {"long_factor": [1.0, True]}}, "long_factor must list numbers"),
    ("llama", {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 7}}, "needs 8 short factors .*, not 7"),
    ("llama", {"rope_parameters": LONGROPE | {"short_factor": [0.0] * 8}}, "short factor must be a positive number"),
    ("llama", {"rope_parameters": LONGROPE | {"attention_factor": 0}}, "attention_factor must be a positive"),
    ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "an even part is rotated, not 24"),
    ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0}}, "an even part is rotated, not 0"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.32}}, "heads of 16 an even part is rotated, not 5"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": "x"}}, "partial_rotary_factor must be a number"),
    ("phi3", {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75}}, "needs 6 short factors .*, not 8"),
    ("mistral", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    ("phi3", {"intermediate_size": 95}, "gate_up_proj.weight' must be a matrix of 190 rows"),
    ("phi3", {"num_key_value_heads": 1}, "qkv_proj.weight' must be a matrix of 96 rows"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "sets truncate to False"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}}, "band is empty"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0}},
        "attention_factor must",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": -9}},
        "attention_factor must be a positive number",
    ),
    ("mistral", {"sliding_window": 0}, "attend to 0 positions"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "its layer_types differ"),
    ("granite", {"residual_multiplier": 0}, "residual_scale must lie in"),
    ("granite", {"logits_scaling": 1e-9}, "logit_scale must lie in"),
    ("granite", {"mlp_bias": True}, "sets mlp_bias"),
    ("granitemoehybrid", {"num_local_experts": 4}, "not one of 4 experts"),
    ("granitemoehybrid", {"num_local_experts": None}, "num_local_experts is missing"),
    ("granitemoehybrid", {"layer_types": ["attention", "mamba"]}, r"the layers \['attention', 'mamba'\]"),
    ("granitemoehybrid", {"shared_intermediate_size": 95}, "must be a matrix of 190 rows"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must list 0 or 1 for 2 layers"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "every 0th"),
    ("smollm3", {"use_sliding_window": True, "layer_types": None}, "without layer_types"),
    ("ernie4_5", {"use_bias": True}, "sets use_bias"),
    ("gemma", {"hidden_act": "relu"}, "activation 'relu' is not gelu or gelu_pytorch_tanh"),
    ("gemma", {"hidden_activation": "gelu"}, "the activation 'gelu' is not gelu_pytorch_tanh"),
    ("gemma", {"use_bidirectional_attention": True}, "sets use_bidirectional_attention"),
    ("gemma", {"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ("gemma", {"hidden_size": -64}, "hidden must lie in"),
    ("exaone4", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "sliding_window is missing"),
    ("exaone4", {"layer_types": ["full_attention"] * 2}, "would leave all layers without rotation"),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLLG"}, "sliding_window_pattern must be a whole"),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": 0}, "every 0th attending to all"),
    ("hunyuan-dense", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ("hunyuan-dense", {"rope_parameters": ALPHA | {"alpha": -1.0}}, "an alpha of -1.0 for heads of 32 makes no sense"),
    ("hunyuan-dense", {"rope_parameters": ALPHA | {"alpha": "x"}}, "alpha must be a number"),
    ("hunyuan-dense", {"rope_parameters": ALPHA, "head_dim": 2}, "an alpha of 8.0 for heads of 2 makes no sense"),
    ("hunyuan-dense", {"use_cla": True}, "sets use_cla to True"),
    ("olmo2", {"clip_qkv": 8.0}, "sets clip_qkv to 8.0"),
    ("lfm2", {"conv_bias": True}, "sets conv_bias to True"),
    ("lfm2", {"conv_dim": 32}, "a conv_dim other than hidden_size, 64, is not supported"),
    ("lfm2", {"conv_L_cache": 0}, "a convolution must have 1 to 8 taps, not 0"),
    ("lfm2", {"conv_L_cache": 9}, "a convolution must have 1 to 8 taps, not 9"),
    ("lfm2", {"conv_L_cache": 4}, "'blk.0.shortconv.conv.weight' is 64 × 3; its configuration asks 64 × 4"),
    ("lfm2", {"layer_types": ["conv", "conv"]}, "one must attend"),
    ("lfm2", {"layer_types": ["full_attention"]}, "one must attend|is missing"),
    ("lfm2", {"layer_types": ["conv", "mamba"]}, "layer_types must list full_attention or conv"),
    ("lfm2", {"layer_types": None}, "layer_types must list full_attention or conv"),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [0], "num_hidden_layers": 1 << 40}, "layer_types must list"),
    ("lfm2", {"block_multiple_of": 0}, "a feed-forward width of"),
    ("lfm2", {"block_ffn_dim_multiplier": -1.0}, "a feed-forward width of"),
    ("lfm2", {"intermediate_size": 1 << 60}, "a feed-forward width of"),
    ("lfm2", {"block_multiple_of": 96}, "'blk.0.ffn_gate.weight' is 64 × 64"),
    ("olmo3", {"sliding_window": None}, "sliding_window is missing"),
    ("olmo3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types must list full_attention or"),
    ("olmo3", {"layer_types": None, "num_hidden_layers": -1}, "layer_types must list"),
    ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters of olmo3 are per layer type; 'rope_theta'"),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "scaled or partial"),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}}, "scaled or partial"),
    ("olmo3", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "only a part of each head"),
    ("hunyuan-dense", {"use_qk_norm": False}, "sets use_qk_norm to False"),
    ("hunyuan-dense", {"num_experts": 8}, "hunyuan_v1_dense of 8 experts is not supported"),
    ("llama", MINICPM | {"scale_depth": 0}, "residual_scale must lie in"),
    ("llama", MINICPM | {"dim_model_base": 0}, "2 layers and a dim_model_base of 0.0 make no sense"),
    ("llama", MINICPM | {"num_hidden_layers": 0}, "0 layers and a dim_model_base of 16.0 make no sense"),
    ("llama", MINICPM | {"sparse_config": {"dense_len": 8192}}, "sets sparse_config"),
    ("llama", MINICPM | {"rope_parameters": LONGROPE}, "longrope of minicpm beyond its original context"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor must be a positive number"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "only a part of each head"),
    ("llama", {"rope_parameters": 3}, "rope_parameters must be an object"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive number"),
    ("llama", {"num_attention_heads": 0}, "heads must lie in"),
    ("llama", {"num_key_value_heads": 3}, "4 heads cannot share 3"),
    ("llama", {"num_hidden_layers": 0}, "layers must lie in"),
    ("llama", {"num_hidden_layers": 2**40}, "layers must lie in"),
    ("llama", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "band is empty: 4.0 to 4.0"),
    (
        "llama",
        {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 10**400}},
        "original_max_position_embeddings must be a whole number",
    ),
    ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
    ("llama", {"num_hidden_layers": 3}, "'blk.2.attn_norm.weight' is missing"),
    ("llama", {"num_hidden_layers": 1}, "'blk.1.[a-z_.]+' has no place in a llama model"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"vocab_size": 101}, "is 100 × 64; its configuration asks 101 × 64"),
    ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
    ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
    ("llama", {"head_dim": 8}, "'blk.0.attn_k.weight' is 32 × 64; its configuration asks 16 × 64"),
    ("qwen2", {"model_type": "llama"}, "bias' has no place in a llama model"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 0, "layer_types": ["sliding_attention"]}, "window of 0"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("qwen2", {"use_sliding_window": True, "layer_types": None}, "without layer_types"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "sets final_logit_softcapping to 30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "a model that looks both ways writes no text"),
    ("llama", {"use_bidirectional_attention": True}, "sets use_bidirectional_attention to True"),
    ("gemma3", {"hidden_activation": "gelu"}, "activation 'gelu'"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
    ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "per layer type"),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "windowed layers"),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "every 0th"),
    ("gpt2", {"activation_function": "gelu"}, "activation 'gelu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"n_head": 5}, "does not divide into 5 heads"),
    ("gpt2", {"n_positions": 33}, "'position_embd.weight' is 32 × 64"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_refused_configurations(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_folder(saved(tmp_path, kind, **changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000])
def test_malformed_config_json(tmp_path: Path, text: bytes) -> None:
    (saved(tmp_path, "llama") / "config.json").write_bytes(text)
    with pytest.raises(FormatError, match="config.json"):
        read_folder(tmp_path)


def test_large_config_json(tmp_path: Path) -> None:
    (saved(tmp_path, "llama") / "config.json").write_bytes(b'{"a": "' + b"x" * (1 << 20) + b'"}')
    with pytest.raises(FormatError, match="config.json is 1048585 bytes"):
        read_folder(tmp_path)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no config.json"):
        read_folder(tmp_path)
    (saved(tmp_path, "llama") / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ModelError, match="safetensors only"):
        read_folder(tmp_path)


def test_unknown_missing_and_repeated_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    for name in ("model.layers.0.self_attn.q_proj.lora_A", "model.layers.x.mlp.up_proj.weight", "score.weight"):
        save_file({**weights, name: torch.zeros(2)}, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match=f"the tensor '{name}' has no place in a llama model"):
            read_folder(tmp_path)
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="'lm_head.weight' is missing"):
        read_folder(tmp_path)
    gpt2 = tiny("gpt2")
    gpt2.save_pretrained(tmp_path)
    twice = {name: value for name, value in gpt2.state_dict().items() if name != "lm_head.weight"}
    save_file({**twice, "wte.weight": torch.zeros(100, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="appears twice"):
        read_folder(tmp_path)


def test_constants_stored_beside_weights_are_left_out(tmp_path: Path) -> None:
    """As the published gpt2 has it: no prefix, causal masks among the weights."""
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    weights = {k.removeprefix("transformer."): v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    save_file(weights | masks, tmp_path / "model.safetensors")
    assert_same(tmp_path, model, "gpt2")
    assert gguf_name("model.layers.3.self_attn.rotary_emb.inv_freq", "llama") is None


def test_tied_output_stored_all_the_same_is_left_out(tmp_path: Path) -> None:
    model = tiny("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same(tmp_path, model, "qwen2")


def test_scale_defaults_to_the_head_size(tmp_path: Path) -> None:
    config = read_folder(saved(tmp_path, "gemma3", ("query_pre_attn_scalar",))).config
    assert config.attention_scale is not None
    assert math.isclose(config.attention_scale, transformers.Gemma3TextConfig().query_pre_attn_scalar ** -0.5)
