"""Locks among the threads of a process, and whose turn it is to use the runner: in the order in which they came."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lock:
    """A lock among threads of the process that made it.

    RuntimeError in a child forked from that, where threads that held it are no more, and waiting would never end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()

    def acquire(self, blocking: bool = True) -> bool:
        if self._process == os.getpid():
            return self._lock.acquire(blocking)
        if blocking:
            raise RuntimeError("this process was forked from the one that loaded the model; load it after the fork")
        return False

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class Turn(threading.Condition):
    """The lock of an engine's bookkeeping and, kept without it while a step lasts, the right to use the runner.

    Who changes the bookkeeping so that others need not wait any longer tells them (`notify_all`).
    """

    def __init__(self) -> None:
        super().__init__(Lock())  # type: ignore[arg-type]  # any lock will do
        self.taken = False  # a thread uses the runner
        self._line: deque[object] = deque()  # those that want to, who came first at the front

    @property
    def awaited(self) -> bool:
        """Whether a thread waits for the runner."""
        return bool(self._line)

    def take(self, served: Callable[[], bool] = bool) -> bool:
        """Under the lock: waits for the runner in the order of arrival; False: `served` came true, it is not needed."""
        if served():
            return False
        if self.taken or self.awaited:
            place = object()
            self._line.append(place)
            try:
                while self.taken or self._line[0] is not place:
                    self.wait()
                    if served():
                        return False
            finally:
                self._line.remove(place)
                self.notify_all()
        self.taken = True
        return True

    def give(self) -> None:
        """Under the lock: the runner is free for the next one."""
        self.taken = False
        self.notify_all()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The runner and the bookkeeping for this thread alone."""
        with self:
            self.take()
            try:
                yield
            finally:
                self.give()
