"""Progress on the terminal: a bar where someone watches, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Bar:
    """A Progress, to be used as a context manager."""

    def __init__(self, doing: str = "fetching") -> None:
        self._doing = doing
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = self._said = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def start(self, total_bytes: int, what: str) -> None:
        self._total, self._done, self._said = total_bytes, 0, 0
        if not sys.stderr.isatty():
            self.say(f"{self._doing} {what}, {total_bytes / 1e6:.0f} MB")
            return
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total_bytes)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._total and self._done * 4 // self._total > self._said:
            self._said = self._done * 4 // self._total
            self.say(f"{25 * self._said} %")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
