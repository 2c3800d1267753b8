"""`millis.load`: the model of a name, as what it is: one that writes, one that reads, or one that does both in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

from millis import hub
from millis.config import Precision
from millis.models.load import is_encoder, is_seq2seq
from millis.tasks import checks
from millis.tasks.encoder import Encoder
from millis.tasks.model import LanguageModel
from millis.tasks.readable import check_readable
from millis.tasks.seq2seq import Seq2Seq

Writes = Literal["smollm2", "qwen2.5-0.5b", "qwen2.5-1.5b", "gemma3-270m"]  # of the catalogue
Reads = Literal["minilm", "e5-small-zh", "roformer-small-zh"]


@overload
def load(
    name: Writes = "smollm2",
    *,
    threads: int | None = None,
    precision: Precision = "fast",
    context: int | None = None,
    **options: Any,
) -> LanguageModel: ...
@overload
def load(
    name: Reads,
    *,
    threads: int | None = None,
    precision: Precision = "fast",
    context: int | None = None,
    **options: Any,
) -> Encoder: ...
@overload
def load(
    name: str | Path,
    *,
    threads: int | None = None,
    precision: Precision = "fast",
    context: int | None = None,
    **options: Any,
) -> Any: ...
def load(
    name: str | Path = "smollm2",
    *,
    threads: int | None = None,
    precision: Precision = "fast",
    context: int | None = None,
    **options: Any,
) -> Any:
    """Loads a model, pulling it first if it is in the catalogue or on the hub and not yet on disk.

    A model that writes text is a LanguageModel, one that embeds or classifies texts an Encoder (a decoder that was
    trained for this, too), one that reads a text and then writes another (t5, marian) a Seq2Seq. Which it is, a type
    checker knows of the names in the catalogue; for others say it, `lm: millis.LanguageModel = millis.load(path)`, or
    call the class itself, which takes its own kind only.

    >>> lm = millis.load("smollm2", threads=2)
    >>> print(lm.generate("Once upon a time", max_tokens=64))
    """
    from millis.hub.bar import Bar

    checks.path(name, "a model's name")
    with Bar() as bar:
        path = hub.resolve(str(name), bar, None, check_readable)
        kind = Encoder if is_encoder(path) else Seq2Seq if is_seq2seq(path) else LanguageModel
        return kind(name, progress=bar, threads=threads, precision=precision, context=context, **options)
