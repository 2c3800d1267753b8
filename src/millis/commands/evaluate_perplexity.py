"""millis evaluate --perplexity: quality beside a float32 reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis import config
from millis.commands import common, lines
from millis.types import ModelError, RequestError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel


def perplexity_of(
    perplexity: Path,
    *,
    model: str,
    window: int,
    limit: int | None,
    reference: bool,
    threads: int | None,
    context: int | None,
    precision: config.Precision,
    json: bool,
) -> None:
    """Perplexity of a text: of Millis, and of the float32 reference on the same weights; with milliseconds a window."""
    text = lines.read_text(perplexity)
    lm = common.load(model, threads=threads, precision=precision, context=context)
    cut = _windows(lm, text, window, limit)
    tokens = sum(len(w) - 1 for w in cut)
    result: dict[str, Any] = {
        "model": model,
        "file": str(perplexity),
        "precision": precision,
        "window_tokens": window,
        "windows": len(cut),
        "tokens": tokens,
    }
    say = (lambda text: None) if json else print
    say(
        f"{model} on {perplexity.name}: {common.count(len(cut), 'window')} of {window}, {common.count(tokens, 'token')}"
    )
    result["millis"] = _measure("millis", lambda w: lm.engine.score(w[:1], [w[1:]])[0], cut)
    say(_line("millis", result["millis"]))
    if reference:
        result["reference"] = _reference(lm, cut)
        result["ratio"] = result["millis"]["perplexity"] / result["reference"]["perplexity"]
        say(_line("transformers, float32", result["reference"]))
        say(f"ratio {result['ratio']:.5f} ({100 * (result['ratio'] - 1):+.3f} %)")
    if json:
        common.print_json(result)


def _windows(lm: LanguageModel, text: str, window: int, limit: int | None) -> list[list[int]]:
    from millis.tasks.perplexity import spread, windows

    if window > lm.runner.context:
        raise RequestError(f"--window {window} is longer than the model's context of {lm.runner.context} tokens")
    tokenizer = lm.tokenizer
    bos = tokenizer.bos if tokenizer.encode("a")[:1] == [tokenizer.bos] else None
    cut = windows(tokenizer.encode(text, add_special=False), window, bos)
    return cut if limit is None else spread(cut, limit)


def _reference(lm: LanguageModel, cut: list[list[int]]) -> dict[str, float]:
    from millis.bench.reference import log_likelihood, reference_model

    other = reference_model(lm.model.checkpoint, lm.config.threads)
    return _measure("transformers, float32", lambda w: log_likelihood(other, w), cut)


def _measure(name: str, log_likelihood: Callable[[list[int]], float], cut: list[list[int]]) -> dict[str, float]:
    from millis.tasks.metrics import percentile
    from millis.tasks.perplexity import perplexity

    took_ms: list[float] = []

    def timed(window: list[int]) -> float:
        begin = time.perf_counter()
        value = log_likelihood(window)
        took_ms.append(1000 * (time.perf_counter() - begin))
        return value

    with common.progress(name, len(cut)) as progress:
        value = perplexity(timed, cut, lambda: progress(advance=1))
    if not math.isfinite(value):
        raise ModelError(f"{name}: the perplexity is not finite; the weights of this model are not usable")
    return {
        "perplexity": value,
        "seconds": sum(took_ms) / 1000,
        "p50_ms": percentile(took_ms, 0.5),  # of a window
        "p99_ms": percentile(took_ms, 0.99),
    }


def _line(name: str, result: dict[str, float]) -> str:
    times = f"{result['seconds']:.1f} s, a window {result['p50_ms']:.1f} ms (p50), {result['p99_ms']:.1f} ms (p99)"
    return f"{name:<24} perplexity {result['perplexity']:.4f}   {times}"
