"""vLLM's CPU build in bfloat16, its engine stepped in this process, prefix cache off."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine


class Engine:
    """Reads the folder of dequantised weights."""

    def __init__(self, spec: dict[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(spec["threads"])
        args = EngineArgs(
            model=spec["model"],
            dtype="bfloat16",
            max_model_len=spec["context"],
            max_num_seqs=1,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine: Any = LLMEngine.from_engine_args(args)
        self._count = 0
        self.version = vllm.__version__

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        self._count += 1
        params = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
        seen = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens = output.outputs[0].token_ids
                for token in tokens[seen:]:
                    emit(token)
                seen = len(tokens)
