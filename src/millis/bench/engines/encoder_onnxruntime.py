"""ONNX Runtime as an encoder, on a float32 export of the same model: a text in, the best label out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Engine:
    """Reads spec["onnx"]: token ids and their mask in, logits or hidden states out first."""

    def __init__(self, spec: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = onnxruntime.InferenceSession(spec["onnx"], options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]
        self._tokenizer: Any = Tokenizer.from_file(str(Path(spec["model"]) / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._labels = spec["labels"]
        self.version = onnxruntime.__version__

    def run(self, prompt: str, new_tokens: int, emit: Callable[[int], None]) -> None:
        for _ in range(new_tokens):
            ids = np.asarray([self._tokenizer.encode(prompt).ids], np.int64)
            known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            out = self._session.run(None, {name: known[name] for name in self._names})[0]
            emit(int(out[0].argmax()) if self._labels else len(out.mean(1)))
