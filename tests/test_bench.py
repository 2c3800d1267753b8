"""The speed bench: order of rounds, medians and ratios on made-up engines; the peers on a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import millis
from millis import _native
from millis.bench.engine import Millis, Row, measure, report
from millis.bench.peers import PEERS, Transformers, make
from millis.types import RequestError


class Scripted:
    """An engine whose times are known in advance; it writes down when it ran."""

    def __init__(self, name: str, times: list[float], log: list[str]) -> None:
        self.name = name
        self._times = list(times)
        self._log = log
        self.prompts: list[list[int]] = []

    def run(self, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
        self._log.append(self.name)
        self.prompts.append(prompt)
        time = self._times.pop(0)
        return time, [time / 10] * (new_tokens - 1)


def scripted(log: list[str]) -> tuple[Scripted, Scripted]:
    return Scripted("millis", [99, 4, 2, 6], log), Scripted("other", [99, 30, 10, 20], log)


def test_rounds_are_interleaved_and_the_first_only_warms_up() -> None:
    log: list[str] = []
    rows = measure(scripted(log), [8], vocab=50, new_tokens=3, rounds=3)
    assert log == ["millis", "other"] * 4
    assert [(row.engine, row.first_ms, row.first_spread) for row in rows] == [
        ("millis", 4, (2, 6)),
        ("other", 20, (10, 30)),
    ]
    assert [len(row.nexts) for row in rows] == [6, 6]
    assert rows[1].next_ms == pytest.approx(2)


def test_all_engines_see_the_same_ids() -> None:
    ours, other = scripted([])
    measure([ours, other], [8], vocab=50, new_tokens=2, rounds=3)
    assert ours.prompts == other.prompts
    assert len(set(map(tuple, ours.prompts))) == 1
    assert len(ours.prompts[0]) == 8 and all(0 <= token < 50 for token in ours.prompts[0])


def test_progress_is_told_of_every_run() -> None:
    ticks: list[int] = []
    measure(scripted([]), [8], vocab=50, new_tokens=2, rounds=3, advance=lambda: ticks.append(1))
    assert len(ticks) == 8


def test_report_states_the_limit_and_the_ratios() -> None:
    rows = measure(scripted([]), [8], vocab=50, new_tokens=3, rounds=3)
    result = report(rows, weight_bytes=50_000_000, bandwidth=25.0)
    assert result["limit_next_ms"] == pytest.approx(2.0)
    ours, other = result["rows"]
    assert (ours["first_over_millis"], ours["next_over_millis"]) == (1, 1)
    assert other["first_over_millis"] == pytest.approx(5)
    assert other["next_over_millis"] == pytest.approx(5)


def test_a_median_is_not_moved_by_one_outlier() -> None:
    row = Row("x", 1, firsts=[1, 1, 1, 100], nexts=[2, 2, 2, 2, 500]).summarize()
    assert (row.first_ms, row.next_ms) == (1, 2)
    assert row.next_spread == (2, 500)


def test_unknown_peers_are_named() -> None:
    with pytest.raises(RequestError, match="'lama'.*transformers"):
        make(["lama"], None)  # type: ignore[arg-type]
    assert set(PEERS) >= {"transformers", "llama.cpp"}


def test_real_engines_run_the_same_greedy_work(model_path: Callable[[str], Path]) -> None:
    lm = millis.load(model_path("smollm2"), context=64)
    ours, theirs = Millis(lm), Transformers(lm)
    for engine in (ours, theirs):
        first, gaps = engine.run([1, 2, 3, 4], 5)
        assert first > 0 and gaps and all(gap > 0 for gap in gaps)
    assert len(theirs.run([1, 2, 3], 6)[1]) == 5


def test_bandwidth_is_a_plausible_number_and_its_arguments_are_checked() -> None:
    assert 0.1 < _native.read_bandwidth(8, 1) < 10_000
    for mib, threads in ((0, 1), (1, 0), (-1, 1), (1 << 20, 1)):
        with pytest.raises(ValueError, match="read_bandwidth"):
            _native.read_bandwidth(mib, threads)
