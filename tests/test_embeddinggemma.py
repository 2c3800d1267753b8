"""EmbeddingGemma, Gemma 3 that looks both ways, against transformers; Dense modules; hostile folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from encoders import decoder, hidden, random_ids, save
from millis import Encoder, _native
from millis.config import EngineConfig
from millis.engine.encoder_runner import EncoderRunner
from millis.models.load import load_model
from millis.models.oracle import Oracle
from millis.types import FormatError

LENGTHS = (1, 7, 33, 64, 65, 150)
RNG = np.random.default_rng(0)
DENSE = (RNG.normal(0, 0.2, (96, 64)).astype(np.float32), RNG.normal(0, 0.2, (48, 96)).astype(np.float32))


def embedder(folder: Path, **changes: Any) -> Any:
    """A random one with two Dense modules, as sentence-transformers saves it."""
    sizes: dict[str, Any] = {
        "use_bidirectional_attention": True,
        "max_position_embeddings": 160,
        "sliding_window": 24,
        "num_hidden_layers": 3,
    }
    sizes["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
    model = decoder("Gemma3Text", head=False, **{**sizes, **changes})
    save(model, folder)
    types = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(types)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    for number, weight in enumerate(DENSE, 2):
        (folder / f"{number}_Dense").mkdir()
        settings = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
        (folder / f"{number}_Dense" / "config.json").write_text(json.dumps(settings))
        save_file({"linear.weight": weight}, folder / f"{number}_Dense" / "model.safetensors")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("embedder")
    return embedder(folder), folder


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_vectors_are_transformers(isa: str, saved: tuple[Any, Path]) -> None:
    """Grouped heads, their norms, both rotations, windows on either side, and both matrices behind the mean."""
    model, folder = saved
    ours = load_model(folder)
    assert ours.checkpoint.config.windows == (24, 24, 0) and ours.checkpoint.config.dense == 48
    texts = [random_ids(length) for length in LENGTHS]
    wanted = [DENSE[1] @ (DENSE[0] @ hidden(model, ids).mean(0)) for ids in texts]
    native = EncoderRunner(ours, EngineConfig(isa=isa, threads=2, precision="exact"))
    np.testing.assert_allclose(native.embeddings(texts), wanted, atol=2e-4)
    oracle = Oracle(ours.plan, ours.checkpoint.tensors)
    np.testing.assert_allclose([oracle.encode(ids)[0] for ids in texts], wanted, atol=2e-4)


def test_it_embeds_texts(saved: tuple[Any, Path]) -> None:
    encoder = Encoder(saved[1], threads=1)
    found = encoder.embed(["where is my card", "where is my parcel ?"])
    assert encoder.labels == () and found.shape == (2, 48)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_is_no_embedder_is_refused_by_name(tmp_path: Path) -> None:
    embedder(tmp_path)
    config, dense = tmp_path / "config.json", tmp_path / "2_Dense"
    change(dense / "config.json", bias=True)
    with pytest.raises(FormatError, match="2_Dense: Millis runs Dense modules without bias"):
        load_model(tmp_path)
    change(dense / "config.json", bias=False, activation_function="torch.nn.modules.activation.Tanh")
    with pytest.raises(FormatError, match="2_Dense: Millis runs Dense modules without bias"):
        load_model(tmp_path)
    change(dense / "config.json", activation_function="torch.nn.modules.linear.Identity")
    weight = load_file(dense / "model.safetensors")["linear.weight"]
    save_file({"linear.weight": weight[:, :32].copy()}, dense / "model.safetensors")
    with pytest.raises(FormatError, match=r"linear\.weight must be a matrix of 64 columns"):
        load_model(tmp_path)
    save_file({"linear.weight": weight}, dense / "model.safetensors")
    change(config, architectures=["Gemma3ForCausalLM"])
    with pytest.raises(FormatError, match="writes no text"):
        load_model(tmp_path)
    change(config, architectures=["Gemma3TextForSequenceClassification"], num_labels=2)
    with pytest.raises(FormatError, match="no labels"):
        load_model(tmp_path)
    change(config, architectures=["Gemma3TextModel"])
    assert load_model(tmp_path).checkpoint.config.dense == 48


def test_one_way_gemma_runs_no_dense_modules(tmp_path: Path) -> None:
    embedder(tmp_path, use_bidirectional_attention=False)
    with pytest.raises(FormatError, match="does not run the module 'Dense'"):
        load_model(tmp_path)
