"""What commands over texts share: a text or the lines of standard input, one JSON line for each, files of examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from millis.commands import common
from millis.types import RequestError

Text = Annotated[str, typer.Argument(help="The text; - reads standard input, one text a line.")]
Together = Annotated[int, typer.Option("--batch", min=1, max=256, help="Lines of standard input answered together.")]


def read_text(path: Path) -> str:
    """A file's text. RequestError: it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text; convert it first") from None


def batches(text: str, count: int) -> Iterator[list[str]]:
    """The text, or the lines of standard input that are not empty, `count` at a time at most."""
    if text != "-":
        yield [text]
        return
    together: list[str] = []
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise RequestError(f"line {number} of standard input is not UTF-8 text; convert it first") from None
        if line:
            together.append(line)
        if len(together) == count:
            yield together
            together = []
    if together:
        yield together


def answer(
    text: str,
    count: int,
    run: Callable[[list[str]], Sequence[Any]],
    record: Callable[[Any], dict[str, Any]],
    show: Callable[[Any], str] | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Prints each answer: one JSON line for a line of standard input, and for a text what `show` makes of it."""
    for together in batches(text, count):
        for one in run(together):
            if text == "-":
                print(json.dumps(record(one), ensure_ascii=False, allow_nan=False), flush=True)
            elif as_json or show is None:
                common.print_json(record(one))
            else:
                print(show(one), flush=True)


def status(timings: Any) -> str:
    """What an answer took, in one line."""
    parts = [f"{timings.total_ms:.1f} ms", f"{timings.steps} steps", f"{timings.cached_tokens} tokens cached"]
    if timings.slack_ms is not None:
        parts.append(f"{abs(timings.slack_ms):.0f} ms {'before' if timings.slack_ms >= 0 else 'after'} the deadline")
    if getattr(timings, "model", ""):
        parts.append(f"{timings.model}: {timings.why}")
    return " · ".join(parts)
