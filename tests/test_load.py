"""From a path to a model: which reader, how long a context, and what is said when it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from millis.models.load import DEFAULT_CONTEXT, build_plan, load_model, read_checkpoint
from millis.models.oracle import Oracle
from millis.types import FormatError, ModelError, RequestError
from reference import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


def test_a_folder_is_read_as_hugging_face(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.path == folder
    assert (checkpoint.config.architecture, checkpoint.config.layers) == ("llama", 2)
    assert checkpoint.config.rope_style == "half" and not checkpoint.metadata


def test_a_file_is_read_as_gguf(model_path: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(model_path("smollm2"))
    assert (checkpoint.config.architecture, checkpoint.config.layers) == ("llama", 30)
    assert checkpoint.config.rope_style == "interleaved"
    assert checkpoint.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("name", "layers", "widths"),
    [
        ("smollm2", 30, {"x": 576, "qkv": 960, "a": 576, "f": 1536, "logits": 49152}),
        ("qwen2.5-0.5b", 24, {"x": 896, "qkv": 1152, "a": 896, "f": 4864, "logits": 151936}),
        ("gemma3-270m", 18, {"x": 640, "qkv": 1536, "a": 1024, "f": 2048, "logits": 262144}),
    ],
)
def test_real_models_have_the_sizes_they_are_known_by(
    name: str, layers: int, widths: dict[str, int], model_path: Callable[[str], Path]
) -> None:
    model = load_model(model_path(name))
    assert model.plan.layers == layers
    assert {buffer: model.plan.widths[buffer] for buffer in widths} == widths
    assert set(model.plan.weights()) == set(model.checkpoint.tensors)
    assert model.plan.context == 8192  # smollm2's own; the others were made for 32768


def test_the_default_context_is_the_models_own(folder: Path) -> None:
    model = load_model(folder)
    assert model.plan.context == model.checkpoint.config.context == 256
    assert model.plan.ropes["rope"].shape[1] == 256


def test_the_default_context_is_limited(folder: Path) -> None:
    """A longer one is there for the asking."""
    checkpoint = read_checkpoint(folder)
    longer = replace(checkpoint, config=replace(checkpoint.config, context=2 * DEFAULT_CONTEXT))
    assert build_plan(longer, 2 * DEFAULT_CONTEXT).context == 16384


def test_a_context_may_be_shorter_and_logits_stay(folder: Path) -> None:
    short, long = load_model(folder, context=8), load_model(folder)
    ids = [5, 90, 2, 33, 7, 7, 0, 95]
    np.testing.assert_array_equal(
        Oracle(short.plan, short.checkpoint.tensors).logits(ids), Oracle(long.plan, long.checkpoint.tensors).logits(ids)
    )
    with pytest.raises(RequestError, match="1 to 8 tokens, not 9"):
        Oracle(short.plan, short.checkpoint.tensors).logits([*ids, 1])


@pytest.mark.parametrize("context", [257, 0, -1, 2**62])
def test_a_context_the_model_was_not_made_for_is_refused(context: int, folder: Path) -> None:
    with pytest.raises(RequestError, match=rf"context must lie in \[1, 256\] for this model, not {context}"):
        load_model(folder, context=context)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at .*absent; give a .gguf file or a Hugging Face folder"):
        load_model(tmp_path / "absent")


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError):
        load_model(tmp_path / "notes.txt")
    with pytest.raises(ModelError):
        load_model(tmp_path)
