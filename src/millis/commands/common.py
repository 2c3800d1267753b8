"""What the verbs share: their options, loading with progress, the status line, and Ctrl-C that stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis import config
from millis.files import whole
from millis.types import Completion, DataError, RequestError, SamplingParams

TABLE_WIDTH = 110  # columns

if TYPE_CHECKING:
    from millis.hub import Entry
    from millis.tasks.cascade import Cascade
    from millis.tasks.encoder import Encoder
    from millis.tasks.model import LanguageModel, Stream
    from millis.tasks.seq2seq import Seq2Seq

Model = Annotated[
    str, typer.Option("-m", "--model", help="Catalogue name, .gguf file, Hugging Face folder or hub repo id.")
]


def warn_of_threads(count: int | None) -> int | None:
    """More threads than cores wait for one another: a token of a small model then takes seconds."""
    if count is not None and count > (cores := config.usable_cores()):
        say(f"millis: warning: {count} threads share {cores} cores here, and wait for one another; leave --threads out")
    return count


Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        callback=warn_of_threads,
        help="Compute threads; default, and best: the cores here.",
    ),
]
Precision = Annotated[
    config.Precision,
    typer.Option(help="int8: quicker prompts and batches, coarser; exact: float32, slow, for checks."),
]
Context = Annotated[int | None, typer.Option(min=1, max=config.MOST_CONTEXT, help="Longest conversation in tokens.")]
Draft = Annotated[
    str | None, typer.Option(help="A smaller model of the same vocabulary that guesses tokens; answers stay the same.")
]
Speculation = Annotated[
    config.Speculation, typer.Option(help="Guess tokens: auto; ngram: from the text alone; off. Answers stay the same.")
]
Adapter = Annotated[
    Path | None, typer.Option(exists=True, help="A LoRA adapter: a folder as peft saves it, or a GGUF file.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, max=100, help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: off.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this mass; 1: off.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Drop tokens below this share of the likeliest; 0: off.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Same seed, same machine: same text.")]
Penalty = Annotated[float, typer.Option(help="Above 1: repeat less.")]
DeadlineMs = Annotated[
    float | None, typer.Option(min=0.001, max=1e9, help="The answer ends by then, cut where it must be.")
]
Beams = Annotated[
    int | None,
    typer.Option(min=1, max=16, help="Of t5 and marian: beginnings kept side by side; default: as the model says."),
]
System = Annotated[str | None, typer.Option(help="System message.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@contextmanager
def usage() -> Iterator[None]:
    """Within it our errors are usage errors (exit code 2): options are checked so, before anything is loaded."""
    try:
        yield
    except (RequestError, DataError) as error:
        raise typer.BadParameter(str(error)) from None


def checked(**sampling: Any) -> dict[str, Any]:
    """The options of an answer as they came. Values that no model accepts are a usage error."""
    with usage():
        SamplingParams(**sampling)
    return sampling


def load(name: str, **options: Any) -> LanguageModel:
    """The model, pulled with a progress bar if need be."""
    from millis.hub.bar import Bar
    from millis.tasks.model import LanguageModel

    with Bar() as bar:
        return LanguageModel(name, progress=bar, agree=ask_terms, **options)


def load_reader(names: str, confidence: float = 0.0, **options: Any) -> LanguageModel | Cascade | Encoder:
    """The model, an encoder among them, or a cascade of several with commas between them, the smallest first."""
    from millis.models.load import is_encoder
    from millis.tasks.cascade import Cascade
    from millis.tasks.encoder import Encoder

    if "," not in names and is_encoder(path := resolve(names)):
        return Encoder(path, **options)
    models = [load(name.strip(), **options) for name in names.split(",")]
    return models[0] if len(models) == 1 else Cascade(models, confidence)


def load_writer(name: str, **options: Any) -> LanguageModel | Seq2Seq:
    """The model that writes, be it a language model or one that reads a text first (t5, marian)."""
    from millis.models.load import is_seq2seq
    from millis.tasks.seq2seq import Seq2Seq

    path = resolve(name)
    return Seq2Seq(path, **options) if is_seq2seq(path) else load(name, **options)


def refuse(path: Path, **given: Any) -> None:
    """A usage error naming the first of the options `given` that was used, and with what kind of model it cannot be."""
    from millis.models.load import is_seq2seq

    kind = "an encoder-decoder model" if is_seq2seq(path) else "a language model"
    for option, value in given.items():
        if value:
            raise typer.BadParameter(
                f"{path.name} is {kind}, which takes no --{option.replace('_', '-')}; leave it out"
            )


def write_text(path: Path, text: str) -> None:
    """Writes a file in one move, so that a failure leaves an old one as it was. RequestError: it cannot be written."""
    try:
        with whole(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def resolve(name: str) -> Path:
    """Where the model lies, pulled with a progress bar if need be."""
    from millis import hub
    from millis.hub.bar import Bar
    from millis.tasks.readable import check_readable

    with Bar() as bar:
        return hub.resolve(name, bar, ask_terms, check_readable)


def ask_terms(entry: Entry) -> bool:
    """Shows an entry's terms and asks, where somebody can answer."""
    say(entry.terms or "")
    if not sys.stdin.isatty():
        say(f"to agree without a terminal: millis pull {entry.name} --accept-terms")
        return False
    return bool(typer.confirm("Do you agree?", err=True))


def show(stream: Stream) -> Completion:
    """Prints an answer as it comes, and hands it out whole."""
    with stopped_by_interrupt(stream):
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print(flush=True)
    return stream.result()


@contextmanager
def stopped_by_interrupt(stream: Stream) -> Iterator[None]:
    """The first Ctrl-C ends `stream` between two steps, and what was written stays; the next interrupts as usual."""
    with stream, on_first_interrupt(stream.stop_soon):  # whatever happens, its pages are free afterwards
        yield


@contextmanager
def on_first_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `act`, the next interrupts as usual."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        act()

    previous = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def record(out: Completion) -> dict[str, Any]:
    """An answer for machines."""
    return {
        "text": out.text,
        "tokens": out.tokens,
        "finish_reason": out.finish_reason,
        "timings": out.timings.asdict(),
    }


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends what runs in here as Ctrl-C does, so that nothing half-written is left."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def status_line(out: Completion, lm: LanguageModel | Seq2Seq) -> str:
    """first token 12.3 ms · 301.2 tokens/s · 31 + 64 tokens in 224 ms · … · smollm2.gguf, 2 threads, avx512."""
    timings = out.timings
    parts = [f"first token {timings.first_token_ms:.1f} ms"] if timings.first_token_ms else []
    if timings.tokens_per_second:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    parts.append(f"{timings.prompt_tokens} + {timings.completion_tokens} tokens in {timings.total_ms:.0f} ms")
    if timings.drafted_tokens:
        parts.append(f"{timings.accepted_tokens} of {timings.drafted_tokens} guesses right")
    if timings.slack_ms is not None:
        parts.append(slack(timings.slack_ms))
    if out.finish_reason != "stop":
        parts.append(f"ended by {out.finish_reason}")
    parts.append(f"{lm.path.name}, {lm.config.threads} threads, {lm.runner.isa}")
    return " · ".join(parts)


def count(number: int, what: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {what}" + "s" * (number != 1)


def slack(slack_ms: float) -> str:
    """12 ms before the deadline."""
    return f"{abs(slack_ms):.0f} ms {'before' if slack_ms >= 0 else 'after'} the deadline"


def say(text: str) -> None:
    """A line for the user that is not the answer: dimmed, on standard error."""
    plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    print(text if plain else f"\x1b[2m{text}\x1b[0m", file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """A line that says what will take a while, where somebody watches."""
    if sys.stderr.isatty():
        say(text)


@contextmanager
def progress(what: str, total: int | None = None, *, auto_refresh: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where somebody watches; to be told what is done and of how many, or advance=1.

    auto_refresh: whether a thread draws it; else, where one would be measured, too, it is drawn when it is told.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    unseen = not console.is_terminal
    with Progress(console=console, transient=True, auto_refresh=auto_refresh, disable=unseen) as bar:
        task = bar.add_task(what, total=total)

        def update(completed: int | None = None, total: int | None = None, **more: Any) -> None:
            bar.update(task, completed=completed, total=total, refresh=not auto_refresh, **more)

        yield update


def print_table(table: Any) -> None:
    """A Rich table, whole: where the terminal is too narrow, its lines wrap, and nothing is cut off."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


def print_json(value: Any) -> None:
    """One object, readable text left as it is."""
    print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))
