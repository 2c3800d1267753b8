"""Gradients of products against torch's autograd through transformers' models, and the costs made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millis.models.load import Model, build_plan, read_checkpoint
from millis.models.oracle import softmax
from millis.models.tensor import Tensor
from millis.quantize.gradients import Gradients
from millis.quantize.importance import Importance, load, measure, save
from millis.types import FormatError
from reference import TINY, tiny_model

PROMPT = np.random.default_rng(1).integers(0, 96, 40).tolist()


class Fixed:
    """A generator whose draws are set beforehand."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = draws

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        return self.draws.reshape(shape)


class Weights:
    """Sums up gᵀ · x: the gradient by each weight."""

    def __init__(self) -> None:
        self.found: dict[str, np.ndarray] = {}
        self.looked_up: np.ndarray | None = None

    def product(self, name: str, x: np.ndarray, gradient: np.ndarray) -> None:
        assert name not in self.found
        self.found[name] = gradient.T @ x

    def embedding(self, name: str, gradient: np.ndarray) -> None:
        self.looked_up = gradient


def run(name: str, folder: Path) -> tuple[Any, Any, Weights, np.ndarray]:
    """The transformers model, ours, the gradients, and the uniform draws used."""
    model = tiny_model(name)
    model.save_pretrained(folder)
    checkpoint = read_checkpoint(folder)
    draws, seen = np.random.default_rng(2).random(len(PROMPT)), Weights()
    Gradients(build_plan(checkpoint, 64), checkpoint.tensors, seen).run(PROMPT, Fixed(draws))  # type: ignore[arg-type]
    return model, checkpoint, seen, draws


@pytest.mark.parametrize("name", TINY)
def test_gradients_by_every_weight_are_those_of_torch(name: str, tmp_path: Path) -> None:
    model, checkpoint, seen, draws = run(name, tmp_path)
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, out: (out.retain_grad(), embedded.append(out))[0]
    )
    logits = model(torch.tensor([PROMPT])).logits[0]
    p = torch.softmax(logits.detach().double(), -1)
    drawn = (torch.cumsum(p, -1) < torch.from_numpy(draws)[:, None]).sum(-1)
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    tied = model.config.tie_word_embeddings
    with torch.no_grad():  # the sum over both uses is the parameter's; take away that of the look-up
        if tied:
            output = model.get_output_embeddings().weight
            scale = 64**0.5 if name in ("gemma", "gemma3") else 1  # of what gemma looked up
            by_row = embedded[0].grad[0] * scale
            output.grad -= torch.zeros_like(output).index_add_(0, torch.tensor(PROMPT), by_row)
            np.testing.assert_allclose(seen.looked_up, by_row, atol=2e-4 * float(by_row.abs().max()))
    path = tmp_path / "gradients"
    state = {key: value.grad if value.grad is not None else value for key, value in model.named_parameters()}
    path.mkdir()
    from safetensors.torch import save_file

    save_file({key: value.detach().contiguous() for key, value in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text((tmp_path / "config.json").read_text())
    expected = read_checkpoint(path).tensors  # renamed and laid out as ours
    assert {key for key in seen.found} == {
        key for key, value in checkpoint.tensors.items()
        if len(value.shape) == 2 and not key.endswith(("position_embd.weight", "conv.weight"))
        and (tied or key != "token_embd.weight")
    }  # fmt: skip
    for key, found in seen.found.items():
        wanted = expected[key].numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max(), err_msg=key)


def test_the_predicted_divergence_is_that_of_small_errors(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    plan = build_plan(checkpoint, 64)
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 96, 48).tolist() for _ in range(24)]
    costs = measure(Model(checkpoint, plan), windows)
    from millis.models.oracle import Oracle

    for name in ("blk.0.ffn_down.weight", "blk.1.attn_v.weight", "output.weight", "token_embd.weight"):
        weight = checkpoint.tensors[name].numpy()
        found, predicted = [], []
        for _ in range(4):
            noise = rng.normal(0, 0.02 * weight.std(), weight.shape).astype(np.float32)
            changed = {**checkpoint.tensors, name: Tensor.from_numpy(name, weight + noise)}
            before, after = Oracle(plan, checkpoint.tensors), Oracle(plan, changed)
            for window in windows[:8]:
                p, q = softmax(before.logits(window)), softmax(after.logits(window))
                found.append(float(np.mean(np.sum(p * (np.log(p) - np.log(q)), -1))))
            predicted.append(costs[name].cost(np.sum(costs[name].columns * noise.astype(np.float64) ** 2, axis=1)))
        assert 0.5 < np.mean(found) / np.mean(predicted) < 2, name


def test_importance_survives_its_file_and_only_under_its_key(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kept = {"a.weight": Importance(rng.random(5, np.float32), rng.random(3, np.float32), 0.25)}
    save(tmp_path / "a.npz", kept, "model and text")
    found = load(tmp_path / "a.npz", "model and text")
    assert found is not None and found["a.weight"].embedding == 0.25
    assert np.array_equal(found["a.weight"].columns, kept["a.weight"].columns)
    assert np.array_equal(found["a.weight"].rows, kept["a.weight"].rows)
    assert load(tmp_path / "a.npz", "another text") is None and load(tmp_path / "b.npz", "") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(FormatError, match="no importance matrix of Millis"):
        load(tmp_path / "a.npz", "model and text")
