"""millis translate: Chinese to English and back, or what a translation model was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.tasks.translate import Translation

EXAMPLE = 'millis translate -m qwen2.5-0.5b --to en "今天天气很好。"'


def command(
    text: lines.Text,
    to: Annotated[
        str | None, typer.Option(help="zh or en; of t5 and marian another that they know, or none where they know one.")
    ] = None,
    source: Annotated[str | None, typer.Option("--from", help="zh or en; otherwise the characters tell.")] = None,
    glossary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Terms, one a line: term, a tab or =, translation.")
    ] = None,
    model: common.Model = "qwen2.5-0.5b",
    batch: lines.Together = 8,
    beams: common.Beams = None,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """A text in the other language; with - one JSON line for each line of standard input."""
    from millis.models.load import is_seq2seq
    from millis.tasks.translate import known

    terms = {} if glossary is None else _glossary(glossary)
    path = common.resolve(model)
    rewrites = is_seq2seq(path)
    common.refuse(path, **({"glossary": glossary} if rewrites else {"beams": beams}))
    if to is None and not rewrites:
        raise typer.BadParameter("a language model translates to zh or en; say which with --to")
    if not rewrites:
        with common.usage():
            for option, name in (("--to", to), ("--from", source)):
                if name is not None:
                    known(name, option)
    lm: Any = common.load_writer(model, threads=threads, context=context, precision=precision)

    def run(texts: list[str]) -> list[Translation]:
        special: dict[str, Any] = {"beams": beams} if rewrites else {"glossary": terms}
        found: list[Translation] = lm.translate(texts, to, source=source, deadline_ms=deadline_ms, **special)
        return found

    lines.answer(text, batch, run, _record, _show, as_json=json)


def _glossary(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(lines.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        term, _, translation = line.partition("\t" if "\t" in line else "=")
        if not term.strip() or not translation.strip():
            raise RequestError(f"{path}, line {number}: a term, a tab or =, its translation")
        if found.setdefault(term.strip(), translation.strip()) != translation.strip():
            raise RequestError(f"{path}, line {number}: {term.strip()!r} has another translation above; keep one")
    return found


def _record(one: Translation) -> dict[str, Any]:
    return {
        "text": one.text,
        "source": one.source,
        "target": one.target,
        "missing": list(one.missing),
        "finish_reason": one.finish_reason,
        "timings": one.timings.asdict(),
    }


def _show(one: Translation) -> str:
    lacking = f" · without the terms {', '.join(one.missing)}" if one.missing else ""
    common.say(lines.status(one.timings) + lacking)
    return one.text
