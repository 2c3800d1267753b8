"""OpenVINO GenAI, which reads the same GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


class Engine:
    """The pipeline with its own defaults but for threads."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._pipeline = genai.LLMPipeline(spec["model"], "CPU", INFERENCE_NUM_THREADS=spec["threads"])
        self.version = genai.__version__

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        self._pipeline.generate(ov.Tensor(np.array([prompt], np.int64)), config, _Streamer(emit))


class _Streamer(genai.StreamerBase):  # type: ignore[misc]
    """Tokens as they come, not decoded."""

    def __init__(self, emit: Callable[[int], None]) -> None:
        super().__init__()
        self._emit = emit

    def write(self, token: int | Sequence[int]) -> Any:
        for each in token if isinstance(token, Sequence) else [token]:
            self._emit(each)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass
