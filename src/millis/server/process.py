"""What all engine processes share: the socket to the server, starting, and ending when it closes.

Signals are the server's business; a failed step ends the process, and the server starts another.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from millis.server.messages import EngineInfo, Failed, Frames, Progress, Ready, Refused, Start, frame
from millis.types import DeadlineError, GrammarError, MillisError, OverloadError, no_thread

CRASHED = 70  # exit code after a failed step: EX_SOFTWARE
STATS_S = 0.1  # a worker that is busy sends its figures so often


class Line:
    """The socket to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Sends one frame; ends the process where nobody listens."""
        data = frame(message)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError:
            os._exit(0)

    def receive(self, frames: Frames, take: Callable[[Any], None]) -> None:
        """Hands every message to `take`; ends the process when the server has gone."""
        try:
            while data := self._socket.recv(1 << 16):
                for message in frames.feed(data):
                    take(message)
        except OSError:
            pass
        except BaseException:
            traceback.print_exc()
            os._exit(CRASHED)
        os._exit(0)


class Report:
    """What a load has to say, told to the server."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def say(self, text: str) -> None:
        self._line.send(Progress(text))

    def start(self, total_bytes: int, what: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


def refusal(number: int, error: MillisError) -> Refused:
    """What a request is told that the engine does not take."""
    match error:
        case DeadlineError():
            return Refused(number, "deadline_unmeetable", str(error), error.predicted_ms, error.retry_after_s)
        case OverloadError():
            return Refused(number, "overloaded", str(error), None, error.retry_after_s)
        case GrammarError():
            return Refused(number, "invalid_grammar", str(error), rule=error.rule)
        case _:
            return Refused(number, "invalid_request", str(error))


class Worker(Protocol):
    """A loaded model that answers messages."""

    def warm_up(self, *, again: bool) -> None:
        """Touches memory, and measures what steps take. again: a handful of steps; requests wait."""

    def info(self, load_s: float, warm_s: float) -> EngineInfo:
        """What was loaded."""

    def take(self, message: Any) -> None:
        """Takes in one message, in the receiver thread."""

    def run(self) -> None:
        """Works until the process is ended."""


def main(load: Callable[[Start, Line], Worker]) -> None:
    """`python -m MODULE FD`: loads what the first message names, reports, and works until the socket closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal's go to all of its processes
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)
    with contextlib.suppress(OSError, AttributeError):  # the server may have put itself first; see run.py
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    connection = socket.socket(fileno=int(sys.argv[1]))
    frames = Frames()
    start: Start | None = None
    while start is None:
        data = connection.recv(1 << 16)
        if not data:
            return
        messages = frames.feed(data)
        start = messages[0] if messages else None
    line = Line(connection)
    try:
        began = time.monotonic()
        worker = load(start, line)
        loaded = time.monotonic()
        worker.warm_up(again=start.again)
        receiver = threading.Thread(target=line.receive, args=(frames, worker.take), daemon=True, name="receiver")
        receiver.start()
    except (MillisError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            error = no_thread(error)
        with contextlib.suppress(OSError):  # the server may have ended for the same reason
            connection.sendall(frame(Failed(0, str(error) or type(error).__name__)))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection looks at it again
    line.send(Ready(worker.info(loaded - began, time.monotonic() - loaded)))
    try:
        worker.run()
    except BaseException:
        traceback.print_exc()
        os._exit(CRASHED)
