"""The speed bench on made-up engines: order of rounds, medians, ratios, limits, and lies it must not believe."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_files import HEAD_DIM, KV_HEADS, write_tiny
from millis import _native
from millis.bench.compare import cache_bytes
from millis.bench.engine import Measured, Row, measure, report
from millis.bench.peers import PEERS, chosen
from millis.bench.process import WorkerError
from millis.models.load import read_checkpoint
from millis.types import RequestError


class Scripted:
    """An engine that claims times known in advance and takes at least those; it writes down when it ran."""

    def __init__(self, name: str, firsts: list[float], log: list[str], tokens: list[int] | None = None) -> None:
        self.name = name
        self.prompts: list[list[int]] = []
        self.asked: list[int] = []
        self._firsts, self._log, self._tokens = list(firsts), log, tokens

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        self._log.append(self.name)
        self.prompts.append(prompt)
        self.asked.append(new_tokens)
        first = self._firsts.pop(0)
        ms = [first * (1 + i / 10) for i in range(new_tokens)]
        time.sleep(ms[-1] / 1000)
        return {"tokens": self._tokens or [prompt[0]] * new_tokens, "ms": ms}


class Claims(Scripted):
    """An engine that answers at once with whatever it was given."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("claims", [], [])
        self._answer = answer

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        return self._answer


class Breaks(Scripted):
    """An engine that fails from its third run on."""

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        if len(self.prompts) == 2:
            raise WorkerError("died of SIGILL")
        return super().run(prompt, new_tokens)


def run(engines: list[Any], prompts: list[int], depths: list[int], rounds: int = 3, **options: Any) -> Measured:
    read = iter(range(20, 999)).__next__
    return measure(engines, prompts=prompts, depths=depths, vocab=50, new_tokens=3, rounds=rounds, read=read, **options)


def pair(log: list[str]) -> list[Scripted]:
    return [Scripted("millis", [9, 4, 2, 6], log), Scripted("other", [9, 30, 10, 20], log)]


def test_rounds_are_interleaved_and_the_first_only_warms_up() -> None:
    log: list[str] = []
    result = run(pair(log), [], [8])
    assert log == ["millis", "other"] * 4
    assert [(row.engine, row.tokens, row.first_ms) for row in result.rows] == [
        ("millis", 8, [4, 2, 6]),
        ("other", 8, [30, 10, 20]),
    ]
    assert result.rows[1].next_ms == pytest.approx([3, 1, 2])  # a tenth of the first, three rounds
    assert result.failed == {}
    assert result.read_gb_per_s == [20, 21, 22]  # in every measured round


def test_all_engines_see_the_same_ids_and_every_round_others() -> None:
    ours, other = pair([])
    run([ours, other], [], [8])
    assert ours.prompts == other.prompts
    assert len(set(map(tuple, ours.prompts))) == 4
    assert all(len(prompt) == 8 and all(0 <= token < 50 for token in prompt) for prompt in ours.prompts)


def test_tokens_are_decoded_only_at_the_depths() -> None:
    engine = Scripted("millis", [1] * 6, [])
    rows = run([engine], [4, 8], [8, 16], rounds=1).rows
    assert [len(prompt) for prompt in engine.prompts] == [4, 4, 8, 8, 16, 16]
    assert engine.asked == [1, 1, 3, 3, 3, 3]
    assert [bool(row.next_ms) for row in rows] == [False, True, True]


def test_progress_is_told_of_every_run_that_was_due() -> None:
    ticks: list[int] = []
    run([Breaks("millis", [1] * 9, [])], [4, 8], [], advance=lambda: ticks.append(1))
    assert len(ticks) == 8


def test_an_engine_that_fails_is_named_and_the_others_go_on() -> None:
    log: list[str] = []
    result = run([Scripted("millis", [1] * 8, log), Breaks("other", [1] * 8, log)], [4, 8], [])
    assert result.failed == {"other": "at 4 tokens: died of SIGILL"}
    assert [(row.engine, row.tokens, len(row.first_ms)) for row in result.rows] == [
        ("millis", 4, 3),
        ("other", 4, 1),
        ("millis", 8, 3),
    ]
    assert log.count("other") == 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"tokens": [1], "ms": [0.001]}, "asked for 3 tokens of a vocabulary of 50 and gave"),
        ({"tokens": [1, 2, 50], "ms": [0.001] * 3}, "vocabulary of 50"),
        ({"tokens": [1, 2, True], "ms": [0.001] * 3}, "vocabulary of 50"),
        ({"tokens": "abc", "ms": [0.001] * 3}, "vocabulary of 50"),
        ({}, "gave None"),
        ({"tokens": [1, 2, 3], "ms": [0.001]}, "no time for each token"),
        ({"tokens": [1, 2, 3], "ms": [float("nan")] * 3}, "no time for each token"),
        ({"tokens": [1, 2, 3], "ms": [0.003, 0.002, 0.004]}, "cannot be"),
        ({"tokens": [1, 2, 3], "ms": [-0.001, 0.002, 0.004]}, "cannot be"),
        ({"tokens": [1, 2, 3], "ms": [1.0, 2.0, 1e6]}, "in a call of"),
    ],
)
def test_what_cannot_be_is_not_believed(answer: dict[str, Any], why: str) -> None:
    result = run([Claims(answer)], [], [8])
    assert result.rows == []
    assert why in result.failed["claims"]


def test_report_states_the_limit_and_the_ratios() -> None:
    rows = [
        Row("millis", 100, [2, 4, 6], [4, 4, 4], [[7], [8], [9]]),
        Row("other", 100, [40, 20, 20], [8, 6, 10], [[7], [8], [1]]),
        Row("other", 200, [20], [], [[7]]),
    ]
    failed = {"third": "not installed"}
    result = report(Measured(rows, failed, [60, 25, 5]), 50_000_000, lambda tokens: 10_000 * tokens)
    assert (result["read_gb_per_s"], result["read_spread_gb_per_s"]) == (25, [5, 60])
    assert result["limit_next_ms"] == pytest.approx(2.0)
    assert result["failed"] == failed
    ours, other, alone = result["rows"]
    assert (ours["first_over_millis"], ours["next_over_millis"], ours["same_first_token"]) == (1, 1, 1)
    assert other["first"] == {"median_ms": 20, "min_ms": 20, "max_ms": 40}
    assert other["first_over_millis"] == pytest.approx(5)
    assert other["next_over_millis"] == pytest.approx(2)
    assert other["next_limit_ms"] == pytest.approx(2.04)  # 1 MB of keys and values more
    assert other["next_share_of_limit"] == pytest.approx(2.04 / 8)
    assert other["same_first_token"] == pytest.approx(2 / 3)
    assert (alone["first_over_millis"], alone["next"], alone["next_over_millis"]) == (None, None, None)


def test_windows_bound_what_attention_reads(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", "gemma3")
    config = read_checkpoint(tmp_path / "tiny.gguf").config
    each = KV_HEADS * HEAD_DIM * 2 * 2
    assert cache_bytes(replace(config, windows=()), 20) == 40 * each
    assert cache_bytes(replace(config, windows=(), convolved=(True, False)), 20) == 20 * each
    assert cache_bytes(replace(config, windows=(8, 0)), 20) == 28 * each
    assert cache_bytes(replace(config, windows=(8, 0)), 5) == 10 * each


def test_unknown_peers_are_named() -> None:
    with pytest.raises(RequestError, match="'lama'.*transformers"):
        chosen("llama.cpp,lama")
    assert chosen("all") == ["millis-int8", *PEERS]
    assert chosen(" vllm, llama.cpp,vllm") == ["vllm", "llama.cpp"]
    assert chosen("") == []


def test_reads_are_plausible_and_their_arguments_are_checked() -> None:
    times = _native.read_times(8, 2, 7)
    assert len(times) == 7 and all(0.001 < ms < 100_000 for ms in times)
    assert _native.read_times(1, 1, 0) == []
    for count in (-1, 1_000_001):
        with pytest.raises(ValueError, match="count"):
            _native.read_times(1, 1, count)
    assert 0.1 < _native.read_bandwidth(8, 1) < 10_000
    for mib, threads in ((0, 1), (1, 0), (-1, 1), (1 << 20, 1)):
        with pytest.raises(ValueError, match="reading|threads"):
            _native.read_bandwidth(mib, threads)
