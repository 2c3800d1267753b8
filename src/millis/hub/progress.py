"""How a pull reports itself: a callback protocol, and a counter for transfers that other programs make."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

POLL_S = 0.2


class Progress(Protocol):
    """What a pull calls. `advance` may come from another thread, never from two at once."""

    def start(self, total_bytes: int, what: str) -> None:
        """A transfer begins, or begins again from another source: counting starts at 0."""

    def advance(self, count: int) -> None:
        """`count` more bytes are here; together at most the total."""

    def say(self, text: str) -> None:
        """One line for the user."""


class Silent:
    """Progress that nobody watches."""

    def start(self, total_bytes: int, what: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below `folder`; what vanishes meanwhile counts nothing, links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike Path.rglob it passes over a folder that has gone
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


@contextmanager
def counted(progress: Progress, folder: Path, limit_bytes: int) -> Iterator[None]:
    """Reports the growth of `folder` while the body runs; a body that ends well has brought exactly `limit_bytes`.

    The clients that fetch for us report in formats that change between their versions; a folder's size does not.
    """
    before, seen, done = folder_bytes(folder), 0, threading.Event()

    def watch() -> None:
        nonlocal seen
        while not done.wait(POLL_S):
            now = max(seen, min(limit_bytes, folder_bytes(folder) - before))
            if now > seen:
                progress.advance(now - seen)
                seen = now

    watcher = threading.Thread(target=watch, name="millis-pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    if seen < limit_bytes:
        progress.advance(limit_bytes - seen)
