"""Turns: round robin among tenants, jobs taken out, the longest queue gives way."""

from __future__ import annotations

from millis.server.turns import Turns


def filled(most: int, *jobs: str) -> Turns[str]:
    """Jobs named by tenant and number, as "a1"."""
    turns: Turns[str] = Turns(most)
    for number, job in enumerate(jobs):
        assert turns.add(job[0], number, job) is None
    return turns


def drained(turns: Turns[str]) -> list[str]:
    found = []
    while (job := turns.next()) is not None:
        found.append(job)
    return found


def test_tenants_take_turns_and_each_ones_jobs_keep_their_order() -> None:
    turns = filled(9, "a1", "a2", "a3", "b1", "c1", "c2")
    assert drained(turns) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert len(turns) == 0


def test_a_job_that_is_taken_out_costs_nobody_a_turn() -> None:
    turns = filled(9, "a1", "a2", "b1")
    assert turns.drop(0) == "a1" and turns.drop(0) is None and turns.drop(7) is None
    assert len(turns) == 2 and drained(turns) == ["a2", "b1"]


def test_where_there_is_no_room_the_last_of_the_longest_queue_goes() -> None:
    turns = filled(3, "a1", "a2", "a3")
    assert turns.add("a", 3, "a4") == "a4"
    assert turns.add("b", 4, "b1") == "a3"
    assert turns.add("c", 5, "c1") == "a2"
    assert drained(turns) == ["a1", "b1", "c1"]
