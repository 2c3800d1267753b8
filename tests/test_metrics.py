"""Metrics against values worked out by hand, papers' own examples, and the packages that define them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from millis.tasks import metrics


def test_accuracy_and_macro_f1_by_hand() -> None:
    true, predicted = ["a", "a", "b", "c"], ["a", "b", "b", None]
    assert metrics.accuracy(predicted, true) == 0.5
    assert metrics.macro_f1(predicted, true) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert metrics.macro_f1(["d"], ["a"]) == 0


def test_calibration_error_by_hand() -> None:
    sure, right = [0.95, 0.95, 0.55, 1.0], [True, False, True, True]
    bins = metrics.reliability(sure, right, bins=10)
    assert [(b.count, b.accuracy) for b in bins] == [(1, 1.0), (3, 2 / 3)]
    want = 1 / 4 * abs(1 - 0.55) + 3 / 4 * abs(2 / 3 - (0.95 + 0.95 + 1) / 3)
    assert metrics.calibration_error(bins) == pytest.approx(want)


def test_confidence_that_is_right_as_often_as_it_says_has_no_error() -> None:
    source = random.Random(0)
    sure = [source.random() for _ in range(40000)]
    right = [source.random() < c for c in sure]
    assert metrics.calibration_error(metrics.reliability(sure, right)) < 0.015


def test_rouge_of_lins_examples() -> None:
    """Lin, 2004, section 3: S2 and S3 have the same bigrams with S1, but longest subsequences of 3 and 2 words."""
    one, two, three = "police killed the gunman", "police kill the gunman", "the gunman kill police"
    assert metrics.rouge_n(two, one, 2) == metrics.rouge_n(three, one, 2) == pytest.approx(1 / 3)
    assert metrics.rouge_l(two, one) == pytest.approx(3 / 4)
    assert metrics.rouge_l(three, one) == pytest.approx(2 / 4)
    assert metrics.rouge_n("我爱北京", "我爱上海", 1) == pytest.approx(0.5)
    assert metrics.rouge_l("", one) == 0


def test_answers_are_compared_as_squad_does() -> None:
    assert metrics.exact_match("The  Eiffel-Tower.", ["eiffel tower"])
    assert metrics.exact_match("北京。", ["上海", "北京"])
    assert not metrics.exact_match("north", ["south"])
    assert metrics.answer_f1("in the old town of Bern", ["Bern"]) == pytest.approx(2 * (1 / 5) * 1 / (1 / 5 + 1))
    assert metrics.answer_f1("北京市", ["北京"]) == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_numpys(share: float) -> None:
    values = [5.0, 1.0, 9.5, 2.0, 2.0]
    assert metrics.percentile(values, share) == pytest.approx(float(np.quantile(values, share)))
