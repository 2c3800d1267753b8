"""A pull's progress: plain lines in a log, a bar in a terminal, and nothing of it on standard output."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from millis.hub import Progress
from millis.hub.bar import Bar


def pull(progress: Progress, steps: list[int], total: int = 200_000_000) -> None:
    progress.start(total, "smollm2")
    for step in steps:
        progress.advance(step)


class Screen(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Screen]:
    with mock.patch.object(sys, "stderr", Screen()) as screen:
        with mock.patch.dict(os.environ, {"TERM": "xterm", "COLUMNS": "120"}):
            yield screen


def test_a_log_gets_a_line_every_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        pull(bar, [1_000_000] * 200)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["fetching smollm2, 200 MB", "25 %", "50 %", "75 %", "100 %"]


def test_one_large_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        pull(bar, [0, 160_000_000, 1])
    assert capsys.readouterr().err.splitlines() == ["fetching smollm2, 200 MB", "75 %"]


def test_the_next_source_begins_at_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        pull(bar, [150_000_000])
        bar.say("no connection; trying the next source")
        pull(bar, [100_000_000])
    assert capsys.readouterr().err.splitlines() == [
        "fetching smollm2, 200 MB",
        "75 %",
        "no connection; trying the next source",
        "fetching smollm2, 200 MB",
        "50 %",
    ]


def test_an_empty_file_divides_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        pull(bar, [0], total=0)
    assert capsys.readouterr().err.splitlines() == ["fetching smollm2, 0 MB"]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal() as screen, Bar() as bar:
        pull(bar, [50_000_000, 50_000_000, 100_000_000])
    assert "smollm2" in screen.getvalue()
    assert "200.0/200.0 MB" in screen.getvalue()
    assert capsys.readouterr() == ("", "")


def test_lines_stand_above_the_bar_as_they_are() -> None:
    with terminal() as screen, Bar() as bar:
        pull(bar, [1_000_000])
        bar.say("[owner/repo] 100 % of it: no connection")  # nothing in it is markup
        pull(bar, [200_000_000])
    assert "[owner/repo] 100 % of it: no connection\n" in screen.getvalue()
    assert "200.0/200.0 MB" in screen.getvalue().partition("no connection")[2]


def test_a_second_source_replaces_the_bar() -> None:
    with terminal() as screen, Bar() as bar:
        pull(bar, [150_000_000])
        pull(bar, [20_000_000])
    last = screen.getvalue().rpartition("\x1b[2K")[2]
    assert "20.0/200.0 MB" in last and "150.0/200.0 MB" not in last


def test_an_error_leaves_the_terminal_usable() -> None:
    with terminal() as screen, pytest.raises(OSError, match="full"), Bar() as bar:
        pull(bar, [1_000_000])
        raise OSError("full")
    hidden, shown = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert shown > hidden >= 0, "the cursor stays hidden"
