"""Step times predicted: tables, what is learned from steps, the margin, and measuring on a simulated machine."""

from __future__ import annotations

import random

import pytest

from millis.engine.predict import LATENESS, StepModel, Table, Work, regime
from simulated import BODY, HEAD, engine


def model() -> StepModel:
    made = StepModel()
    made.calibrate({1: 2.0, 8: 4.0, 24: 5.0, 128: 10.0}, {1: 0.5, 8: 1.2}, 0.001, 0.0001)
    return made


def test_a_table_draws_lines_between_and_beyond() -> None:
    table = Table({1: 2.0, 8: 4.1, 16: 4.5})
    assert [table(rows) for rows in (0, 1, 8, 16)] == [0, 2.0, 4.1, 4.5]
    assert table(12) == pytest.approx(4.3)
    assert table(32) == pytest.approx(5.3)
    assert Table({4: 2.0})(8) == 4.0


def test_nothing_is_predicted_from_nothing() -> None:
    made = StepModel()
    assert not made.known and made.ms(Work(8, 8)) == 0 and made.decode_ms(1, 100) == 0


def test_a_step_adds_layers_head_and_attention() -> None:
    made = model()
    assert made.ms(Work(8, 8, 1000, 0)) == pytest.approx(4.0 + 1.2 + 1.0)
    assert made.ms(Work().add(100, 24, 1)) == pytest.approx(5.0 + 0.5 + 0.0001 * (24 * 100 + 288))
    mixed = Work().add(10, 1, 1).add(20, 1, 1).add(0, 126, 0)
    assert (mixed.rows, mixed.samples, mixed.reads, mixed.pairs) == (128, 2, 30, 7938)


@pytest.mark.parametrize(("rows", "kernels"), [(1, 0), (2, 1), (8, 1), (9, 2), (23, 2), (24, 3), (128, 4)])
def test_regimes_are_those_of_the_kernels(rows: int, kernels: int) -> None:
    assert regime(rows) == kernels


def test_steps_correct_the_prediction_of_their_regime_and_less_so_others() -> None:
    made = model()
    work = Work(8, 8)
    for _ in range(60):
        made.observe(work, made.ms(work), 2 * 5.2)
    assert made.ms(work) == pytest.approx(10.4, rel=0.02)
    assert 1.1 * 2.5 < made.ms(Work(1, 1)) < 2.1 * 2.5


def test_without_tables_the_first_steps_teach() -> None:
    made = StepModel()
    made.observe(Work(20, 1), 0.0, 8.0)
    assert made.ms(Work(20, 1)) == pytest.approx(8.0)
    made.observe(Work(1, 1), made.ms(Work(1, 1)), 2.5)
    assert made.ms(Work(1, 1)) == pytest.approx(2.5)
    assert made.margin_ms == 0  # a guess that was wrong is no lateness


def test_a_pause_of_the_machine_hardly_changes_predictions_but_makes_a_margin() -> None:
    made = model()
    work = Work(1, 1)
    for _ in range(50):
        made.observe(work, made.ms(work), 2.5)
    before = made.ms(work)
    made.observe(work, before, 40.0)
    assert made.ms(work) < 1.1 * before
    assert made.margin_ms == pytest.approx(37.5)
    for _ in range(LATENESS):
        made.observe(work, made.ms(work), 2.5)
    assert made.margin_ms < 1


def test_errors_are_kept_for_show() -> None:
    made = model()
    for ratio in (0.9, 1.0, 1.25):
        made.observe(Work(1, 1), 2.0, 2.0 / ratio)
    assert made.median_error() == pytest.approx(0.1)
    assert made.latest() == (2.0, pytest.approx(1.6))


def test_measuring_finds_the_simulated_machine() -> None:
    e = engine(noise=0.0, speed=1.7)
    for rows, samples in ((1, 1), (8, 8), (24, 1), (100, 1), (512, 0)):
        assert e.costs.ms(Work(rows, samples)) == pytest.approx(1.7 * (BODY(rows) + HEAD(samples)), rel=0.1)
    assert e.costs.decode_ms(1, 1000) - e.costs.decode_ms(1, 0) == pytest.approx(1.7 * 0.5, rel=0.1)
    assert e.scheduler.allocator.free == e.runner.pages


def test_measuring_ends_in_time_on_a_slow_machine_and_says_something_all_the_same() -> None:
    e = engine(calibrated=False, noise=0.0, speed=60.0)
    e.calibrate(budget_s=1.5)
    longest = 60 * (BODY(512) + HEAD(64)) / 1000
    assert e.clock() < 1.5 + longest
    assert e.costs.calibrated
    assert e.costs.decode_ms(1, 0) == pytest.approx(60 * 2.5, rel=0.1)


def test_a_quick_measurement_is_a_handful_of_steps() -> None:
    e = engine(calibrated=False, noise=0.0)
    e.calibrate(quick=True)
    assert len(e.runner.steps) <= 41  # type: ignore[attr-defined]
    assert e.costs.prefill_ms(100, 128) == pytest.approx(BODY(100), rel=0.1)


def test_predictions_of_mixed_steps_are_within_a_tenth() -> None:
    """Steps of random shapes on a machine that has slowed down since it was measured."""
    e, source = engine(noise=0.04), random.Random(4)
    errors = []
    for at in range(400):
        work = Work()
        for _ in range(source.randint(1, 12)):
            work = work.add(source.randint(0, 500), 1, 1)
        if source.random() < 0.5:
            work = work.add(0, source.randint(2, 200), 1)
        actual = 1.3 * (BODY(work.rows) + HEAD(work.samples) + 5e-4 * work.reads) * source.uniform(0.96, 1.04)
        predicted = e.costs.ms(work)
        e.costs.observe(work, predicted, actual)
        if at > 100:
            errors.append(abs(predicted - actual) / actual)
    assert sorted(errors)[len(errors) // 2] < 0.1
