"""Millis: real-time language models on the machine you have.

>>> import millis
>>> lm = millis.load("smollm2")
>>> out = lm.generate("Once upon a time", max_tokens=32)
>>> out.text, out.timings.first_token_ms
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from millis.types import (
    Classification,
    Completion,
    DataError,
    DeadlineError,
    FormatError,
    Grammar,
    GrammarError,
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
    from millis.documents.store import Document
    from millis.tasks.answer import Answer, Source
    from millis.tasks.calibration import Calibration
    from millis.tasks.cascade import Cascade, cascade
    from millis.tasks.conversation import Conversation
    from millis.tasks.encoder import Encoder
    from millis.tasks.extract import Extraction
    from millis.tasks.index import Index
    from millis.tasks.load import load
    from millis.tasks.model import LanguageModel, Stream
    from millis.tasks.moderate import Moderation
    from millis.tasks.seq2seq import Seq2Seq
    from millis.tasks.summarize import Summary
    from millis.tasks.translate import Translation

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Calibration",
    "Cascade",
    "Classification",
    "Completion",
    "Conversation",
    "DataError",
    "DeadlineError",
    "Document",
    "Encoder",
    "EngineConfig",
    "Extraction",
    "FormatError",
    "Grammar",
    "GrammarError",
    "Index",
    "LanguageModel",
    "MillisError",
    "ModelError",
    "Moderation",
    "OverloadError",
    "PullError",
    "RequestError",
    "SamplingParams",
    "Seq2Seq",
    "Source",
    "Stream",
    "Summary",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "Translation",
    "cascade",
    "load",
]

# Loaded on first use, so that `import millis` costs next to nothing.
_LAZY = {
    "Answer": "tasks.answer",
    "Calibration": "tasks.calibration",
    "Cascade": "tasks.cascade",
    "Conversation": "tasks.conversation",
    "Document": "documents.store",
    "Encoder": "tasks.encoder",
    "EngineConfig": "config",
    "Extraction": "tasks.extract",
    "Index": "tasks.index",
    "LanguageModel": "tasks.model",
    "Moderation": "tasks.moderate",
    "Seq2Seq": "tasks.seq2seq",
    "Source": "tasks.answer",
    "Stream": "tasks.model",
    "Summary": "tasks.summarize",
    "Translation": "tasks.translate",
    "cascade": "tasks.cascade",
    "load": "tasks.load",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name):
        if name in _LAZY:
            from importlib import import_module

            return getattr(import_module(f"millis.{_LAZY[name]}"), name)
        raise AttributeError(f"module 'millis' has no attribute {name!r}")
