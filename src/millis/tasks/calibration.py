"""Label scores put right: contextual calibration (Zhao et al., 2021) and a temperature (Guo et al., 2017). Pure."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millis.types import RequestError, brief, number

CONTENT_FREE = ("N/A", "[MASK]", "...")  # texts that say nothing: what is left is what the prompt says of the labels
COLDEST, HOTTEST = 0.02, 50.0  # temperatures that are tried
LEAST_PROBABILITY = 1e-9
FINITE = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Calibration:
    """`bias` (nats) is taken from each label's log-probability, then all are divided by `temperature`."""

    bias: Mapping[str, float]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.bias, Mapping) or not self.bias:
            raise RequestError("a calibration needs a finite bias for every label")
        bias = {label: number(f"the bias of {brief(label)}", x, -FINITE, FINITE) for label, x in self.bias.items()}
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "temperature", number("temperature", self.temperature, COLDEST, HOTTEST))

    def apply(self, labels: Sequence[str], values: Sequence[float]) -> list[float]:
        """Log-probabilities of `labels` → calibrated ones, not normalised. RequestError: an unknown label."""
        missing = [label for label in labels if label not in self.bias]
        if missing:
            raise RequestError(
                f"the calibration was made without the label {missing[0]!r}; calibrate with these labels"
            )
        return [(value - self.bias[label]) / self.temperature for label, value in zip(labels, values, strict=True)]

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps({"bias": dict(self.bias), "temperature": self.temperature}, ensure_ascii=False, indent=2)

    @classmethod
    def loads(cls, text: str) -> Calibration:
        """From `dumps`. RequestError: anything else."""
        try:
            found: Any = json.loads(text)
            bias = {str(label): float(value) for label, value in found["bias"].items()}
            return cls(bias, float(found["temperature"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RequestError(f"this is no calibration; make one with --calibrate FILE --save FILE: {error}") from None


def contextual(labels: Sequence[str], free: Sequence[Sequence[float]]) -> Calibration:
    """From the labels' log-probabilities behind content-free texts, one row a text.

    Their mean probability p becomes uniform: q ∝ p̂ / p, W = diag(p)⁻¹ and b = 0 of Zhao et al.
    """
    rows = [softmax(row) for row in free]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    bias = {label: math.log(max(p, LEAST_PROBABILITY)) for label, p in zip(labels, mean, strict=True)}
    return Calibration(bias)


def fit_temperature(rows: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """The temperature that gives the right labels the highest likelihood.

    rows: log-probabilities of the labels, calibrated at temperature 1; right: the index of each row's label. The
    negative log-likelihood is convex in 1 / T, so a golden-section search finds its minimum.
    """
    if not rows or len(rows) != len(right):
        raise RequestError("a temperature needs labelled texts; give some")

    def loss(inverse: float) -> float:
        total = 0.0
        for row, label in zip(rows, right, strict=True):
            most = max(row)
            total += math.log(sum(math.exp((value - most) * inverse) for value in row)) - (row[label] - most) * inverse
        return total

    low, high = 1 / HOTTEST, 1 / COLDEST
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-6 * high:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return min(HOTTEST, max(COLDEST, 2 / (low + high)))


def softmax(values: Sequence[float]) -> list[float]:
    """exp(value) over their sum; all the same where every value is −∞."""
    best = max(values)
    if best == -math.inf:
        return [1 / len(values)] * len(values)
    weights = [math.exp(value - best) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]
