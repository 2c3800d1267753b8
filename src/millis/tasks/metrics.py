"""What answers are measured by: accuracy, F1, calibration error, exact match, ROUGE. Pure; sources at the formulas."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millis.tasks.language import is_han

BINS = 15  # of confidence, as in Guo et al., 2017


def accuracy(predicted: Sequence[str | None], true: Sequence[str]) -> float:
    """Share of right answers; none at all is a wrong one."""
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def macro_f1(predicted: Sequence[str | None], true: Sequence[str]) -> float:
    """Mean over the labels, those predicted or true, of 2 TP / (2 TP + FP + FN)."""
    labels = {*true, *(p for p in predicted if p is not None)}
    total = 0.0
    for label in labels:
        right = sum(p == t == label for p, t in zip(predicted, true, strict=True))
        named = sum(p == label for p in predicted) + sum(t == label for t in true)
        total += 2 * right / named
    return total / len(labels)


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers whose confidence lies in [low, high]."""

    low: float
    high: float
    count: int
    confidence: float  # their mean
    accuracy: float


def reliability(confidence: Sequence[float], right: Sequence[bool], bins: int = BINS) -> list[Bin]:
    """Bins of equal width over [0, 1], those that are empty left out."""
    found = []
    at = [min(bins - 1, int(c * bins)) for c in confidence]
    for i in range(bins):
        held = [j for j, one in enumerate(at) if one == i]
        if held:
            mean = sum(confidence[j] for j in held) / len(held)
            found.append(Bin(i / bins, (i + 1) / bins, len(held), mean, sum(right[j] for j in held) / len(held)))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """ECE: Σ n_b / n · |accuracy_b − confidence_b| (Naeini et al., 2015)."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / total


def normalized(text: str) -> str:
    """As SQuAD compares answers: lower case, no punctuation, no English articles, single spaces."""
    text = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def pieces(text: str) -> list[str]:
    """Words, every Han character being one, as CMRC 2018 cuts mixed text (Cui et al., 2019)."""
    return "".join(f" {c} " if is_han(c) else c for c in text).split()


def exact_match(answer: str, expected: Sequence[str]) -> bool:
    """Whether an answer is one of those expected (Rajpurkar et al., 2016)."""
    found = "".join(pieces(normalized(answer)))
    return any(found == "".join(pieces(normalized(one))) for one in expected)


def answer_f1(answer: str, expected: Sequence[str]) -> float:
    """The best F1 of an answer's words with those of an expected one (Rajpurkar et al., 2016)."""
    return max(
        (_f1(Counter(pieces(normalized(answer))), Counter(pieces(normalized(one)))) for one in expected), default=0.0
    )


def rouge_n(text: str, reference: str, n: int) -> float:
    """F1 of the n-grams that both have (Lin, 2004); lower case, every Han character a word."""
    return _f1(_grams(_words(text), n), _grams(_words(reference), n))


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004)."""
    ours, theirs = _words(text), _words(reference)
    if not ours or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for j, other in enumerate(theirs, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(ours) + len(theirs))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all reach at most, between neighbours in proportion (NumPy's linear method)."""
    ranked = sorted(values)
    at = share * (len(ranked) - 1)
    low = int(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[\u3400-\u9fff]", text.lower())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(ours: Counter[Any], theirs: Counter[Any]) -> float:
    total = sum(ours.values()) + sum(theirs.values())
    if not total:
        return 1.0
    return 2 * sum(min(count, theirs[key]) for key, count in ours.items()) / total
