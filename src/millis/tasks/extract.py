"""Extraction: what a text says, as JSON of a schema. The grammar guarantees the form, the model finds the content."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from millis.engine.schema import of_a_type
from millis.tasks import checks
from millis.tasks.ask import ask, filled
from millis.tasks.language import language
from millis.types import Completion, FinishReason, GrammarError, RequestError, Timings, brief

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

_ASKED = {
    "en": "Extract the following from the text and answer as JSON of this schema:\n{schema}\n\nText: {text}",
    "zh": "请从下面的文本中提取信息，按此 JSON 模式回答：\n{schema}\n\n文本：{text}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """value: JSON of the schema as Python has it, or what pydantic makes of it where a type was given.

    None where the answer was cut before its end, or where a validator of the type refused it; `error` says why.
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
    given, single = checks.texts(texts)
    deadline_ms = checks.deadline(deadline_ms)
    form, read = _form(schema)
    shown = _shown(form)
    own = checks.template(instruction, "{text}", what="instruction")
    prompts = [filled(_ASKED[language(text)] if own is None else own, schema=shown, text=text) for text in given]
    outs = ask(lm, prompts, deadline_ms=deadline_ms, schema=form, max_tokens=max_tokens)
    found = [_read(out, read) for out in outs]
    return found[0] if single else found


def _shown(form: Any) -> str:
    try:
        text = json.dumps(form, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema cannot be written as JSON: {error}") from None
    return checks.unicode(text, "the schema")


def _form(schema: Any) -> tuple[Any, Callable[[str], Any]]:
    """A JSON schema, and what reads an answer."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema is not JSON: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise RequestError(f"a JSON schema is an object, true or false, not {brief(schema)}")
    if isinstance(schema, (Mapping, bool)):
        return schema, json.loads
    wanted = f"a schema is a mapping, JSON text or a type that pydantic knows, not {brief(schema)}"
    if schema is None:
        raise RequestError(wanted)
    try:
        import pydantic
    except ImportError:
        raise RequestError(f"{wanted}; for types: pip install pydantic") from None
    try:
        adapter = pydantic.TypeAdapter[Any](schema)
        return of_a_type(adapter.json_schema()), adapter.validate_json
    except (pydantic.PydanticUserError, pydantic.PydanticUndefinedAnnotation, TypeError) as error:
        raise RequestError(f"{wanted}: {str(error).partition(chr(10))[0]}") from None


def _read(out: Completion, read: Callable[[str], Any]) -> Extraction:
    value, error = None, None
    try:
        value = read(out.text)
    except ValueError as problem:  # pydantic's ValidationError is one
        cut = "the answer ended before its JSON did; allow more with max_tokens"
        value, error = None, cut if out.finish_reason == "length" else str(problem)
    return Extraction(value=value, text=out.text, finish_reason=out.finish_reason, timings=out.timings, error=error)
