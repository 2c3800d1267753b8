"""Readings by deadlines, on a simulated reader: refused at once, in steps, never late in silence, interrupts undone."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from millis.engine.reading import Reading
from millis.engine.timely import TimelyReader
from millis.types import DeadlineError

BASE, ROW = 1.0, 0.1  # milliseconds of a step, and of a token in it


class Machine:
    """A reader whose vectors are the texts' first ids and lengths, and the clock that it moves."""

    def __init__(self) -> None:
        self.now_s, self.slow = 10.0, 1.0
        self.steps: list[int] = []
        self.fail: BaseException | None = None
        self.reader = TimelyReader(self.read, context=64, max_tokens=64, clock=lambda: self.now_s)
        self.reader.prepare(quick=False)
        self.steps.clear()

    def read(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        failed, self.fail = self.fail, None
        if failed is not None:
            raise failed
        self.steps.append(len(texts))
        self.now_s += self.slow * (BASE + ROW * sum(map(len, texts))) / 1000
        return np.asarray([[text[0], len(text)] for text in texts], np.float32)


def ask(machine: Machine, texts: list[list[int]], deadline_ms: float) -> NDArray[np.float32]:
    return machine.reader.read(texts, head=False, arrival_s=machine.now_s, deadline_ms=deadline_ms)[0]


TEXTS = [[i] * 30 for i in range(6)]


def test_it_reads_in_steps_and_in_order() -> None:
    machine = Machine()
    found = ask(machine, TEXTS, 100)
    assert found.tolist() == [[i, 30] for i in range(6)]
    assert len(machine.steps) > 1 and sum(machine.steps) == 6
    assert machine.reader.backlog()[0] == 0


def test_what_cannot_be_in_time_is_refused_before_any_step() -> None:
    machine = Machine()
    with pytest.raises(DeadlineError, match="would take") as found:
        ask(machine, TEXTS, 10)
    assert machine.steps == [] or machine.steps == [1]  # the probe, of a thread of its own
    assert 20 < found.value.predicted_ms < 30 and found.value.retry_after_s > 0
    assert machine.reader.backlog()[0] == 0


def test_a_deadline_that_passes_midway_ends_it() -> None:
    machine = Machine()
    machine.slow = 3.0
    with pytest.raises(DeadlineError, match=r"the deadline of 40 ms passed: [1-5] of 6 texts were read") as found:
        ask(machine, TEXTS, 40)
    assert found.value.predicted_ms > 40 and sum(machine.steps) < 6
    assert machine.reader.backlog()[0] == 0
    machine.slow, machine.steps = 30.0, []
    with pytest.raises(DeadlineError, match="1 of 1 texts were read"):  # the only step itself was late
        ask(machine, TEXTS[:1], 40)
    assert machine.steps == [1]


def test_a_refusal_that_was_wrong_is_learned_from() -> None:
    machine = Machine()
    machine.slow = 1.5
    for _ in range(40):
        ask(machine, TEXTS, 500)
    machine.slow = 1.0
    for _ in range(500):
        machine.now_s += 1
        reading = Reading(id=1, texts=[[0] * 16], arrival_s=machine.now_s, due_s=machine.now_s + 0.0032)
        try:
            machine.reader.admit(reading)
            break
        except DeadlineError:
            assert machine.reader.probe() and not machine.reader.probe()
    else:
        pytest.fail("the reader never believed that it had become fast again")


def test_an_interrupt_of_one_thread_leaves_the_others_their_texts() -> None:
    machine = Machine()
    other = Reading(id=9, texts=[[7] * 5], arrival_s=10.0)
    machine.reader.admit(other)
    machine.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ask(machine, [[3] * 5], 100)
    assert machine.reader.backlog()[0] == 1 and other.made == [] and other.steps == 0
    assert machine.reader.step() == [other] and other.made[0].tolist() == [7, 5]
    assert machine.reader.step() is None


def test_threads_get_their_own() -> None:
    machine = Machine()
    found: dict[int, NDArray[np.float32]] = {}

    def work(number: int) -> None:
        for _ in range(20):
            found[number] = ask(machine, [[number] * 4] * 5, 1e6)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {number: rows.tolist() for number, rows in found.items()} == {n: [[n, 4]] * 5 for n in range(4)}
