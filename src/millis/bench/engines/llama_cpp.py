"""llama.cpp through the C functions of its Python binding: no Python but one loop, as in its own llama-bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp as c


class Engine:
    """Reads the same GGUF file. Its own defaults but for threads and context."""

    def __init__(self, spec: dict[str, Any]) -> None:
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(spec["model"].encode(), c.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp could not load the file")
        params = c.llama_context_default_params()
        params.n_ctx = spec["context"]
        params.n_threads = params.n_threads_batch = spec["threads"]
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._batch = params.n_batch
        self._greedy = c.llama_sampler_init_greedy()
        self.version = f"binding {c.__version__}"

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        for at in range(0, len(prompt), self._batch):
            self._decode(prompt[at : at + self._batch])
        for left in reversed(range(new_tokens)):
            token = c.llama_sampler_sample(self._greedy, self._context, -1)
            emit(token)
            if left:
                self._decode([token])

    def _decode(self, tokens: list[int]) -> None:
        ids = (c.llama_token * len(tokens))(*tokens)
        if (code := c.llama_decode(self._context, c.llama_batch_get_one(ids, len(tokens)))) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
