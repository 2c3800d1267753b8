"""Millis: real-time language models on the machine you have.

>>> import millis
>>> lm = millis.load("smollm2")
>>> out = lm.generate("Once upon a time", max_tokens=32)
>>> out.text, out.timings.first_token_ms
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from millis.types import (
    Classification,
    Completion,
    DeadlineError,
    FormatError,
    MillisError,
    ModelError,
    OverloadError,
    PullError,
    RequestError,
    SamplingParams,
    TemplateError,
    Timings,
    TokenLogprob,
)

if TYPE_CHECKING:
    from millis.config import EngineConfig
    from millis.tasks.calibration import Calibration
    from millis.tasks.cascade import Cascade, cascade
    from millis.tasks.encoder import Encoder
    from millis.tasks.index import Index
    from millis.tasks.load import load
    from millis.tasks.model import LanguageModel, Stream
    from millis.tasks.seq2seq import Seq2Seq

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Cascade",
    "Classification",
    "Completion",
    "DeadlineError",
    "Encoder",
    "EngineConfig",
    "FormatError",
    "Index",
    "LanguageModel",
    "MillisError",
    "ModelError",
    "OverloadError",
    "PullError",
    "RequestError",
    "SamplingParams",
    "Seq2Seq",
    "Stream",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "cascade",
    "load",
]

# Loaded on first use, so that `import millis` costs next to nothing.
_LAZY = {
    "Calibration": "tasks.calibration",
    "Cascade": "tasks.cascade",
    "Encoder": "tasks.encoder",
    "EngineConfig": "config",
    "Index": "tasks.index",
    "LanguageModel": "tasks.model",
    "Seq2Seq": "tasks.seq2seq",
    "Stream": "tasks.model",
    "cascade": "tasks.cascade",
    "load": "tasks.load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"millis.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'millis' has no attribute {name!r}")
