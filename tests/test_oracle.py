"""The NumPy oracle, plans and readers together against transformers; single ops against torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Exaone4Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from millis.models.checkpoint import Checkpoint
from millis.models.load import build_plan, load_model, read_checkpoint
from millis.models.oracle import Oracle
from millis.models.plan import Embed, GatedMatMul, MatMul, Norm, Op, Plan, Select
from millis.models.tensor import Tensor
from millis.types import RequestError
from reference import (
    EXAONE4,
    LLAMA3_ROPE,
    LONGROPE,
    MINICPM_ROPE,
    ROPE,
    SIZES,
    TINY,
    folder_model,
    minicpm,
    next_logits,
    random_model,
    real_reference,
    tiny_model,
)

PROMPT = np.random.default_rng(1).integers(0, 96, 40).tolist()


def save(name: str, folder: Path) -> Any:
    model = tiny_model(name)
    model.save_pretrained(folder)
    return model


def oracle_logits(checkpoint: Checkpoint, ids: list[int], context: int = 64) -> np.ndarray:
    return Oracle(build_plan(checkpoint, context), checkpoint.tensors).logits(ids)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_match_transformers(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    logits = oracle_logits(read_checkpoint(tmp_path), PROMPT)
    expected = next_logits(model, PROMPT)
    assert logits.shape == (40, 96) and logits.dtype == np.float32
    assert expected.std() > 0.3, "logits too flat to tell models apart"
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_later_tokens_do_not_change_earlier_logits(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    np.testing.assert_allclose(
        oracle_logits(checkpoint, PROMPT[:9]), oracle_logits(checkpoint, PROMPT)[:9], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"windows": ()},
        {"rope_local_theta": 5000.0},
        {"attention_scale": None},
        {"activation": "silu"},
        {"rope_scaling": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_constant_of_gemma3_matters(change: dict[str, Any], tmp_path: Path) -> None:
    """So that agreement above means that each is right."""
    save("gemma3", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    changed = replace(checkpoint, config=replace(checkpoint.config, **change))
    assert np.abs(oracle_logits(changed, PROMPT) - oracle_logits(checkpoint, PROMPT)).max() > 0.05


def test_windowed_llama_matches_transformers(tmp_path: Path) -> None:
    """qwen2 may window its later layers."""
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 7
    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        layer.self_attn.sliding_window = 7 if kind == "sliding_attention" else None
        layer.attention_type = kind
    model.model.has_sliding_layers = True
    save("qwen2", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    windowed = replace(checkpoint, config=replace(checkpoint.config, windows=(0, 7)))
    np.testing.assert_allclose(oracle_logits(windowed, PROMPT), next_logits(model, PROMPT), atol=1e-4, rtol=1e-5)
    assert np.abs(oracle_logits(windowed, PROMPT) - oracle_logits(checkpoint, PROMPT)).max() > 0.05


def test_windowed_mistral_matches_transformers(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 7
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    logits = oracle_logits(checkpoint, PROMPT)
    np.testing.assert_allclose(logits, next_logits(model, PROMPT), atol=1e-4, rtol=1e-5)
    everything = replace(checkpoint, config=replace(checkpoint.config, windows=()))
    assert np.abs(oracle_logits(everything, PROMPT) - logits).max() > 0.05


@pytest.mark.parametrize("window", [None, 7])
def test_longrope_beyond_the_original_context_matches_transformers(window: int | None, tmp_path: Path) -> None:
    """The context decides: a text of 100 tokens has the short factors in one of 128, the long ones in one of 256."""
    tiny_model("phi3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_parameters": LONGROPE, "sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = folder_model(tmp_path)
    checkpoint, prompt = read_checkpoint(tmp_path), PROMPT * 4
    assert checkpoint.config.rope_scaling is not None and len(prompt) == 160
    long = oracle_logits(checkpoint, prompt, 256)
    np.testing.assert_allclose(long, next_logits(model, prompt), atol=2e-4, rtol=1e-4)
    short = oracle_logits(checkpoint, prompt[:100], 128)
    np.testing.assert_allclose(short, next_logits(model, prompt[:100]), atol=1e-4, rtol=1e-5)
    assert np.abs(short - long[:100]).max() > 0.05
    assert load_model(tmp_path).plan.context == 128, "unless a longer one is asked for"


@pytest.mark.parametrize("listed", [False, True])
def test_windowed_exaone4_matches_transformers(listed: bool, tmp_path: Path) -> None:
    """One layer in four attends to all, unless they are listed, and is not rotated where others have a window."""
    kinds = ["full_attention", *["sliding_attention"] * 3] if listed else None
    sizes = {**SIZES, **EXAONE4, "num_hidden_layers": 4, "sliding_window": 7, "layer_types": kinds}
    model = random_model(Exaone4Config(**sizes))
    model.save_pretrained(tmp_path)
    if not listed:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["layer_types"], config["sliding_window_pattern"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config.windows == ((0, 7, 7, 7) if listed else (7, 7, 7, 0))
    logits = oracle_logits(checkpoint, PROMPT)
    np.testing.assert_allclose(logits, next_logits(model, PROMPT), atol=1e-4, rtol=1e-5)
    everything = replace(checkpoint, config=replace(checkpoint.config, windows=()))
    assert np.abs(oracle_logits(everything, PROMPT) - logits).max() > 0.05


@pytest.mark.parametrize(("tied", "rope"), [(False, ROPE), (True, MINICPM_ROPE)])
def test_minicpm_matches_a_llama_of_scaled_weights(tied: bool, rope: dict[str, Any], tmp_path: Path) -> None:
    """transformers has no code of its own for it."""
    model = minicpm(tmp_path, tied, rope)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config.architecture == "granite" and ("output.weight" in checkpoint.tensors) is not tied
    logits = oracle_logits(checkpoint, PROMPT)
    np.testing.assert_allclose(logits, next_logits(model, PROMPT), atol=1e-4, rtol=1e-5)


def test_granite_without_rotation_matches_transformers(tmp_path: Path) -> None:
    model = tiny_model("granitemoehybrid")
    model.config.position_embedding_type = None
    model.model.rotary_emb = None
    model.save_pretrained(tmp_path)
    logits = oracle_logits(read_checkpoint(tmp_path), PROMPT)
    np.testing.assert_allclose(logits, next_logits(model, PROMPT), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("granite", {"embedding_scale": 1.0}),
        ("granite", {"residual_scale": 1.0}),
        ("granite", {"attention_scale": None}),
        ("granite", {"logit_scale": 1.0}),
        ("granite", {"norm_eps": 1e-6}),
        ("smollm3", {"rotated": ()}),
        ("ernie4_5", {"rope_style": "half"}),
        ("exaone4", {"rope_scaling": None}),
        ("hunyuan", {"rope_theta": 100.0}),
        ("olmo3", {"windows": ()}),
        ("olmo3", {"rope_local_theta": 5000.0}),
        ("olmo3", {"rope_scaling": None}),
        ("lfm2", {"rope_theta": 100.0}),
        ("lfm2", {"norm_eps": 0.01}),
        ("phi4_mini", {"rotary_dim": None, "rope_scaling": None}),
        ("hunyuan", {"architecture": "qwen3"}),
        ("gemma", {"embedding_scale": 1.0}),
        ("gemma", {"activation": "silu"}),
        ("mistral", {"rope_scaling": None}),
    ],
)
def test_every_constant_of_the_others_matters(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    save(name, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    changed = replace(checkpoint, config=replace(checkpoint.config, **change))
    assert np.abs(oracle_logits(changed, PROMPT) - oracle_logits(checkpoint, PROMPT)).max() > 0.03


def test_interleaved_rotation_with_listed_factors_matches_transformers(tmp_path: Path) -> None:
    """What GGUF makes of Llama 3.1: q and k rows interleaved, scaling as divisors of the frequencies."""
    model = save("llama3", tmp_path)
    plain = LlamaRotaryEmbedding(TINY["llama"]()).inv_freq  # the same theta, unscaled
    assert LLAMA3_ROPE["rope_theta"] == TINY["llama"]().rope_parameters["rope_theta"]
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    checkpoint = read_checkpoint(tmp_path)
    tensors = {name: interleave(tensor) for name, tensor in checkpoint.tensors.items()}
    tensors["rope_freqs.weight"] = Tensor.from_numpy("rope_freqs.weight", factors)
    config = replace(checkpoint.config, rope_style="interleaved", rope_scaling=None)
    logits = oracle_logits(replace(checkpoint, config=config, tensors=tensors), PROMPT)
    np.testing.assert_allclose(logits, next_logits(model, PROMPT), atol=1e-4, rtol=1e-5)


def interleave(tensor: Tensor) -> Tensor:
    """Rows (i, i + 16) of each head of 32 become rows (2i, 2i + 1)."""
    if not tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        return tensor
    values = tensor.numpy()
    halves = values.reshape(-1, 2, 16, values.shape[1])
    return Tensor.from_numpy(tensor.name, halves.swapaxes(1, 2).reshape(values.shape))


# Beginnings of "The capital of France is", in each file's ids.
REAL = {
    "smollm2": [504, 3575, 282, 4649, 314],
    "qwen2.5-0.5b": [785, 6722, 315, 9625, 374],
    "gemma3-270m": [2, 818, 5279, 529, 7001, 563],
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_match_transformers(name: str, model_path: Any) -> None:
    path = model_path(name)
    reference = real_reference(path)
    ids = (REAL[name] * 4)[:20]
    expected = next_logits(reference, ids)
    model = load_model(path)
    logits = Oracle(model.plan, model.checkpoint.tensors).logits(ids)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=5e-4, rtol=0)
    assert (logits.argmax(1) == expected.argmax(1)).all()


def run(ops: list[Op], widths: dict[str, int], weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """`ops` behind an embedding into x, as a plan of their own."""
    vocab = widths["logits"]
    plan = Plan(
        ops=(Embed(out="x", weight="embed"), *ops),
        widths=widths,
        ropes={},
        layers=1,
        kv_heads=1,
        head_dim=16,
        vocab=vocab,
        context=64,
    )
    return Oracle(plan, {name: Tensor.from_numpy(name, values) for name, values in weights.items()}).logits(tokens)


RNG = np.random.default_rng(2)
EMBED = RNG.normal(size=(48, 32)).astype(np.float32)
TOKENS = [3, 47, 0, 3]
X = torch.from_numpy(EMBED[TOKENS])


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_with_residual_matches_torch(kind: Any) -> None:
    weight, bias = normal(32), normal(32)
    op = Norm(out="logits", x="x", weight="w", bias="b", eps=1e-2, kind=kind, residual="x")
    found = run([op], {"x": 32, "logits": 48}, {"embed": EMBED, "w": weight, "b": bias}, TOKENS)
    gain, shift = torch.from_numpy(weight), torch.from_numpy(bias)
    if kind == "layer":
        expected = torch.nn.functional.layer_norm(X, (32,), gain, shift, 1e-2)
    else:
        expected = torch.nn.functional.rms_norm(X, (32,), gain, 1e-2) + shift
    np.testing.assert_allclose(found, expected + X, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", None])
def test_matmul_epilogue_matches_torch(activation: Any) -> None:
    """Two weights side by side, biases, activation, then the residual. Values large enough to overflow exp."""
    first, second, bias_1, bias_2 = normal(20, 32) * 30, normal(12, 32), normal(20), normal(12)
    weights = {"embed": EMBED, "w1": first, "w2": second, "b1": bias_1, "b2": bias_2}
    op = MatMul(out="logits", x="x", weights=("w1", "w2"), biases=("b1", "b2"), activation=activation, residual="x")
    found = run([op], {"x": 32, "logits": 48}, weights, TOKENS)
    product = X @ torch.from_numpy(np.concatenate([first, second])).T + torch.from_numpy(
        np.concatenate([bias_1, bias_2])
    )
    np.testing.assert_allclose(found, activated(product, activation) + X, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_matmul_and_select_match_torch(activation: Any) -> None:
    gate, up = normal(48, 32), normal(48, 32)
    ops: list[Op] = [
        Select(out="s", x="x"),
        GatedMatMul(out="logits", x="s", gate="gate", up="up", activation=activation),
    ]
    found = run(ops, {"x": 32, "s": 32, "logits": 48}, {"embed": EMBED, "gate": gate, "up": up}, TOKENS)
    expected = activated(X @ torch.from_numpy(gate).T, activation) * (X @ torch.from_numpy(up).T)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-5)


def activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation is None:
        return x
    functional = torch.nn.functional
    return functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")


def test_embedding_scale_and_positions() -> None:
    positions = normal(64, 32)
    ops: list[Op] = [Embed(out="logits", weight="embed", scale=3.0, positions="p")]
    found = run(ops, {"x": 32, "logits": 48}, {"embed": EMBED, "p": positions}, TOKENS)
    np.testing.assert_allclose(found, 3 * EMBED[TOKENS] + positions[:4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ids", [[], [0] * 65, [48], [-1]])
def test_ids_out_of_range_are_refused(ids: list[int]) -> None:
    with pytest.raises(RequestError):
        run([], {"x": 32, "logits": 48}, {"embed": EMBED}, ids)
