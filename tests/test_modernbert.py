"""ModernBERT against transformers: windows over long texts, both forms of its settings, heads; hostile folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from encoders import hidden, logits, random_ids, save, tiny
from millis import Encoder, _native
from millis.config import EngineConfig
from millis.engine.encoder_runner import EncoderRunner
from millis.models.load import load_model
from millis.models.oracle import Oracle
from millis.types import FormatError

LONG = 300


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("window", [2, 12, 70, 400])
def test_windows_over_long_texts(window: int, isa: str, tmp_path: Path) -> None:
    """Longer than the queries that are taken together, so that most see neither the first nor the last key."""
    model = tiny("modernbert", max_position_embeddings=LONG, local_attention=window)
    ours = load_model(save(model, tmp_path))
    native = EncoderRunner(ours, EngineConfig(isa=isa, threads=2, precision="exact"))
    texts = [random_ids(length) for length in (63, 64, 65, 130, LONG)]
    found = native.logits(texts)
    for ids, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(row, logits(model, ids), atol=3e-4)
        np.testing.assert_allclose(native.logits([ids])[0], row, atol=3e-4)


def test_eight_bits_stay_near(tmp_path: Path) -> None:
    ours = load_model(save(tiny("modernbert"), tmp_path))
    ids = random_ids(40)
    near = EncoderRunner(ours, EngineConfig(threads=1)).embeddings([ids])[0]
    exact = Oracle(ours.plan, ours.checkpoint.tensors).encode(ids)[0]
    assert np.dot(near, exact) > 0.99 * np.linalg.norm(near) * np.linalg.norm(exact)


def settings(folder: Path, change: dict[str, Any], *gone: str) -> None:
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in values.items() if key not in gone}))


def test_settings_of_transformers_4(tmp_path: Path) -> None:
    """As published folders have them: a period instead of layer types, two bases instead of rope_parameters."""
    bases = {"full_attention": 5e3, "sliding_attention": 7e2}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny("modernbert", layer_types=kinds, rope_parameters=rope, classifier_pooling="mean")
    folder, ids = save(model, tmp_path), random_ids(50)
    older = {"global_attn_every_n_layers": 2, "global_rope_theta": 5e3, "local_rope_theta": 7e2}
    settings(folder, older, "layer_types", "rope_parameters")
    ours = load_model(folder)
    assert ours.checkpoint.config.windows == (0, 12, 0, 12)
    np.testing.assert_allclose(Oracle(ours.plan, ours.checkpoint.tensors).encode(ids)[1], logits(model, ids), atol=2e-5)


def test_the_body_of_a_model_that_predicts_words(tmp_path: Path) -> None:
    """What is published: a head for masked words beside the body, which is left out."""
    model = tiny("modernbert", head=False)
    folder, ids = save(model, tmp_path), random_ids(30)
    tensors = {f"model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    tensors |= {"head.dense.weight": np.zeros((64, 64), np.float32), "head.norm.weight": np.zeros(64, np.float32)}
    tensors |= {"decoder.bias": np.zeros(120, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    settings(folder, {"architectures": ["ModernBertForMaskedLM"]})
    encoder = Encoder(folder, threads=1, precision="exact")
    assert encoder.labels == () and encoder.embed(["where is my card"]).shape == (1, 64)
    found = encoder.runner.embeddings([ids])[0]
    np.testing.assert_allclose(found, hidden(model, ids).mean(0), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"attention_bias": True}, "attention_bias to True"),
        ({"norm_bias": True}, "norm_bias to True"),
        ({"classifier_pooling": "max"}, "classifier_pooling 'max' is not cls or mean"),
        ({"classifier_activation": "relu"}, "the activation 'relu' is not gelu"),
        ({"hidden_activation": "silu"}, "the activation 'silu' is not gelu"),
        ({"local_attention": 1}, "others 1 wide, make no sense"),
        ({"layer_types": None, "global_attn_every_n_layers": 0}, "one in 0 global"),
        ({"num_hidden_layers": 1 << 40}, "make no sense"),
        ({"layer_types": ["full_attention"]}, "1 attention windows for 4 layers"),
        ({"layer_types": ["chunked"] * 4}, "layer_types must list"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type to 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"intermediate_size": 95}, "must be a matrix of 190 rows"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"architectures": ["ModernBertForTokenClassification"]}, "has a head that Millis does not run"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = save(tiny("modernbert"), tmp_path)
    settings(folder, change)
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


def test_tensors_that_have_no_place(tmp_path: Path) -> None:
    folder = save(tiny("modernbert"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.attn_norm.weight": np.ones(64, np.float32)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"'blk\.0\.attn_norm\.weight' has no place"):
        load_model(folder)
    save_file(tensors | {"model.layers.0.attn.Wk.weight": np.ones(64, np.float32)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"'model\.layers\.0\.attn\.Wk\.weight' has no place"):
        load_model(folder)
