"""Other engines under the same measurement, each on the same weights and token ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from millis.bench.engine import Engine
from millis.bench.reference import reference_model, torch_module
from millis.tasks.model import LanguageModel
from millis.types import ModelError, RequestError


class Transformers:
    """PyTorch through transformers, a KV cache and a plain greedy loop, in bfloat16."""

    def __init__(self, lm: LanguageModel) -> None:
        self.name = "transformers"
        self._torch = torch_module()
        model = reference_model(lm.model.checkpoint, lm.config.threads or 1)
        self._model: Any = model.to(self._torch.bfloat16)

    def run(self, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
        torch = self._torch
        times = [time.perf_counter()]
        with torch.inference_mode():
            ids, cache = torch.tensor([prompt]), None
            for _ in range(new_tokens):
                out = self._model(ids, cache=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                times.append(time.perf_counter())
        return _first_and_gaps(times)


class LlamaCpp:
    """llama.cpp through its Python binding, reading the same GGUF file."""

    def __init__(self, lm: LanguageModel) -> None:
        self.name = "llama.cpp"
        try:
            import llama_cpp
        except ImportError:
            raise ModelError("llama.cpp is not installed; see docs/benchmarks.md for how to build it") from None
        threads = lm.config.threads
        self._llm: Any = llama_cpp.Llama(
            str(lm.path), n_threads=threads, n_threads_batch=threads, n_ctx=4096, verbose=False
        )

    def run(self, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
        self._llm.reset()
        times = [time.perf_counter()]
        for token in self._llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter())
            if len(times) > new_tokens or token < 0:
                break
        return _first_and_gaps(times)


def _first_and_gaps(times: list[float]) -> tuple[float, list[float]]:
    """Seconds at the start and at every token → milliseconds to the first token, and between the others."""
    gaps = [1000 * (after - before) for before, after in pairwise(times)]
    return gaps[0], gaps[1:]


PEERS: Mapping[str, Callable[[LanguageModel], Engine]] = {"transformers": Transformers, "llama.cpp": LlamaCpp}


def make(names: list[str], lm: LanguageModel) -> list[Engine]:
    """The peers by name. RequestError for an unknown one, ModelError for one that is not installed."""
    for name in names:
        if name not in PEERS:
            raise RequestError(f"no peer named {name!r}; there are {', '.join(PEERS)}")
    return [PEERS[name](lm) for name in names]
