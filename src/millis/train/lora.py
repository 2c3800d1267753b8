"""Low-rank adapters (Hu et al., 2021): a frozen matrix plus a small product beside it; kept in peft's format.

Ours rather than peft's: its two libraries more would buy nothing that these lines do not do. Its format is public, and
the tests let it read what is written here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from millis.types import ModelError


class LoraLinear(nn.Module):
    """y = W x + (alpha / rank) B A x; only A [rank, inputs] and B [outputs, rank] are trained. B begins as zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)
        out: Tensor = self.base(x)
        return out + low * self.scale

    def merged(self) -> nn.Linear:
        """The one matrix that does the same."""
        with torch.no_grad():
            self.base.weight += self.scale * (self.lora_B @ self.lora_A)
        return self.base


def add_adapter(model: Any, rank: int, alpha: float) -> None:
    """Freezes the model and puts an adapter at every matrix of its layers. ModelError where it has none."""
    model.requires_grad_(False)
    output = model.get_output_embeddings()
    matrices = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    if not matrices:
        raise ModelError(f"{type(model).__name__} has no matrices that an adapter goes with; use --finetune full")
    for name, matrix in matrices:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoraLinear(matrix, rank, alpha))


def write_adapter(model: nn.Module, folder: Path, base: str, alpha: float) -> None:
    """adapter_model.safetensors and adapter_config.json, as peft reads them; `base` is the model they belong to."""
    tensors: dict[str, Tensor] = {}
    names: set[str] = set()
    rank = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            for part in ("lora_A", "lora_B"):
                tensors[f"base_model.model.{name}.{part}.weight"] = getattr(module, part).detach().contiguous()
            names.add(name.rpartition(".")[2])
            rank = module.lora_A.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def merge_adapter(model: nn.Module) -> None:
    """The model again as it was made, its matrices changed by what was learned."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.merged())
