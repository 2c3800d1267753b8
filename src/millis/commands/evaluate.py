"""millis evaluate: quality beside a float32 reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from millis.commands import common
from millis.tasks.perplexity import perplexity, windows
from millis.types import RequestError


def command(
    perplexity_file: Annotated[Path, typer.Option("--perplexity", metavar="FILE", help="A text file, UTF-8.")],
    model: common.Model = "smollm2",
    window: Annotated[int, typer.Option(min=2, help="Tokens that are predicted together.")] = 512,
    limit: Annotated[int | None, typer.Option("--windows", min=1, help="Only so many windows, spread evenly.")] = None,
    reference: Annotated[bool, typer.Option(help="Also run transformers in float32 on the same weights.")] = True,
    threads: common.Threads = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Perplexity of a text. Example: millis evaluate -m smollm2 --perplexity wiki.txt"""
    text = _read(perplexity_file)
    lm = common.load(model, threads=threads, precision=precision, context=None)
    tokenizer = lm.tokenizer
    bos = tokenizer.bos if tokenizer.encode("a")[:1] == [tokenizer.bos] else None
    cut = windows(tokenizer.encode(text, add_special=False), window, bos)
    if limit is not None and limit < len(cut):
        cut = [cut[i * len(cut) // limit] for i in range(limit)]
    result: dict[str, Any] = {
        "model": model,
        "file": str(perplexity_file),
        "precision": precision,
        "window_tokens": window,
        "windows": len(cut),
        "tokens": sum(len(w) - 1 for w in cut),
    }
    say = (lambda text: None) if json else print
    say(f"{model} on {perplexity_file.name}: {result['windows']} windows of {window}, {result['tokens']} tokens")
    result["millis"] = _measure("millis", lambda w: lm.engine.score(w[:1], [w[1:]])[0], cut)
    say(_line("millis", result["millis"]))
    if reference:
        from millis.bench.reference import log_likelihood, reference_model

        other = reference_model(lm.model.checkpoint, lm.config.threads or 1)
        result["reference"] = _measure("transformers, float32", lambda w: log_likelihood(other, w), cut)
        result["ratio"] = result["millis"]["perplexity"] / result["reference"]["perplexity"]
        say(_line("transformers, float32", result["reference"]))
        say(f"ratio {result['ratio']:.5f} ({100 * (result['ratio'] - 1):+.3f} %)")
    if json:
        common.print_json(result)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text") from None


def _measure(name: str, log_likelihood: Callable[[list[int]], float], cut: list[list[int]]) -> dict[str, float]:
    from rich.console import Console
    from rich.progress import Progress

    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=len(cut))
        value = perplexity(log_likelihood, cut, lambda: progress.advance(task))
    if not math.isfinite(value):
        raise RequestError(f"{name}: the perplexity is not finite")
    return {"perplexity": value, "seconds": time.perf_counter() - begin}


def _line(name: str, result: dict[str, float]) -> str:
    return f"{name:<24} perplexity {result['perplexity']:.4f}   {result['seconds']:.1f} s"
