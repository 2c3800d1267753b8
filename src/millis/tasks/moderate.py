"""Moderation: whether a text is safe, and if not, which kind of harm it is. Zero-shot, on classify.

A model that was not trained for it finds the plain cases only: measure on your own texts (millis evaluate classify)
before you rely on it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from millis.tasks import checks
from millis.tasks.ask import within
from millis.tasks.classify import Classifier
from millis.tasks.labels import Question
from millis.types import Classification, RequestError, Timings, number

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

SAFE, UNSAFE = "safe", "unsafe"
CATEGORIES = ("hate", "harassment", "violence", "sexual", "self-harm", "fraud", "illegal")
_HARM = (
    "You check messages before they are published. A message that harms nobody is safe; a threat, an insult, a fraud "
    "or a call to harm is unsafe.\nIs the message safe or unsafe? Answer with one word.\n\nMessage: {text}\n\nAnswer:"
)
_KIND = (
    "This message is harmful. Which kind of harm is it: {labels}?\nAnswer with one of them alone.\n\nMessage: {text}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moderation:
    """scores sum to 1: of safe, and of each category or, where it is safe, unsafe. categories: the likeliest one, and
    those above the threshold."""

    safe: bool
    categories: tuple[str, ...]
    scores: Mapping[str, float]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Moderator:
    """Two questions: whether a text is harmful, and if it is, how."""

    harm: Classifier
    kind: Classifier


def moderator(lm: LanguageModel, categories: Sequence[str] | None) -> Moderator:
    """With the questions encoded, and calibrated by texts that say nothing."""
    labels = list(CATEGORIES) if categories is None else check_categories(categories)
    return Moderator(
        Classifier(lm, [SAFE, UNSAFE], template=_HARM, calibration="contextual"),
        Classifier(lm, labels, template=_KIND, calibration="contextual"),
    )


def check_categories(categories: Sequence[str]) -> list[str]:
    """Kinds of harm that can be told apart. RequestError: they cannot be used."""
    found = checks.strings(categories, "categories")
    if SAFE in found or UNSAFE in found:
        raise RequestError("safe and unsafe are no categories of harm; leave them out")
    try:
        Question(found, template=_KIND)
    except RequestError as error:
        raise RequestError(f"categories: {error}") from None
    return found


def moderate(
    judge: Moderator, texts: str | Sequence[str], *, threshold: float = 0.5, deadline_ms: float | None = None
) -> Moderation | list[Moderation]:
    """See TaskMethods.moderate."""
    threshold = number("threshold", threshold, 0, 1)
    if threshold == 0:
        raise RequestError("threshold must be above 0; with 0 every text would show every category")
    given, single = checks.texts(texts)
    begin, deadline_ms = time.perf_counter(), checks.deadline(deadline_ms)
    half_ms = None if deadline_ms is None else deadline_ms / 2  # of it for each of the questions
    with within(deadline_ms, begin, 1 / 2):
        harms = judge.harm.classify(given, half_ms)
    unsafe = [text for text, harm in zip(given, harms, strict=True) if harm.scores[UNSAFE] >= threshold]
    asked_ms = 1000 * (time.perf_counter() - begin)
    with within(deadline_ms, begin, 1 / 2):
        kinds = iter(judge.kind.classify(unsafe, half_ms))
    found = [
        _judged(harm, next(kinds) if harm.scores[UNSAFE] >= threshold else None, threshold, asked_ms) for harm in harms
    ]
    if deadline_ms is not None:  # not its half
        for one in found:
            one.timings.deadline_ms, one.timings.slack_ms = deadline_ms, deadline_ms - one.timings.total_ms
    return found[0] if single else found


def _judged(harm: Classification, kind: Classification | None, threshold: float, asked_ms: float) -> Moderation:
    """asked_ms: from arrival to the second question."""
    if kind is None:
        return Moderation(safe=True, categories=(), scores=harm.scores, timings=harm.timings)
    scores = {name: harm.scores[UNSAFE] * score for name, score in kind.scores.items()}
    worst = next(iter(scores))
    named = tuple(name for name, score in scores.items() if name == worst or score >= threshold)
    timings = replace(
        harm.timings,
        prefill_ms=harm.timings.prefill_ms + kind.timings.prefill_ms,
        total_ms=asked_ms + kind.timings.total_ms,
        steps=harm.timings.steps + kind.timings.steps,
    )
    return Moderation(safe=False, categories=named, scores={SAFE: harm.scores[SAFE], **scores}, timings=timings)
