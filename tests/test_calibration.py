"""Calibration in closed form: contextual bias, a temperature that is known, and files that are none."""

from __future__ import annotations

import math
import random

import pytest

from millis.tasks.calibration import Calibration, contextual, fit_temperature, softmax
from millis.types import RequestError


def test_what_says_nothing_becomes_uniform() -> None:
    """Zhao et al., 2021, equation 2 with W = diag(p)⁻¹: on the content-free text itself every label is as likely."""
    free = [math.log(0.7), math.log(0.2), math.log(0.1)]
    made = contextual(["a", "b", "c"], [free])
    assert softmax(made.apply(["a", "b", "c"], free)) == pytest.approx([1 / 3] * 3)
    p = [0.5, 0.3, 0.2]
    want = [x / y for x, y in zip(p, [0.7, 0.2, 0.1], strict=True)]
    got = softmax(made.apply(["a", "b", "c"], [math.log(x) for x in p]))
    assert got == pytest.approx([x / sum(want) for x in want])


def test_several_content_free_texts_count_by_their_mean() -> None:
    made = contextual(["a", "b"], [[math.log(0.9), math.log(0.1)], [math.log(0.5), math.log(0.5)]])
    assert made.bias == pytest.approx({"a": math.log(0.7), "b": math.log(0.3)})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    source = random.Random(1)
    rows = [[source.gauss(0, 2) for _ in range(4)] for _ in range(2500)]
    right = [source.choices(range(4), softmax([x / temperature for x in row]))[0] for row in rows]
    assert fit_temperature(rows, right) == pytest.approx(temperature, rel=0.12)


def test_a_calibration_survives_its_file_and_refuses_others() -> None:
    made = Calibration({"好": -0.5, "bad": 0.25}, 1.5)
    assert Calibration.loads(made.dumps()) == made
    with pytest.raises(RequestError, match="without the label 'new'"):
        made.apply(["好", "new"], [0.0, 0.0])
    for text in ("", "[]", "{}", '{"bias": {"a": "x"}, "temperature": 1}', '{"bias": {}, "temperature": 1}'):
        with pytest.raises(RequestError):
            Calibration.loads(text)
    with pytest.raises(RequestError, match="temperature"):
        Calibration({"a": 0.0}, 0.0)


def test_softmax_of_impossible_labels_is_uniform() -> None:
    assert softmax([-math.inf, -math.inf]) == [0.5, 0.5]
    assert softmax([0.0, -math.inf]) == [1.0, 0.0]
