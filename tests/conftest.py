"""Fixtures shared by every test: where the real model files are."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from millis.hub import Entry

FILES = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen2.5-0.5b": "qwen2.5-0.5b.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
    "minilm": "minilm",
}


NOT_RUN = "not run"


def pytest_configure() -> None:
    """A shell ignores Ctrl-C for what runs in the background; the programs that tests interrupt would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def not_run(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes what cannot run on this machine; it is said behind all tests, whichever process found it."""
    return partial(record_property, NOT_RUN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for some in terminalreporter.stats.values() for report in some]
    found = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == NOT_RUN}
    for text in sorted(found):
        terminalreporter.write_line(f"not run: {text}")


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    """name → file: from the folder MILLIS_TEST_MODELS, otherwise pulled once into the user's cache."""

    def find(name: str) -> Path:
        folder = os.environ.get("MILLIS_TEST_MODELS")
        if folder:
            return Path(folder) / FILES[name]
        from millis import hub

        return hub.resolve(name, agree=agree)

    return find


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Gives a home of its own the packed weights of all such homes: to pack 100 MB for each test would take long."""
    shared = tmp_path_factory.mktemp("packed")

    def share(home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "packed").symlink_to(shared)

    return share


def agree(entry: Entry) -> bool:
    """Says what running the tests agrees to; README.md says it beforehand."""
    print(f"\n{entry.terms}", file=sys.__stderr__)
    return True
