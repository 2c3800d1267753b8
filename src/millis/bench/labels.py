"""What classifying in one forward is worth: the same labels beside one whole forward for each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from millis.engine.runner import Batch
from millis.tasks.calibration import softmax
from millis.tasks.classify import Classifier
from millis.tasks.labels import exclusive
from millis.tasks.model import LanguageModel
from millis.types import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTimes:
    """Medians over the texts, milliseconds; `difference` is the largest between two scores of a label."""

    labels: int
    texts: int
    rows: int  # computed for a text: its own tokens and the tree's
    forwards: int
    tree_ms: float
    single_texts: int
    single_ms: float
    ratio: float
    difference: float

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def label_times(lm: LanguageModel, texts: Sequence[str], labels: Sequence[str], single_texts: int) -> LabelTimes:
    """Classifies `texts` behind the cached instruction, and the first `single_texts` of them label by label."""
    if not texts or not 1 <= single_texts <= len(texts):
        raise RequestError("give texts, and at least one of them label by label")
    classifier = Classifier(lm, labels)
    classifier.classify([texts[-1]])
    took, rows, steps, values = [], 0, 0, []
    for text in texts:
        begin = time.perf_counter()
        (answer,) = classifier.classify([text])
        took.append(1000 * (time.perf_counter() - begin))
        values.append([answer.scores[label] for label in classifier.labels])
        steps = max(steps, answer.timings.steps)
        rows = max(rows, answer.timings.prompt_tokens - answer.timings.cached_tokens)
    request = classifier._submit(texts[0], None, None)
    assert request.score is not None
    nodes = sum(len(tree.tokens) for _, tree in request.score.parts if tree is not None)
    continuations = request.score.continuations
    lm.engine.cancel(request)
    alone, difference = [], 0.0
    for text, found in zip(texts[:single_texts], values, strict=False):
        prompt = classifier._submit(text, None, None)
        lm.engine.cancel(prompt)
        tokens = prompt.tokens
        begin = time.perf_counter()
        sums = [_alone(lm, tokens, label) for label in continuations]
        alone.append(1000 * (time.perf_counter() - begin))
        scores = softmax(exclusive(sums, continuations))
        difference = max(difference, *(abs(a - b) for a, b in zip(scores, found, strict=True)))
    tree_ms, single_ms = statistics.median(took), statistics.median(alone)
    return LabelTimes(
        labels=len(labels),
        texts=len(texts),
        rows=rows + nodes,
        forwards=steps,
        tree_ms=tree_ms,
        single_texts=single_texts,
        single_ms=single_ms,
        ratio=single_ms / tree_ms,
        difference=difference,
    )


def _alone(lm: LanguageModel, prompt: Sequence[int], label: Sequence[int]) -> float:
    """The label's log-probability by a forward of its own over prompt and label; in chunks where they are long."""
    runner, allocator = lm.runner, lm.engine.scheduler.allocator
    tokens = [*prompt, *label[:-1]]
    targets = [-1] * (len(prompt) - 1) + list(label)
    pages = allocator.take(-(-len(tokens) // runner.page_tokens))
    if pages is None:
        raise RequestError("the KV cache is in use; raise cache_tokens")
    try:
        total = 0.0
        for at in range(0, len(tokens), runner.max_tokens):
            part = np.asarray(tokens[at : at + runner.max_tokens], np.int32)
            batch = Batch(
                part, np.asarray([at], np.int32), np.asarray([len(part)], np.int32), np.asarray([pages], np.int32)
            )
            total += float(runner.score(batch, np.asarray(targets[at : at + len(part)], np.int32)).sum())
        return total
    finally:
        allocator.give(pages)
