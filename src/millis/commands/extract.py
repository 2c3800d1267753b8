"""millis extract: what a text says, as JSON of a schema."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.tasks.extract import Extraction

EXAMPLE = 'millis extract -m qwen2.5-0.5b --schema person.json "Anna is 31 and lives in Berlin."'


def command(
    text: lines.Text,
    schema: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A file with a JSON schema.")],
    model: common.Model = "qwen2.5-0.5b",
    max_tokens: common.MaxTokens = 512,
    batch: lines.Together = 8,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """What a text says, as JSON of a schema; with - one JSON line for each line of standard input."""
    form = lines.read_schema(schema)
    lm = common.load(model, threads=threads, context=context, precision=precision)
    lines.answer(
        text,
        batch,
        lambda texts: lm.extract(texts, form, deadline_ms=deadline_ms, max_tokens=max_tokens),
        _record,
        _show,
        as_json=json,
    )


def _record(one: Extraction) -> dict[str, Any]:
    found = {"value": one.value, "finish_reason": one.finish_reason, "timings": one.timings.asdict()}
    return found if one.error is None else {**found, "error": one.error, "text": one.text}


def _show(one: Extraction) -> str:
    common.say(lines.status(one.timings))
    if one.error is not None:
        raise RequestError(one.error)
    return json_module.dumps(one.value, ensure_ascii=False)
