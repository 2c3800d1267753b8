"""The float32 reference: transformers on the very weights of a checkpoint, dequantised. Needs the extra `train`.

Its arithmetic is independent of ours; only the dequantised weights are shared.
"""

from __future__ import annotations

from typing import Any

from millis.models.checkpoint import Checkpoint
from millis.models.transformers_model import torch_module, transformers_model

__all__ = ["log_likelihood", "reference_model", "torch_module"]


def reference_model(checkpoint: Checkpoint, threads: int) -> Any:
    """A transformers model in float32. ModelError for an architecture without such a reference here."""
    torch_module().set_num_threads(threads)
    return transformers_model(checkpoint)


def log_likelihood(model: Any, window: list[int]) -> float:
    """Summed log-probability (nats) of window[1:], each token after those before it."""
    torch = torch_module()
    with torch.inference_mode():
        logits = model(torch.tensor([window])).logits[0, :-1].float()
        targets = torch.tensor(window[1:])
        return -float(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum())
