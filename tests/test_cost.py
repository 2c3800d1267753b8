"""Step times: measured, in between, beyond, and what a busy moment does to them."""

from __future__ import annotations

import pytest

from millis.engine.cost import FRESH, StepCosts


def test_nothing_is_known_before_the_first_step() -> None:
    costs = StepCosts()
    assert not costs.known(1)
    assert costs.ms(1) == costs.ms(8) == 0


def test_lines_between_and_beyond_what_was_measured() -> None:
    costs = StepCosts()
    costs.add(2, 10.0)
    costs.add(6, 18.0)
    assert costs.known(2) and not costs.known(4)
    assert costs.ms(4) == pytest.approx(14)
    assert costs.ms(3) == pytest.approx(12)
    assert costs.ms(8) == pytest.approx(22)
    assert 7 < costs.ms(1) < 10


@pytest.mark.parametrize("true_ms", [4.0, 25.0])
def test_a_figure_follows_the_machine(true_ms: float) -> None:
    costs = StepCosts()
    costs.add(1, 10.0)
    for _ in range(40):
        costs.add(1, true_ms)
    assert costs.ms(1) == pytest.approx(true_ms, rel=0.02)


def test_a_pause_of_the_machine_hardly_counts() -> None:
    costs = StepCosts()
    costs.add(1, 10.0)
    costs.add(1, 10_000.0)
    assert costs.ms(1) < 11
    costs.add(4, 10_000.0)
    assert costs.ms(4) < 20


def test_a_pause_in_the_first_step_of_its_rows_is_forgotten_with_the_second() -> None:
    costs = StepCosts()
    costs.add(1, 10.0)
    costs.add(4, 10_000.0)
    costs.add(4, 15.0)
    assert costs.ms(4) == 15
    assert costs.ms(8) == pytest.approx(15 + 10 * 4 * 0.5 / 3)


def test_rows_that_are_dear_are_known_to_be_with_the_second_step() -> None:
    costs = StepCosts()
    for rows, ms in ((1, 10.0), (1, 10.0), (4, 45.0), (4, 44.0)):
        costs.add(rows, ms)
    assert costs.ms(4) == 44


def test_an_old_figure_is_forgotten_and_the_one_in_use_is_not() -> None:
    costs = StepCosts()
    costs.add(4, 50.0)
    for _ in range(FRESH):
        costs.add(1, 10.0)
    assert not costs.known(4)
    assert costs.known(1)
    assert costs.reach == 3
    assert 20 < costs.ms(4) < 45  # still thought to be dear, but less so: it is worth a look


def test_what_a_row_costs_is_carried_beyond_what_was_measured() -> None:
    costs = StepCosts()
    costs.add(1, 10.0)
    assert costs.reach == 3
    costs.add(3, 22.0)
    costs.add(3, 22.0)
    assert costs.reach == 7
    assert costs.ms(7) == pytest.approx(46)
    assert costs.ms(2) == pytest.approx(16)
