"""What commands over texts share: a text or the lines of standard input, one JSON line for each, files of examples."""

from __future__ import annotations

import io
import json
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from millis.commands import common
from millis.types import DeadlineError, GrammarError, MillisError, RequestError, TemplateError


def check_not_empty(text: str) -> str:
    """The text. A usage error where it holds no word."""
    if not text.strip():
        raise typer.BadParameter("the text is empty; give at least one word")
    return text


Text = Annotated[
    str, typer.Argument(callback=check_not_empty, help="The text; - reads standard input, one text a line.")
]
Together = Annotated[int, typer.Option("--batch", min=1, max=256, help="Lines of standard input together at most.")]


def listed(given: str) -> list[str]:
    """The names of an option that takes several, with commas between them, Chinese ones, too."""
    return [name.strip() for name in given.replace("，", ",").split(",") if name.strip()]


def read_text(path: Path) -> str:
    """A file's text. RequestError: it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text; convert it first") from None


def labels_of(given: str) -> list[str]:
    """The labels of --labels: by commas, or of @FILE the lines. RequestError as `read_text`."""
    if not given.startswith("@"):
        return listed(given)
    return [label.strip() for label in read_text(Path(given[1:])).split("\n") if label.strip()]


def read_schema(path: Path) -> str:
    """The text of a JSON schema. RequestError: it cannot be read, or is no JSON."""
    text = read_text(path)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    return text


def whole_input() -> str:
    """All of standard input as one text. RequestError: it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text (byte {error.start}); convert it first") from None


def answer(
    text: str,
    count: int,
    run: Callable[[list[str]], Sequence[Any]],
    record: Callable[[Any], Any],
    show: Callable[[Any], str] | None = None,
    *,
    as_json: bool = False,
    each: bool | None = None,
) -> None:
    """Prints the answer to a text: what `show` makes of it, or its record; of - one JSON line for each line of input.

    each: whether standard input is meant, whatever the text. Raises as `run` and `show` do, RequestError for a record
    that says "error", and as `answer_lines`.
    """
    if text == "-" if each is None else each:
        answer_lines(count, run, record)
        return
    try:
        (one,) = run([text])
    except MillisError as error:
        raise _unnumbered(error) from None
    if as_json or show is None:
        row = record(one)
        common.print_json(row)
        if isinstance(row, dict) and "error" in row:
            raise RequestError(row["error"])
    else:
        print(show(one), flush=True)


def answer_lines(count: int, run: Callable[[list[str]], Sequence[Any]], record: Callable[[Any], Any]) -> None:
    """Prints a JSON line for each line of standard input that is not empty, `count` of them answered together.

    A line that cannot be answered has {"error", "line"} for a record, and RequestError says in the end how many.
    """
    total = failed = 0
    for batch in _batches(count):
        for number, found in _each(run, batch):
            row = {"error": str(found)} if isinstance(found, MillisError) else record(found)
            if isinstance(row, dict) and "error" in row:
                row["line"] = number
                failed += 1
            total += 1
            print(json.dumps(row, ensure_ascii=False, allow_nan=False), flush=True)
    if failed:
        raise RequestError(f"{failed} of {total} lines were not answered; their records say why")


def _batches(count: int) -> Iterator[list[tuple[int, str]]]:
    """The lines of standard input that are not empty with their numbers, those that have come, `count` at most."""
    batch: list[tuple[int, str]] = []
    for number, (raw, more) in enumerate(_lines(), 1):
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip()
        if line:
            batch.append((number, line))
        if len(batch) == count or (batch and not more):
            yield batch
            batch = []
    if batch:
        yield batch


def _lines() -> Iterator[tuple[bytes, bool]]:
    """Each line of standard input, and whether there is more to read without waiting for it."""
    source = cast(io.BufferedReader, sys.stdin.buffer)
    begun: list[bytes] = []  # of a line whose end has not come
    while data := source.read1(1 << 16):
        *ends, rest = data.split(b"\n")
        for i, end in enumerate(ends, 1):
            line = b"".join([*begun, end])
            begun.clear()
            yield line, i < len(ends) or _has_come()
        if rest:
            begun.append(rest)
    if begun:
        yield b"".join(begun), False


def _has_come() -> bool:
    """Whether standard input can be read at once; a file always can."""
    try:
        return bool(select.select([sys.stdin.buffer], [], [], 0)[0])
    except (OSError, ValueError):  # what is no file of the system
        return True


def _each(
    run: Callable[[list[str]], Sequence[Any]], batch: list[tuple[int, str]]
) -> Iterable[tuple[int, Any | MillisError]]:
    """Number and answer of each line, or why it has none: a batch that is refused is tried by halves."""
    try:
        for _, line in batch:
            if any("\ud800" <= character <= "\udfff" for character in line):
                raise RequestError("not UTF-8 text; convert it first")
        found = run([line for _, line in batch])
    except GrammarError:  # of the schema, and so of every line
        raise
    except (RequestError, DeadlineError, TemplateError) as error:
        if len(batch) == 1:
            return [(batch[0][0], _unnumbered(error))]
        middle = len(batch) // 2
        return [*_each(run, batch[:middle]), *_each(run, batch[middle:])]
    return [(number, one) for (number, _), one in zip(batch, found, strict=True)]


def _unnumbered(error: MillisError) -> MillisError:
    """An error of a list of one text, without the text's number in that list."""
    error.args = (str(error).replace("text 0 ", "the text ", 1),)
    return error


def status(timings: Any) -> str:
    """What an answer took, in one line."""
    parts = [f"{timings.total_ms:.1f} ms", common.count(timings.steps, "step")]
    parts.append(f"{common.count(timings.cached_tokens, 'token')} cached")
    if timings.slack_ms is not None:
        parts.append(common.slack(timings.slack_ms))
    if getattr(timings, "model", ""):
        parts.append(f"{timings.model}: {timings.why}")
    return " · ".join(parts)
