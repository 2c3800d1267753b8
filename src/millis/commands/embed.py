"""millis embed: texts as vectors of unit length."""

from __future__ import annotations

import json as jsonlib
from typing import Any

from millis.commands import common, lines

EXAMPLE = 'millis embed -m minilm "How do I reset my password?"'


def command(
    text: lines.Text,
    model: common.Model = "smollm2",
    batch: lines.Together = 32,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """A vector of unit length for a text, as JSON in any case; with - one line for each line of standard input."""
    lm: Any = common.load_reader(model, threads=threads, context=context, precision=precision)

    def run(texts: list[str]) -> list[Any]:
        return [[float(f"{value:.8g}") for value in vector] for vector in lm.embed(texts, deadline_ms=deadline_ms)]

    lines.answer(text, batch, run, list, jsonlib.dumps)
