"""GGUF files against the gguf package's own reader: real models, and a tiny one per architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from gguf_files import (
    ARCHITECTURES,
    CONTEXT,
    DROP,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    shapes,
    write_tiny,
)
from gguf_peer import peer
from millis.models.config import ModelConfig, RopeScaling
from millis.models.gguf import parse_gguf, read_gguf
from millis.models.gguf_metadata import config_metadata
from millis.models.gguf_values import StringArray
from millis.models.load import build_plan
from millis.models.mapped import map_file
from millis.models.oracle import Oracle
from millis.models.tensors_expected import expected_shapes
from millis.quantize.export import export_gguf
from millis.types import FormatError, ModelError

REAL = ("smollm2", "qwen2.5-0.5b", "gemma3-270m")
ModelPath = Callable[[str], Path]


@pytest.mark.parametrize("name", REAL)
def test_tensors_of_real_files(model_path: ModelPath, name: str) -> None:
    ours, theirs = read_gguf(model_path(name)).tensors, peer(model_path(name)).tensors
    assert list(ours) == [tensor.name for tensor in theirs]
    for tensor in theirs:
        mine = ours[tensor.name]
        assert mine.name == tensor.name and mine.type == tensor.tensor_type
        assert mine.shape == tuple(tensor.shape.tolist()[::-1])
        assert np.array_equal(mine.data, tensor.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("name", REAL)
def test_values_of_real_files(model_path: ModelPath, name: str) -> None:
    ours = read_gguf(model_path(name)).tensors
    seen = set()
    for tensor in peer(model_path(name)).tensors:
        if tensor.tensor_type in seen or tensor.n_elements > 5_000_000:
            continue
        seen.add(tensor.tensor_type)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(ours[tensor.name].numpy(), values.reshape(ours[tensor.name].shape), rtol=1e-6)
    assert len(seen) >= 2


@pytest.mark.parametrize("name", REAL)
def test_key_values_of_real_files(model_path: ModelPath, name: str) -> None:
    ours, theirs = read_gguf(model_path(name)).metadata, peer(model_path(name)).fields
    assert list(ours) == [key for key in theirs if not key.startswith("GGUF.")]
    for key, value in ours.items():
        if isinstance(value, StringArray):
            field = theirs[key]
            assert list(value) == [bytes(field.parts[place]).decode() for place in field.data]
        elif isinstance(value, np.ndarray):
            field = theirs[key]
            assert np.array_equal(value, np.concatenate([field.parts[place] for place in field.data]))
        else:
            assert value == theirs[key].contents() and type(value) is type(theirs[key].contents())


def test_configurations_of_real_files(model_path: ModelPath) -> None:
    smollm2, qwen, gemma = (read_gguf(model_path(name)).config for name in REAL)
    assert smollm2 == ModelConfig(
        architecture="llama",
        name="Smollm2 135M 8k Lc100K Mix1 Ep2",
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        vocab=49152,
        context=8192,
        norm_eps=float(np.float32(1e-5)),
        rope_theta=100000.0,
        rope_style="interleaved",
    )
    assert (qwen.architecture, qwen.attention_bias, qwen.rope_style, qwen.rope_theta) == ("qwen2", True, "half", 1e6)
    assert (qwen.heads, qwen.kv_heads, qwen.head_dim, qwen.vocab) == (14, 2, 64, 151936)
    assert gemma.windows == ((512,) * 5 + (0,)) * 3
    assert (gemma.head_dim, gemma.activation, gemma.rope_local_theta) == (256, "gelu_tanh", 1e4)
    assert gemma.attention_scale is None and not gemma.attention_bias


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_files(tmp_path: Path, architecture: str) -> None:
    values = write_tiny(tmp_path / "tiny.gguf", architecture)
    checkpoint = read_gguf(tmp_path / "tiny.gguf")
    config = checkpoint.config
    assert (config.architecture, config.name, config.layers) == (architecture, "tiny", LAYERS)
    assert (config.hidden, config.ffn, config.vocab, config.context) == (HIDDEN, FFN, VOCAB, CONTEXT)
    assert config.attention_bias == (architecture in ("qwen2", "gpt2"))
    interleaved = architecture in ("llama", "granite", "smollm3", "ernie4_5")
    assert config.rope_style == ("interleaved" if interleaved else "half")
    assert expected_shapes(config) == shapes(architecture)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == shapes(architecture)
    for name, expected in values.items():
        assert np.array_equal(checkpoint.tensors[name].numpy(), expected)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    data = map_file(tmp_path / "tiny.gguf")
    metadata, tensors = parse_gguf(data)
    assert all(np.shares_memory(tensor.data, data) for tensor in tensors.values())
    assert np.shares_memory(metadata["tokenizer.ggml.scores"], data)
    assert not tensors["output_norm.weight"].data.flags.writeable


def test_version_2_reads_the_same(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    data = np.fromfile(tmp_path / "tiny.gguf", np.uint8)
    newer, _ = parse_gguf(data)
    data[4] = 2
    older, tensors = parse_gguf(data)
    assert list(older) == list(newer) and len(tensors) == len(shapes("llama"))


def test_strings_are_a_sequence(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    tokens = read_gguf(tmp_path / "tiny.gguf").metadata["tokenizer.ggml.tokens"]
    expected = [f"token {index} é" for index in range(VOCAB)]
    assert list(tokens) == expected and len(tokens) == VOCAB
    assert tokens[3] == expected[3] and tokens[-1] == expected[-1] and list(tokens[5:9]) == expected[5:9]
    assert "token 7 é" in tokens and tokens.index("token 9 é") == 9 and list(reversed(tokens)) == expected[::-1]
    with pytest.raises(IndexError):
        tokens[VOCAB]


def test_every_kind_of_number(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kinds = gguf.GGUFValueType
    values = {
        kinds.UINT8: 200, kinds.INT8: -100, kinds.UINT16: 60000, kinds.INT16: -30000, kinds.UINT32: 2**32 - 1,
        kinds.INT32: -(2**31), kinds.UINT64: 2**64 - 1, kinds.INT64: -(2**63), kinds.FLOAT32: 0.5,
        kinds.FLOAT64: 0.1, kinds.BOOL: True, kinds.STRING: "é\x00ü",
    }  # fmt: skip
    for kind, value in values.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, kinds.ARRAY, sub_type=kind)
    writer.add_tensor("t", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, _ = parse_gguf(map_file(tmp_path / "x.gguf"))
    for kind, value in values.items():
        assert metadata[f"one.{kind.name}"] == value and type(metadata[f"one.{kind.name}"]) is type(value)
        assert list(metadata[f"many.{kind.name}"]) == [value] * 3


def config_of(tmp_path: Path, architecture: str, tensors: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    """Keys with __ for dots; a leading one is the architecture's."""
    dotted = {key.replace("__", "."): value for key, value in keys.items()}
    write_tiny(tmp_path / "x.gguf", architecture, dotted, tensors)
    return read_gguf(tmp_path / "x.gguf").config


def test_rope_scaling(tmp_path: Path) -> None:
    linear = RopeScaling(kind="linear", factor=4.0)
    both = {"__rope__scaling__type": "linear", "__rope__scaling__factor": 4.0}
    assert config_of(tmp_path, "llama", **both).rope_scaling == linear
    assert config_of(tmp_path, "qwen2", __rope__scale_linear=4.0).rope_scaling == linear
    assert config_of(tmp_path, "llama", __rope__scaling__factor=1.0).rope_scaling is None
    assert config_of(tmp_path, "llama", **both | {"__rope__scaling__type": "none"}).rope_scaling is None
    assert config_of(tmp_path, "llama", __rope__freq_base=DROP).rope_theta == 10000.0


def test_yarn(tmp_path: Path) -> None:
    """The attention factor of the file comes on top of what YaRN recommends, as in llama.cpp."""
    yarn = {"__rope__scaling__type": "yarn", "__rope__scaling__factor": 4.0}
    found = config_of(tmp_path, "qwen2", **yarn, __rope__scaling__yarn_ext_factor=1.0).rope_scaling
    recommended = 0.1 * math.log(4) + 1
    plain = RopeScaling(kind="yarn", factor=4.0, original_context=CONTEXT, attention_factor=recommended)
    assert found == plain
    more = {"original_context_length": 16, "attn_factor": 0.5, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
    keys = yarn | {f"__rope__scaling__{key}": value for key, value in more.items()}
    given = {"original_context": 16, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": recommended / 2}
    assert config_of(tmp_path, "llama", **keys).rope_scaling == replace(plain, **given)


def phi3_peer(values: dict[str, np.ndarray], rope: dict[str, Any]) -> Any:
    """The tiny file's model in transformers."""
    names = {"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"}
    names |= {"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(**sizes, **heads, **special, rope_parameters=rope, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {"model.embed_tokens.weight": values["token_embd.weight"], "lm_head.weight": values["token_embd.weight"]}
    state["model.norm.weight"] = values["output_norm.weight"]
    for index in range(LAYERS):
        for ours, theirs in names.items():
            state[f"model.layers.{index}.{theirs}.weight"] = values[f"blk.{index}.{ours}.weight"]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model


@pytest.mark.parametrize("rotated", [HEAD_DIM, 12])
@pytest.mark.parametrize("scaled", [False, True])
def test_phi3_matches_transformers(scaled: bool, rotated: int, tmp_path: Path) -> None:
    """Its factors are tensors of the file; the context decides which are used."""
    keys = {
        ".rope.dimension_count": rotated,
        ".rope.scaling.original_context_length": 16,
        ".attention.sliding_window": 99,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": rotated / HEAD_DIM}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes("phi3").items()}
    if scaled:
        short, long = np.linspace(1, 1.5, rotated // 2), np.linspace(1, 9, rotated // 2)
        rope |= {"rope_type": "longrope", "attention_factor": 1.2}
        rope |= {"short_factor": short.tolist(), "long_factor": long.tolist()}
        keys |= {".rope.scaling.attn_factor": 1.2}
        tensors |= {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    values = write_tiny(tmp_path / "a.gguf", "phi3", keys, tensors)
    checkpoint = read_gguf(tmp_path / "a.gguf")
    assert checkpoint.config.architecture == "llama" and checkpoint.config.windows == ()
    model = phi3_peer(values, rope)
    for context, ids in ((16, list(range(12))), (CONTEXT, list(range(28)))):
        logits = Oracle(build_plan(checkpoint, context), checkpoint.tensors).logits(ids)
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0].numpy()
        assert wanted.std() > 0.3
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)


def test_windows_of_phi3_and_files_that_cannot_be(tmp_path: Path) -> None:
    assert config_of(tmp_path, "phi3", __attention__sliding_window=8).windows == (8,) * LAYERS
    factors = {"rope_factors_long.weight": (8,)}
    with pytest.raises(FormatError, match="rope_factors_short.weight must list factors"):
        config_of(tmp_path, "phi3", tensors=factors)
    with pytest.raises(FormatError, match="longrope's short factor must be a positive number"):
        config_of(tmp_path, "phi3", tensors=factors | {"rope_factors_short.weight": np.zeros(8)})
    with pytest.raises(FormatError, match="attn_qkv.weight' must be a matrix of 128 rows, not"):
        config_of(tmp_path, "phi3", tensors={"blk.1.attn_qkv.weight": (96, HIDDEN)})
    with pytest.raises(FormatError, match="attn_q.weight' is there twice"):
        config_of(tmp_path, "phi3", tensors={"blk.0.attn_q.weight": (64, HIDDEN)})


def test_scales_of_granite(tmp_path: Path) -> None:
    config = config_of(tmp_path, "granite")
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (6.0, 0.25, 4.0)
    assert config.attention_scale == 0.125 and config.rotated == ()
    absent = config_of(tmp_path, "granite", __embedding_scale=0.0, __residual_scale=DROP, __attention__scale=DROP)
    assert (absent.embedding_scale, absent.residual_scale, absent.attention_scale) == (1.0, 1.0, None)
    assert config_of(tmp_path, "granite", __rope__scaling__finetuned=True).rotated == ()
    assert config_of(tmp_path, "granite", __rope__scaling__finetuned=False).rotated == (False, False)
    assert config_of(tmp_path, "llama", __rope__scaling__finetuned=False).rotated == ()


def test_minicpm_is_a_granite_of_one_context(tmp_path: Path) -> None:
    config = config_of(tmp_path, "minicpm")
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (6.0, 0.25, 4.0)
    assert (config.architecture, config.rope_style, config.rotated) == ("granite", "interleaved", ())
    factors = {f"rope_factors_{size}.weight": np.full(8, by) for size, by in (("short", 2.0), ("long", 3.0))}
    for keys in ({}, {"__rope__scaling__type": "longrope"}):
        scaling = config_of(tmp_path, "minicpm", factors, **keys).rope_scaling
        assert scaling is not None and (scaling.kind, scaling.original_context) == ("longrope", CONTEXT)
        assert scaling.short_factors == (2.0,) * 8 and scaling.attention_factor == 1
    export_gguf(read_gguf(tmp_path / "x.gguf"), tmp_path / "again.gguf")
    assert read_gguf(tmp_path / "again.gguf").config == read_gguf(tmp_path / "x.gguf").config
    with pytest.raises(FormatError, match="rope_factors_short.weight must list factors"):
        config_of(tmp_path, "minicpm", __rope__scaling__type="longrope")
    with pytest.raises(FormatError, match="'rope_factors_short.weight' has no place in a granite"):
        config_of(tmp_path, "granite", factors)


def test_windows_of_exaone4(tmp_path: Path) -> None:
    """Files of 64 layers have some."""
    assert config_of(tmp_path, "exaone4").windows == ()
    assert config_of(tmp_path, "exaone4", __attention__sliding_window=8).windows == (8, 8)
    listed = {"__attention__sliding_window": 8, "__attention__sliding_window_pattern": [False, True]}
    assert config_of(tmp_path, "exaone4", **listed).windows == (0, 8)
    layer = {name: shape for name, shape in shapes("exaone4").items() if name.startswith("blk.0.")}
    names = {name.replace("0", str(index), 1): shape for index in range(64) for name, shape in layer.items()}
    deep = config_of(tmp_path, "exaone4", names, __block_count=64, __attention__sliding_window=8)
    assert deep.windows == (8, 8, 8, 0) * 16
    said = config_metadata(deep)
    assert said["exaone4.attention.sliding_window"] == 8
    assert said["exaone4.attention.sliding_window_pattern"] == [True, True, True, False] * 16
    for change in ({"windows": ()}, {"layers": 60, "windows": (8, 8, 8, 0) * 15}):
        with pytest.raises(FormatError, match="exaone4 in a GGUF file has windows where it has 64 layers"):
            config_metadata(replace(deep, **change))
    with pytest.raises(FormatError, match="the key exaone4.attention.sliding_window is missing"):
        config_of(tmp_path, "exaone4", names, __block_count=64)


def test_rotation_of_hunyuan(tmp_path: Path) -> None:
    """Of a scaling by alpha, llama.cpp's converter writes the stretched base, and no scaling."""
    keys = {"__rope__scaling__type": "none", "__rope__scaling__factor": 1.0, "__rope__freq_base": 11158840.0}
    config = config_of(tmp_path, "hunyuan-dense", **keys, __rope__scaling__original_context_length=CONTEXT)
    assert (config.rope_theta, config.rope_scaling, config.rope_style) == (11158840.0, None, "half")


def test_windows_of_olmo3(tmp_path: Path) -> None:
    """Its files are olmo2's with a window, as llama.cpp's converter writes them."""
    plain = config_of(tmp_path, "olmo2")
    assert (plain.windows, plain.rope_theta) == ((), 5e4)
    assert "olmo2.attention.sliding_window" not in config_metadata(plain)
    assert config_of(tmp_path, "olmo2", __attention__sliding_window=8).windows == (8, 8)
    listed = {"__attention__sliding_window": 8, "__attention__sliding_window_pattern": [True, False]}
    config = config_of(tmp_path, "olmo2", **listed)
    assert (config.windows, config.rope_local_theta) == ((8, 0), 5e4)
    said = config_metadata(replace(config, rope_local_theta=1e4))
    assert said[gguf.Keys.Attention.SLIDING_WINDOW.format(arch="olmo2")] == 8
    assert said[gguf.Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch="olmo2")] == [True, False]
    assert said[gguf.Keys.Rope.FREQ_BASE_SWA.format(arch="olmo2")] == 1e4


@pytest.mark.parametrize(
    ("said", "means"), [(DROP, 1.2079442), (1.0, 1.2079442), (1.2079442, 1.2079442), (0.5, 0.6039721)]
)
def test_attention_factor_of_olmo3(said: Any, means: float, tmp_path: Path) -> None:
    """Of a context that is 8 times the original one YaRN recommends 1 + ln(8) / 10, which some files say themselves."""
    yarn = {"__rope__scaling__type": "yarn", "__rope__scaling__factor": 8.0, "__rope__scaling__attn_factor": said}
    scaling = config_of(tmp_path, "olmo2", **yarn, __rope__scaling__original_context_length=8).rope_scaling
    assert scaling is not None and scaling.attention_factor == pytest.approx(means, rel=1e-5)


def test_layers_of_lfm2(tmp_path: Path) -> None:
    """A layer without heads of keys and values is a convolution."""
    config = config_of(tmp_path, "lfm2")
    assert (config.convolved, config.taps, config.kv_heads, config.rope_style) == ((True, False), 3, 2, "half")
    said = config_metadata(config)
    assert said[gguf.Keys.Attention.HEAD_COUNT_KV.format(arch="lfm2")] == [0, 2]
    assert said[gguf.Keys.ShortConv.L_CACHE.format(arch="lfm2")] == 3


def test_every_fourth_layer_of_smollm3_is_not_rotated(tmp_path: Path) -> None:
    layer = {name: shape for name, shape in shapes("smollm3").items() if name.startswith("blk.0.")}
    names = {name.replace("0", str(index), 1): shape for index in range(5) for name, shape in layer.items()}
    assert config_of(tmp_path, "smollm3", names, __block_count=5).rotated == (True, True, True, False, True)


def test_optional_tensors(tmp_path: Path) -> None:
    assert config_of(tmp_path, "llama", {"rope_freqs.weight": (8,), "output.weight": (VOCAB, HIDDEN)}).vocab == VOCAB
    with pytest.raises(FormatError, match="'rope_freqs.weight' is 7; its configuration asks 8"):
        config_of(tmp_path, "llama", {"rope_freqs.weight": (7,)})
    with pytest.raises(FormatError, match="'rope_freqs.weight' has no place in a qwen2 model"):
        config_of(tmp_path, "qwen2", {"rope_freqs.weight": (8,)})


def test_biases_of_llama(tmp_path: Path) -> None:
    widths = {"q": 64, "k": 32, "v": 32}
    biases = {f"blk.{index}.attn_{part}.bias": (width,) for index in range(2) for part, width in widths.items()}
    assert config_of(tmp_path, "llama", biases).attention_bias
    with pytest.raises(FormatError, match="'blk.1.attn_v.bias' is missing"):
        config_of(tmp_path, "llama", biases | {"blk.1.attn_v.bias": DROP})


def test_head_size_of_its_own(tmp_path: Path) -> None:
    rows = {"q": 128, "k": 64, "v": 64}
    wide = {f"blk.{i}.attn_{part}.weight": (count, HIDDEN) for i in range(2) for part, count in rows.items()}
    wide |= {f"blk.{i}.attn_output.weight": (HIDDEN, 128) for i in range(2)}
    wide |= {f"blk.{i}.attn_{part}_norm.weight": (32,) for i in range(2) for part in "qk"}
    lengths = {"__attention__key_length": 32, "__attention__value_length": 32, "__rope__dimension_count": 32}
    assert config_of(tmp_path, "qwen3", wide, **lengths).head_dim == 32


def test_windows_of_gemma3(tmp_path: Path) -> None:
    assert config_of(tmp_path, "gemma3").windows == (8, 8)
    assert config_of(tmp_path, "gemma3", __attention__sliding_window_pattern=2).windows == (8, 0)
    listed = config_of(tmp_path, "gemma3", __attention__sliding_window_pattern=[False, True])
    assert listed.windows == (0, 8)
    assert config_of(tmp_path, "gemma3", __rope__freq_base_swa=2e4).rope_local_theta == 2e4


def test_attention_scale(tmp_path: Path) -> None:
    assert config_of(tmp_path, "gemma3").attention_scale is None
    assert config_of(tmp_path, "gemma3", __attention__scale=0.125).attention_scale == 0.125
    layer = {name: shape for name, shape in shapes("gemma3").items() if name.startswith("blk.0.")}
    names = {name.replace("0", str(index), 1): shape for index in range(62) for name, shape in layer.items()}
    deep = config_of(tmp_path, "gemma3", names, __block_count=62)
    assert deep.attention_scale is not None and math.isclose(deep.attention_scale, (HIDDEN / 4) ** -0.5)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"general__architecture": "mamba"}, "'mamba' is not one of llama, phi3, qwen2, qwen3, gemma, gemma3"),
    ("llama", {"general__architecture": "qwen2"}, "the key qwen2.embedding_length is missing"),
    ("llama", {"general__type": "adapter"}, "the file holds a 'adapter', not a model"),
    ("llama", {"split__count": 3}, "one of 3 parts"),
    ("llama", {"general__type": ["model"]}, "general.type is a list"),
    ("llama", {"split__count": [1, 1]}, "split.count is a list"),
    ("llama", {"__block_count": DROP}, "the key llama.block_count is missing"),
    ("llama", {"__block_count": 0}, "layers must lie in"),
    ("llama", {"__block_count": -1}, "layers must lie in"),
    ("llama", {"__block_count": 2**31}, "layers must lie in"),
    ("llama", {"__block_count": 2.0}, "llama.block_count must be a whole number"),
    ("llama", {"__block_count": True}, "llama.block_count must be a whole number"),
    ("llama", {"__block_count": "2"}, "llama.block_count must be a whole number"),
    ("llama", {"__block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
    ("llama", {"__block_count": 1}, "'blk.1.attn_norm.weight' has no place in a llama model"),
    ("llama", {"__context_length": 0}, "context must lie in"),
    ("llama", {"__embedding_length": 0}, "hidden and heads must be positive, not 0 and 4"),
    ("llama", {"__embedding_length": 66}, "a hidden size of 66 does not divide into 4 heads"),
    ("llama", {"__embedding_length": 128}, "is 50 × 64; its configuration asks 50 × 128"),
    ("llama", {"__feed_forward_length": 95}, "is 96 × 64; its configuration asks 95 × 64"),
    ("llama", {"__feed_forward_length": [96, 96]}, "llama.feed_forward_length is a list"),
    ("llama", {"__attention__head_count": 0}, "hidden and heads must be positive, not 64 and 0"),
    ("llama", {"__attention__head_count": [4, 4]}, "llama.attention.head_count is a list"),
    ("llama", {"__attention__head_count_kv": 3}, "4 heads cannot share 3 key-value heads"),
    ("llama", {"__attention__head_count_kv": 0}, "kv_heads must lie in"),
    ("llama", {"__attention__key_length": 15}, "head_dim must be even"),
    ("llama", {"__attention__value_length": 8}, "keys and values differ in length"),
    ("llama", {"__rope__dimension_count": 8}, "only a part of each head"),
    ("llama", {"__attention__layer_norm_rms_epsilon": math.nan}, "norm_eps must be a positive number, not nan"),
    ("llama", {"__attention__layer_norm_rms_epsilon": 0.0}, "norm_eps must be a positive number"),
    ("llama", {"__attention__layer_norm_rms_epsilon": "x"}, "must be a number, not 'x'"),
    ("llama", {"__rope__freq_base": math.inf}, "rope_theta must be a positive number, not inf"),
    ("llama", {"__rope__freq_base": -1.0}, "rope_theta must be a positive number"),
    ("llama", {"__attention__scale": math.nan}, "attention_scale must be a positive number"),
    ("llama", {"__rope__scaling__type": "longrope"}, "the rope scaling 'longrope' is not supported"),
    ("llama", {"__rope__scaling__attn_factor": 2.0}, "the file sets llama.rope.scaling.attn_factor to 2.0"),
    ("llama", {"__rope__scaling__type": "yarn", "__rope__scaling__yarn_attn_factor": 2.0}, "yarn_attn_factor to 2.0"),
    ("llama", {"__rope__scaling__type": "yarn", "__rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor to 0.5"),
    ("llama", {"__rope__scaling__type": "yarn", "__rope__scaling__yarn_beta_fast": 1.0}, "band is empty: 1.0 to 1.0"),
    ("llama", {"__rope__scaling__type": "yarn", "__rope__freq_base": 1.0}, "yarn needs a rope_theta above 1"),
    ("llama", {"__attention__sliding_window": 8}, "the file sets llama.attention.sliding_window to 8"),
    ("gemma3", {"__rope__scaling__type": "yarn"}, "yarn of gemma3 is not supported"),
    ("granite", {"__logit_scale": DROP}, "the key granite.logit_scale is missing"),
    ("granite", {"__logit_scale": 0.0}, "logit_scale must lie in"),
    ("granite", {"__residual_scale": 1e-30}, "residual_scale must lie in"),
    ("granite", {"__rope__scaling__finetuned": 0}, "finetuned must be true or false"),
    ("granite", {"__rope__scaling__finetuned": False, "__block_count": 2**31}, "block_count must lie in"),
    ("smollm3", {"__block_count": 2**31}, "block_count must lie in"),
    ("exaone4", {"__block_count": 2**31}, "block_count must lie in"),
    ("lfm2", {"__attention__head_count_kv": [0, 2, 2]}, "head_count_kv must list one number of heads"),
    ("lfm2", {"__attention__head_count_kv": [1, 2]}, "head_count_kv must list one number of heads"),
    ("lfm2", {"__attention__head_count_kv": [0, 0]}, "head_count_kv must list one number of heads"),
    ("lfm2", {"__attention__head_count_kv": [0, -2]}, "kv_heads must lie in"),
    ("lfm2", {"__attention__head_count_kv": [0.0, 2.0]}, "head_count_kv must list one number of heads"),
    ("lfm2", {"__attention__head_count_kv": 2}, "'blk.0.attn_q.weight' is missing"),
    ("lfm2", {"__block_count": 2**31}, "block_count must lie in"),
    ("lfm2", {"__shortconv__l_cache": DROP}, "the key lfm2.shortconv.l_cache is missing"),
    ("lfm2", {"__shortconv__l_cache": 2**31}, "a convolution must have 1 to 8 taps"),
    ("llama", {"__attention__head_count_kv": [2, 2]}, "head_count_kv is a list"),
    ("olmo2", {"__rope__scaling__attn_factor": 2.0}, "the file sets olmo2.rope.scaling.attn_factor to 2.0"),
    ("olmo2", {"__rope__dimension_count": 8}, "only a part of each head"),
    ("phi3", {"__rope__dimension_count": 7}, "heads of 16 an even part is rotated, not 7"),
    ("phi3", {"__rope__dimension_count": 18}, "heads of 16 an even part is rotated, not 18"),
    ("hunyuan-dense", {"__rope__scaling__type": "dynamic"}, "the rope scaling 'dynamic' is not supported"),
    ("hunyuan-dense", {"__rope__scaling__alpha": 50.0}, "the file sets hunyuan-dense.rope.scaling.alpha to 50.0"),
    ("minicpm", {"__embedding_scale": DROP}, "the key minicpm.embedding_scale is missing"),
    ("minicpm", {"__rope__scaling__original_context_length": 16}, "minicpm beyond its original context"),
    ("gpt2", {"__rope__scaling__type": "longrope"}, "the file sets gpt2.rope.scaling.type to 'longrope'"),
    ("smollm3", {"__logit_scale": 2.0}, "the file sets smollm3.logit_scale to 2.0"),
    ("llama", {"__rope__scaling__factor": math.nan}, "rope scaling's factor must be a positive number"),
    ("llama", {"__rope__scaling__factor": -2.0}, "rope scaling's factor must be a positive number"),
    ("llama", {"__vocab_size": 51}, "vocab_size counts 51 tokens, but token_embd.weight has 50 rows"),
    ("llama", {"tokenizer__ggml__tokens": ["a", "b"]}, "the tokenizer counts 2 tokens"),
    ("llama", {"__expert_count": 8}, "the file sets llama.expert_count to 8, which Millis does not support"),
    ("llama", {"__logit_scale": 2.0}, "the file sets llama.logit_scale to 2.0"),
    ("llama", {"__attention__causal": False}, "llama.attention.causal to False"),
    ("qwen2", {"__expert_count": [1, 2]}, "qwen2.expert_count is a list"),
    ("gemma3", {"__final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0"),
    ("gemma3", {"__attention__sliding_window": DROP}, "attention.sliding_window is missing"),
    ("gemma3", {"__attention__sliding_window": 2**31}, "an attention window is out of range"),
    ("gemma3", {"__attention__sliding_window": -8}, "an attention window is out of range"),
    ("gemma3", {"__attention__sliding_window_pattern": 0}, "every 0th"),
    ("gemma3", {"__attention__sliding_window_pattern": [True]}, "sliding_window_pattern is a list"),
    ("gpt2", {"__attention__head_count_kv": 2}, "gpt2's 4 heads of 16 must make up its 64 values"),
    ("gpt2", {"__rope__freq_base": 1e4}, "the file sets gpt2.rope.freq_base"),
    ("gpt2", {"__context_length": 33}, "'position_embd.weight' is 32 × 64; its configuration asks 33 × 64"),
]


@pytest.mark.parametrize(("architecture", "keys", "message"), REFUSED)
def test_refused_settings(tmp_path: Path, architecture: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        config_of(tmp_path, architecture, **keys)
    assert str(caught.value).startswith("x.gguf: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_tensor_is_needed(tmp_path: Path, architecture: str) -> None:
    for name in shapes(architecture):
        if name == "blk.0.attn_q.bias" or name.startswith("blk.1."):
            continue
        with pytest.raises(FormatError, match=f"the tensor '{name}' is missing"):
            config_of(tmp_path, architecture, {name: DROP})


def test_unknown_and_misshapen_tensors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'blk.0.ffn_gate_inp.weight' has no place in a llama model"):
        config_of(tmp_path, "llama", {"blk.0.ffn_gate_inp.weight": (8, HIDDEN)})
    with pytest.raises(FormatError, match="'blk.0.attn_norm.weight' is 1 × 64; its configuration asks 64"):
        config_of(tmp_path, "llama", {"blk.0.attn_norm.weight": (1, HIDDEN)})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="not a regular file"):
        read_gguf(tmp_path)
