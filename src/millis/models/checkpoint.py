"""A model as it lies on disk: its configuration, its tensors, and what its file says beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millis.models.config import ModelConfig
from millis.models.tensor import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Tensors carry GGUF's names (`blk.0.attn_q.weight`, `token_embd.weight` …) whatever file they come from."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # GGUF's key-values; empty for a Hugging Face folder
