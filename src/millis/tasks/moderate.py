"""Moderation: whether a text is safe, and if not, which kind of harm it is. Zero-shot, on classify.

A model that was not trained for it finds the plain cases only: measure on your own texts (millis evaluate classify)
before you rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millis.tasks.ask import listed
from millis.tasks.classify import Classification, Classifier
from millis.types import RequestError, Timings

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

SAFE = "safe"
CATEGORIES = ("hate", "harassment", "violence", "sexual", "self-harm", "fraud", "illegal")
_TEMPLATE = (
    "You check messages before they are published. Say which of these the message is: {labels}. "
    "A message that harms nobody is safe.\nAnswer with one of them alone.\n\nMessage: {text}\n\nAnswer:"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moderation:
    """scores: of each category and of safe, summing to 1. categories: those above the threshold, likeliest first."""

    safe: bool
    categories: tuple[str, ...]
    scores: Mapping[str, float]
    timings: Timings


def moderator(lm: LanguageModel, categories: Sequence[str] | None) -> Classifier:
    """A classifier of safe and the categories, calibrated by texts that say nothing."""
    labels = CATEGORIES if categories is None else categories
    if SAFE in labels:
        raise RequestError("safe is no category of harm; leave it out")
    return Classifier(lm, [SAFE, *labels], template=_TEMPLATE, calibration="contextual")


def moderate(
    judge: Classifier, texts: str | Sequence[str], *, threshold: float = 0.5, deadline_ms: float | None = None
) -> Moderation | list[Moderation]:
    """See TaskMethods.moderate."""
    if not 0 < threshold <= 1:
        raise RequestError(f"threshold must lie in (0, 1], not {threshold!r}")
    given, single = listed(texts)
    found = [_judged(one, threshold) for one in judge.classify(given, deadline_ms)]
    return found[0] if single else found


def _judged(one: Classification, threshold: float) -> Moderation:
    """Unsafe where all harm together reaches the threshold; the likeliest category is named then in any case."""
    harms = {name: score for name, score in one.scores.items() if name != SAFE}
    safe = 1 - one.scores[SAFE] < threshold
    worst = next(iter(harms))
    named = tuple(name for name, score in harms.items() if name == worst or score >= threshold)
    return Moderation(safe=safe, categories=() if safe else named, scores=one.scores, timings=one.timings)
