"""PyTorch through transformers: bfloat16, a KV cache and a plain greedy loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers


class Engine:
    """Reads the folder of dequantised weights."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        factory: Any = transformers.AutoModelForCausalLM
        self._model = factory.from_pretrained(spec["model"], dtype=torch.bfloat16).eval()
        self.version = f"{transformers.__version__} torch {torch.__version__}"

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        with torch.inference_mode():
            ids, cache = torch.tensor([prompt]), None
            for _ in range(new_tokens):
                out = self._model(ids, cache=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1:].argmax(-1), out.cache
                emit(int(ids))
