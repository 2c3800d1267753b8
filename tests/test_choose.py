"""The choice of types against trying every combination."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from millis.models.tensor import GgmlType
from millis.quantize.choose import Choice, Option, hull, smallest, within_loss, within_size

TYPES = list(GgmlType)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, list[Option]]:
    """Up to four tensors of up to four options each."""
    found = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
        found[name] = [Option(TYPES[i], size, draw(st.integers(0, 50)) / 8) for i, size in enumerate(sizes)]
    return found


def totals(choice: Choice) -> tuple[float, float]:
    return sum(option.size for option in choice.values()), sum(option.loss for option in choice.values())


def every(options: dict[str, list[Option]]) -> list[Choice]:
    return [dict(zip(options, combination, strict=True)) for combination in itertools.product(*options.values())]


def largest_step(options: dict[str, list[Option]], of: str) -> float:
    steps = [
        abs(getattr(b, of) - getattr(a, of))
        for found in options.values()
        for a, b in itertools.pairwise(hull(found))
    ]  # fmt: skip
    return max(steps, default=0.0)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 160))
def test_within_a_size_the_loss_is_the_least_but_for_one_step(options: dict[str, list[Option]], limit: int) -> None:
    possible = [totals(choice)[1] for choice in every(options) if totals(choice)[0] <= limit]
    found = within_size(options, limit)
    assert (found is None) == (not possible)
    if found is not None:
        size, loss = totals(found)
        assert size <= limit
        assert min(possible) <= loss <= min(possible) + largest_step(options, "loss") + 1e-9


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 200))
def test_within_a_loss_the_size_is_the_least_but_for_one_step(options: dict[str, list[Option]], eighths: int) -> None:
    limit = eighths / 8
    possible = [totals(choice)[0] for choice in every(options) if totals(choice)[1] <= limit]
    found = within_loss(options, limit)
    assert (found is None) == (not possible)
    if found is not None:
        size, loss = totals(found)
        assert loss <= limit
        assert min(possible) <= size <= min(possible) + largest_step(options, "size") + 1e-9


def test_a_step_too_large_for_what_is_missing_is_left_to_smaller_ones() -> None:
    """Its gain a byte is the best, but two of the others do, for a tenth of the bytes."""
    vocabulary = [Option(GgmlType.Q4_0, 10, 8.0), Option(GgmlType.Q8_0, 30, 0.0)]
    small = [Option(GgmlType.Q4_0, 1, 0.5), Option(GgmlType.Q8_0, 2, 0.2)]
    options = {"a": vocabulary, "b": small, "c": small, "d": small}
    for limit, wanted in ((9.25, (14, 9.2)), (9.0, (15, 8.9)), (8.4, (33, 1.5)), (1.4, (34, 1.2)), (0.6, (36, 0.6))):
        found = within_loss(options, limit)
        assert found is not None and totals(found) == pytest.approx(wanted)


def test_what_a_large_step_leaves_is_spent_on_others() -> None:
    vocabulary = [Option(GgmlType.Q4_0, 10, 8.0), Option(GgmlType.Q8_0, 30, 0.0)]
    small = [Option(GgmlType.Q4_0, 1, 0.5), Option(GgmlType.Q8_0, 2, 0.0)]  # of more gain a byte
    found = within_loss({"a": vocabulary, "b": small, "c": small}, 7.5)
    assert found is not None and totals(found) == pytest.approx((32, 1.0))


def test_an_option_that_costs_more_and_gains_nothing_is_never_taken() -> None:
    options = {"a": [Option(GgmlType.Q4_0, 4, 1.0), Option(GgmlType.Q4_1, 5, 1.0), Option(GgmlType.Q8_0, 8, 0.0)]}
    assert [option.type for option in hull(options["a"])] == [GgmlType.Q4_0, GgmlType.Q8_0]
    assert smallest(options)["a"].type is GgmlType.Q4_0
    for limit, wanted in ((4, GgmlType.Q4_0), (7, GgmlType.Q4_0), (8, GgmlType.Q8_0)):
        found = within_size(options, limit)
        assert found is not None and found["a"].type is wanted
    assert within_size(options, 3) is None and within_loss(options, -1) is None
    assert within_loss(options, 0.5) == {"a": pytest.approx(options["a"][2])}
