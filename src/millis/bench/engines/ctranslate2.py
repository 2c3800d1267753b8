"""CTranslate2 in int8, on the folder that its own converter made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2


class Engine:
    """It takes the words of the vocabulary for ids; the converter wrote them in order."""

    def __init__(self, spec: dict[str, Any]) -> None:
        folder = Path(spec["model"])
        self._words = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        threads = spec["threads"]
        self._generator = ctranslate2.Generator(str(folder), compute_type="int8", intra_threads=threads)
        self.version = ctranslate2.__version__

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        steps = self._generator.generate_tokens(
            [self._words[token] for token in prompt],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
        )
        for step in steps:
            emit(step.token_id)
