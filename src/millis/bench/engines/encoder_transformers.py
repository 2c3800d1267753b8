"""PyTorch through transformers as an encoder, float32: a text in, the best label out, tokenizing included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers


class Engine:
    """Reads the same folder."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(spec["model"])
        kind: Any = transformers.AutoModelForSequenceClassification if spec["labels"] else transformers.AutoModel
        self._model = kind.from_pretrained(spec["model"], dtype=torch.float32).eval()
        self._labels = spec["labels"]
        self.version = f"{transformers.__version__} torch {torch.__version__}"

    def run(self, prompt: str, new_tokens: int, emit: Callable[[int], None]) -> None:
        with torch.inference_mode():
            for _ in range(new_tokens):
                out = self._model(**self._tokenizer(prompt, return_tensors="pt"))
                if self._labels:
                    emit(int(out.logits.softmax(-1).argmax()))
                else:
                    emit(len(torch.nn.functional.normalize(out.last_hidden_state.mean(1))))
