"""Millis as an encoder: a text in, the best label out, tokenizing included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import millis


class Engine:
    """Calls what a program calls."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._encoder = millis.Encoder(spec["model"], threads=spec["threads"], precision=spec.get("precision"))
        self._index = {label: i for i, label in enumerate(self._encoder.labels)}
        runner = self._encoder.runner
        self.version = f"{millis.__version__} {runner.isa}"
        self.facts = {"weight_bytes": runner.weight_bytes, "labels": len(self._index)}

    def run(self, prompt: str, new_tokens: int, emit: Callable[[int], None]) -> None:
        for _ in range(new_tokens):
            if self._index:
                emit(self._index[str(self._encoder.classify(prompt))])
            else:
                emit(len(self._encoder.embed([prompt])))
