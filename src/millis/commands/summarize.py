"""millis summarize: a text in a wished number of words, sentences or characters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines

if TYPE_CHECKING:
    from millis.tasks.summarize import Summary

EXAMPLE = "millis summarize -m qwen2.5-0.5b --sentences 2 --file report.txt"
Count = Annotated[int | None, typer.Option(min=1, help="At most so many.")]


def command(
    text: Annotated[
        str | None, typer.Argument(help="The text; - reads standard input, one text a line with --lines.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="A text file instead.")] = None,
    words: Count = None,
    sentences: Count = None,
    characters: Count = None,
    each: Annotated[bool, typer.Option("--lines", help="Every line of standard input is a text.")] = False,
    model: common.Model = "qwen2.5-0.5b",
    batch: lines.Together = 8,
    beams: common.Beams = None,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """A summary; of a text longer than the context, by parts. With - and --lines one JSON line for each line."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give a text, or - for standard input, or --file FILE")
    if each and text != "-":
        raise typer.BadParameter("--lines reads standard input; give - as the text")
    if sum(bound is not None for bound in (words, sentences, characters)) > 1:
        raise typer.BadParameter("give one of --words, --sentences and --characters")
    given = "" if each else lines.read_text(file) if file is not None else text or ""
    if text == "-" and not each:
        given = lines.whole_input()
    if not each:
        lines.check_not_empty(given)
    from millis.models.load import is_seq2seq
    from millis.tasks.summarize import summarize

    path = common.resolve(model)
    options: dict[str, Any] = {"words": words, "sentences": sentences, "characters": characters}
    if is_seq2seq(path):
        common.refuse(path, **options)
        options = {"beams": beams}
    else:
        common.refuse(path, beams=beams)
    lm: Any = common.load_writer(model, threads=threads, context=context, precision=precision)

    def run(texts: list[str]) -> Any:
        if is_seq2seq(path):
            return lm.summarize(texts, deadline_ms=deadline_ms, **options)
        with common.progress("summaries") as progress:
            return summarize(lm, texts, deadline_ms=deadline_ms, progress=progress, **options)

    lines.answer(given, batch, run, _record, _show, as_json=json, each=each)


def _record(one: Summary) -> dict[str, Any]:
    return {
        "text": one.text,
        "parts": one.parts,
        "read": one.read,
        "finish_reason": one.finish_reason,
        "timings": one.timings.asdict(),
    }


def _show(one: Summary) -> str:
    parts = f" · {one.parts} parts, {100 * one.read:.0f} % of them read" if one.parts > 1 else ""
    common.say(lines.status(one.timings) + parts)
    return one.text
