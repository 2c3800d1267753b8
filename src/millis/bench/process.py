"""A worker process seen from the parent: asked, watched, stopped while another works, measured, and ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from millis.types import MillisError

LAST_WORDS = 3  # lines of standard error that a failure quotes


class WorkerError(MillisError):
    """A worker that died, hung, or answered what cannot be; the text says which."""


class Worker:
    """JSON lines to a process of its own session and back. It is stopped (SIGSTOP) except while it answers.

    Engines spin on their cores for a while after work; a stopped process takes no time from the one that is measured.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._stderr = tempfile.TemporaryFile()
        self._last_words = ""
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply's "ok". WorkerError otherwise; after a death or a time-out the worker is gone."""
        assert self._process.stdin is not None
        if self._process.returncode is not None:
            raise WorkerError(f"{self._how_it_died()}{self._last_words}")
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + timeout_s)
        except TimeoutError:
            self.close()
            raise WorkerError(f"gave no answer to {request['do']!r} in {timeout_s:g} s{self._last_words}") from None
        except (EOFError, BrokenPipeError):
            self.close()
            raise WorkerError(f"{self._how_it_died()}{self._last_words}") from None
        self._signal(signal.SIGSTOP)
        try:
            reply = json.loads(line)
        except ValueError:
            raise WorkerError(f"answered {line[:80]!r}, which is no JSON") from None
        if not isinstance(reply, dict) or not isinstance(reply.get("ok"), dict):
            error = reply.get("error") if isinstance(reply, dict) else None
            raise WorkerError(str(error or f"answered {line[:80]!r}"))
        return dict(reply["ok"])

    def pids(self) -> list[int]:
        """The worker and whatever it started."""
        found, todo = [], [self._process.pid]
        while todo:
            found.append(pid := todo.pop())
            with suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{thread}/children") as file:
                        todo += map(int, file.read().split())
        return found

    def close(self) -> None:
        """Ends the worker and what it started; harmless when it is gone."""
        if self._stderr.closed:
            return
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._signal(signal.SIGKILL)  # what it left behind, in its session
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            self._last_words = "; it said: " + " | ".join(line[:200] for line in lines[-LAST_WORDS:])
        self._stderr.close()

    def _line(self, end: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _how_it_died(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"died of {signal.Signals(-code).name}"
        return f"ended with exit code {code}"
