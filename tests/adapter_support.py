"""LoRA adapters made by peft: random ones that matter, saved as peft saves them, and their model with them merged."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(model: Any, folder: Path, *, seed: int = 0, size: float = 0.3, rank: int = 4, **settings: Any) -> Any:
    """Saves a random adapter of `model` in `folder`; returns a copy of the model with it merged by peft.

    size: of the change of each weight, relative to the weight.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft and transformers find outdated in each other
        return _save(model, folder, seed, size, {"r": rank, "lora_alpha": 2 * rank, **settings})


def _save(model: Any, folder: Path, seed: int, size: float, settings: dict[str, Any]) -> Any:
    torch.manual_seed(seed)
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    changed = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    with torch.no_grad():
        for name, module in changed.named_modules():
            if "default" in getattr(module, "lora_B", {}):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                b.normal_()
                delta = module.scaling["default"] * (b @ a)
                b.mul_(size * module.base_layer.weight.norm() / delta.norm())
                assert b.abs().max() > 0, name
    changed.save_pretrained(folder)
    return changed.merge_and_unload().eval()
