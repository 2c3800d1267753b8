"""The package's float32 reference (for `evaluate` and `bench`) against the tests' own, which shares no reader."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millis.bench.reference import log_likelihood, reference_model, torch_module
from millis.models.load import read_checkpoint
from millis.models.tensor import Tensor
from millis.types import ModelError
from reference import ROPE, folder_model, next_logits, tiny_model
from reference import real_reference as independent

IDS = [5, 17, 301, 9, 44, 120, 7, 66]


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-0.5b", "gemma3-270m"])
def test_logits_of_the_real_models(name: str, model_path: Callable[[str], Path]) -> None:
    path = model_path(name)
    want = next_logits(independent(path), IDS)
    model = reference_model(read_checkpoint(path), 1)
    with torch.inference_mode():
        got = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(got, want, atol=5e-4)


TINY_ONES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma3", "granite", "granitemoehybrid", "smollm3", "ernie4_5",
    "phi3", "gemma", "exaone4", "hunyuan", "olmo2", "olmo3", "lfm2",
]  # fmt: skip


@pytest.mark.parametrize("name", TINY_ONES)
def test_logits_of_tiny_checkpoints(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    want = next_logits(folder_model(tmp_path), [1, 2, 3, 4])
    checkpoint = read_checkpoint(tmp_path)
    if name in ("gemma3", "exaone4") and checkpoint.config.rope_scaling is not None:
        with pytest.raises(ModelError, match="no float32 reference"):
            reference_model(checkpoint, 1)
        return
    with torch.inference_mode():
        got = reference_model(checkpoint, 1)(torch.tensor([[1, 2, 3, 4]])).logits[0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(("name", "window"), [("mistral", 3), ("qwen2", 3), ("exaone4", 3)])
def test_windows_are_kept(name: str, window: int, tmp_path: Path) -> None:
    theirs = tiny_model(name)
    theirs.config.sliding_window = window
    if name == "qwen2":
        theirs.config.update({"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]})
    if name == "exaone4":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        theirs.config.update({"layer_types": kinds, "rope_parameters": ROPE})
    theirs.save_pretrained(tmp_path)
    ids = list(range(1, 12))
    with torch.inference_mode():
        got = reference_model(read_checkpoint(tmp_path), 1)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(got, next_logits(folder_model(tmp_path), ids), atol=1e-4)


def test_log_likelihood_is_the_sum_of_log_softmax(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    logits = next_logits(folder_model(tmp_path), [3, 1, 4, 1, 5]).astype(np.float64)
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    want = sum(logs[i, token] for i, token in enumerate([1, 4, 1, 5]))
    got = log_likelihood(reference_model(read_checkpoint(tmp_path), 1), [3, 1, 4, 1, 5])
    assert got == pytest.approx(want, abs=1e-3)


def test_what_has_no_reference_says_so(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="gpt2"):
        reference_model(checkpoint, 1)
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    checkpoint = read_checkpoint(tmp_path / "llama")
    without = {name: t for name, t in checkpoint.tensors.items() if name != "blk.0.ffn_up.weight"}
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj"):
        reference_model(replace(checkpoint, tensors=without), 1)
    factors = {"rope_freqs.weight": Tensor.from_numpy("rope_freqs.weight", np.ones(16, np.float32))}
    with pytest.raises(ModelError, match=r"no float32 reference for a llama with rope_freqs\.weight"):
        reference_model(replace(checkpoint, tensors={**checkpoint.tensors, **factors}), 1)
    part = replace(checkpoint, config=replace(checkpoint.config, rotary_dim=16))
    with pytest.raises(ModelError, match="no float32 reference"):
        reference_model(part, 1)
    own = replace(checkpoint.config, attention_scale=0.5)
    with pytest.raises(ModelError, match="no float32 reference"):
        reference_model(replace(checkpoint, config=own), 1)


def test_a_missing_torch_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'", name="torch")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModelError, match=r"needs torch.*millis\[train\]"):
        torch_module()
