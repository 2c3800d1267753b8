"""millis answer: a question answered from indexed documents, with the quote that says so, or "not in the documents"."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from millis.commands import common, lines
from millis.commands.index import Embedder, File, named
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.tasks.answer import Answer, Answering
    from millis.tasks.index import Index
    from millis.tasks.model import LanguageModel

EXAMPLE = 'millis answer --index bank.idx "What does a replacement card cost?"'


def command(
    index: File,
    question: Annotated[str, typer.Argument(help="The question; - reads one a line and writes a JSON line for each.")],
    model: common.Model = "smollm2",
    extractive: Annotated[bool, typer.Option("--extractive", help="Quotes only: no model writes a sentence.")] = False,
    max_tokens: common.MaxTokens = 64,
    deadline_ms: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e9, help="No sentence that ends later; a quote that comes later says so."),
    ] = None,
    batch: lines.Together = 8,
    embedder: Embedder = None,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Answers a question from the documents of an index, or says that they do not."""
    from millis.tasks.index import Index

    if question != "-" and not question.strip():
        raise typer.BadParameter("the question is empty")
    with Index.open(index, embedder=named(embedder, index)) as opened:
        if not len(opened):
            raise RequestError(f"{index} holds no passages; add documents: millis index DOCUMENTS --index {index}")
        lm = None if extractive else common.load(model, threads=threads, prefix_cache=True)
        if question == "-":
            _batch(lm, opened, batch, max_tokens, deadline_ms)
        else:
            _one(lm, opened, question, max_tokens, deadline_ms, json)


def _one(
    lm: LanguageModel | None, index: Index, question: str, max_tokens: int, deadline_ms: float | None, json: bool
) -> None:
    from millis.tasks.answer import ask

    answering = ask(lm, question, index, deadline_ms=deadline_ms, max_tokens=max_tokens)
    interrupted = False

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        answering.stop_soon()

    with common.on_first_interrupt(stop):
        if not json:
            _show_sources(answering)
        out = answering.result()
    if json:
        common.print_json(out.asdict())
    else:
        if out.written != "quote":
            print(out.text)
        common.say(_status_line(out))
    if interrupted:
        raise typer.Exit(130)


def _batch(lm: LanguageModel | None, index: Index, count: int, max_tokens: int, deadline_ms: float | None) -> None:
    from millis.tasks.answer import ask_all

    def run(questions: list[str]) -> list[Answer]:
        return ask_all(lm, questions, index, deadline_ms=deadline_ms, max_tokens=max_tokens)

    lines.answer_lines(count, run, lambda out: out.asdict())


def _show_sources(answering: Answering) -> None:
    """The first quote, as soon as it is known, with where it stands."""
    for source in answering.sources[:1]:
        print(
            f"“{source.quote}”\n  — {source.title or source.document} ({source.document}, {source.start}–{source.stop})"
        )
        sys.stdout.flush()


def _status_line(out: Answer) -> str:
    timings = out.timings
    parts = [f"quote {timings.quote_ms:.1f} ms"]
    if timings.first_token_ms:
        parts.append(f"first token {timings.first_token_ms:.1f} ms")
    parts.append(f"total {timings.total_ms:.0f} ms")
    if timings.prompt_tokens:
        parts.append(f"{timings.prompt_tokens} + {timings.completion_tokens} tokens, {timings.cached_tokens} cached")
    if timings.deadline_ms is not None and timings.slack_ms is not None:
        late = " · the quote itself came after it" if timings.quote_ms > timings.deadline_ms else ""
        parts.append(common.slack(timings.slack_ms) + late)
    parts.append(f"in the documents: {100 * out.probability:.0f} %")
    return " · ".join(parts)
