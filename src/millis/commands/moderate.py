"""millis moderate: whether a text is safe, and which kind of harm it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines

if TYPE_CHECKING:
    from millis.tasks.moderate import Moderation

EXAMPLE = 'millis moderate -m qwen2.5-0.5b "I will find you and hurt you."'


def command(
    text: lines.Text,
    categories: Annotated[str | None, typer.Option(metavar="A,B,C", help="Kinds of harm, by commas.")] = None,
    threshold: Annotated[float, typer.Option(min=0.001, max=1, help="Unsafe from this probability on.")] = 0.5,
    model: common.Model = "qwen2.5-0.5b",
    batch: lines.Together = 32,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Whether a text is safe, and which kind of harm it does; with - one JSON line for each line of standard input."""
    from millis.tasks.moderate import check_categories

    kinds = None if categories is None else lines.listed(categories)
    if kinds is not None:
        with common.usage():
            check_categories(kinds)
    lm = common.load(model, threads=threads, context=context, precision=precision)
    lines.answer(
        text,
        batch,
        lambda texts: lm.moderate(texts, categories=kinds, threshold=threshold, deadline_ms=deadline_ms),
        _record,
        _show,
        as_json=json,
    )


def _record(one: Moderation) -> dict[str, Any]:
    return {
        "safe": one.safe,
        "categories": list(one.categories),
        "scores": dict(one.scores),
        "timings": one.timings.asdict(),
    }


def _show(one: Moderation) -> str:
    common.say(lines.status(one.timings) + f" · safe {one.scores['safe']:.2f}")
    return "safe" if one.safe else f"unsafe: {', '.join(one.categories)}"
