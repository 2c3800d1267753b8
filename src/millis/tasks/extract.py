"""Extraction: what a text says, as JSON of a schema. The grammar guarantees the form, the model finds the content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from millis.tasks.ask import ask, listed
from millis.tasks.language import language
from millis.types import Completion, FinishReason, RequestError, Timings

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

_ASKED = {
    "en": "Extract the following from the text and answer as JSON of this schema:\n{schema}\n\nText: {text}",
    "zh": "请从下面的文本中提取信息，按此 JSON 模式回答：\n{schema}\n\n文本：{text}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """value: JSON of the schema as Python has it, or an instance of the pydantic model that was given.

    None where the answer was cut before its end, or where a validator of the model refused it; `error` says why.
    """

    value: Any
    text: str
    finish_reason: FinishReason
    timings: Timings
    error: str | None = None


def extract(
    lm: LanguageModel,
    texts: str | Sequence[str],
    schema: Any,
    *,
    deadline_ms: float | None = None,
    max_tokens: int = 512,
    instruction: str | None = None,
) -> Extraction | list[Extraction]:
    """See TaskMethods.extract."""
    given, single = listed(texts)
    model = schema if hasattr(schema, "model_json_schema") else None
    form = _form(schema if model is None else model.model_json_schema())
    shown = json.dumps(form, ensure_ascii=False)
    if instruction is not None and "{text}" not in instruction:
        raise RequestError("the instruction must hold {text}")
    prompts = [
        text.join((instruction or _ASKED[language(text)]).replace("{schema}", shown).split("{text}")) for text in given
    ]
    outs = ask(lm, prompts, deadline_ms=deadline_ms, schema=form, max_tokens=max_tokens)
    found = [_read(out, model) for out in outs]
    return found[0] if single else found


def _form(schema: Any) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(f"a schema is a mapping, JSON text or a pydantic model, not {type(schema).__name__}")
    return schema


def _read(out: Completion, model: Any) -> Extraction:
    value, error = None, None
    try:
        value = json.loads(out.text)
        value = value if model is None else model.model_validate(value)
    except ValueError as problem:  # pydantic's ValidationError is one
        cut = "the answer ended before its JSON did; allow more with max_tokens"
        value, error = None, cut if out.finish_reason == "length" else str(problem)
    return Extraction(value=value, text=out.text, finish_reason=out.finish_reason, timings=out.timings, error=error)
