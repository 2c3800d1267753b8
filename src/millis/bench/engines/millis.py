"""Millis itself, as a worker of the bench runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import millis
from millis.tasks.model import LanguageModel  # and all that it imports: so are others before the clock runs
from millis.types import SamplingParams


class Engine:
    """Through the engine's events, so that each token has its time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        # Random ids invite repetition, and a guess would count as a step.
        options = {name: spec[name] for name in ("threads", "context", "precision")}
        self._lm = LanguageModel(spec["model"], speculation="off", **options)
        self.version = f"{millis.__version__} {self._lm.runner.isa}"
        self.facts = {"token_bytes": self._lm.runner.token_bytes, "isa": self._lm.runner.isa}

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        request = self._lm.engine.submit(prompt, SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))
        for event in self._lm.engine.events(request):
            if event.token is not None:
                emit(event.token)
