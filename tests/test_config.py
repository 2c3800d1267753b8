"""EngineConfig: what it refuses, where its defaults come from, and that it does not change."""

from __future__ import annotations

import ast
import inspect
import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from millis import config
from millis.config import EngineConfig, available_memory_bytes, usable_cores
from millis.types import RequestError


@pytest.mark.parametrize(
    "name", ["threads", "context", "max_sequences", "max_batch_tokens", "cache_tokens", "max_waiting"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", 1 << 40])
def test_numbers_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be a whole number in \[1, \d+\], not"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["max_gap_ms", "max_step_ms", "delivery_ms"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "2", 1e7])
def test_milliseconds_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be milliseconds in \[[01], 1000000\], not"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "half"),
        ("precision", None),
        ("isa", 2),
        ("isa", None),
        ("speculation", "on"),
        ("draft", 3),
        ("draft", ""),
        ("prefix_cache", 1),
        ("prefix_cache", None),
        ("screen", "yes"),
    ],
)
def test_names_that_are_none_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be .*not {value!r}"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["threads", "max_sequences", "max_batch_tokens"])
def test_what_needs_a_number_takes_no_none(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        EngineConfig(**{name: None})


@pytest.mark.parametrize("speculation", ["ngram", "off"])
def test_a_draft_model_that_would_never_be_asked_is_refused(speculation: str) -> None:
    with pytest.raises(RequestError, match=f"draft model needs speculation='auto', not '{speculation}'"):
        EngineConfig(draft="smollm2", speculation=speculation)  # type: ignore[arg-type]


def test_none_leaves_the_context_to_the_model() -> None:
    assert EngineConfig(context=None, cache_tokens=None) == EngineConfig()


def test_it_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().threads = 3  # type: ignore[misc]


def test_every_field_has_its_docstring() -> None:
    (tree,) = ast.parse(inspect.getsource(EngineConfig)).body
    assert isinstance(tree, ast.ClassDef)
    described = [
        before.target.id
        for before, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    ]
    assert described == [field.name for field in fields(EngineConfig)]


@pytest.mark.parametrize(
    ("value", "expected"), [("avx2", "avx2"), ("", "auto"), (None, "auto"), ("nonsense", "nonsense")]
)
def test_the_instruction_set_comes_from_the_environment(
    value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILLIS_ISA", raising=False)
    if value is not None:
        monkeypatch.setenv("MILLIS_ISA", value)
    assert EngineConfig().isa == expected
    assert EngineConfig(isa="scalar").isa == "scalar"


@pytest.mark.parametrize(
    ("cpus", "siblings", "quota", "expected"),
    [
        ([0, 1, 2, 3], {}, None, 4),
        ([0, 1, 2, 3], {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}, None, 2),
        ([0, 2], {0: "0,2", 2: "0,2"}, None, 1),
        ([0, 1, 2, 3], {}, 2, 2),
        ([0, 1], {}, 8, 2),
    ],
)
def test_usable_cores(
    cpus: list[int], siblings: dict[int, str], quota: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Affinity, hyper-threads and the control groups' quota, each by itself."""

    def read(path: Path, *_: Any, **__: Any) -> str:
        cpu = int(path.parts[-3].removeprefix("cpu")) if path.name == "thread_siblings_list" else -1
        if cpu not in siblings:
            raise FileNotFoundError(path)
        return siblings[cpu] + "\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)
    monkeypatch.setattr(config, "cpu_quota", lambda: quota)
    monkeypatch.setattr(config.Path, "read_text", read)
    assert usable_cores() == expected


def test_the_default_is_this_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineConfig().threads == usable_cores() >= 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert EngineConfig().threads == 1


@pytest.mark.parametrize(
    ("meminfo", "left", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:   4 kB\n", None, 4096),
        ("MemAvailable: 4 kB", 4000, 4000),
        ("MemAvailable: 4 kB", 50000, 4096),
        ("MemTotal: 9 kB", 50000, None),
        ("nonsense", 50000, None),
        (None, 50000, None),
    ],
)
def test_available_memory(
    meminfo: str | None, left: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's, within the control groups' limits."""

    def read(path: Path, *_: Any, **__: Any) -> str:
        if meminfo is None:
            raise FileNotFoundError(path)
        return meminfo

    monkeypatch.setattr(config, "memory_left_bytes", lambda: left)
    monkeypatch.setattr(config.Path, "read_text", read)
    assert available_memory_bytes() == expected
