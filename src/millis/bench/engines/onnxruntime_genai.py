"""ONNX Runtime GenAI, on the int4 model that its own builder made (accuracy level 4: int8 products)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import onnxruntime_genai as og


class Engine:
    """Threads are an overlay on the folder's own settings."""

    def __init__(self, spec: dict[str, Any]) -> None:
        config = og.Config(spec["model"])
        threads = {"intra_op_num_threads": spec["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = og.Model(config)
        self.version = og.__version__

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        params = og.GeneratorParams(self._model)
        length = len(prompt) + new_tokens
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = og.Generator(self._model, params)
        generator.append_tokens(prompt)
        for _ in range(new_tokens):
            generator.generate_next_token()
            emit(int(generator.get_next_tokens()[0]))
