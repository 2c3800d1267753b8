"""The command `millis` as its users meet it: real processes with real pipes, or with a terminal of their own."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

LIMIT_S = 60.0
# The leader of a new session takes the first terminal it opens for its own, so that Ctrl-C becomes a signal.
OWN_TERMINAL = (  # a shell that runs tests in the background lets them ignore Ctrl-C
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.open(os.ttyname(0), os.O_RDWR); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def millis(*arguments: str | Path, stdin: str | bytes = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `millis ARGUMENTS` to its end. Its output must be UTF-8."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    command = [sys.executable, "-m", "millis", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, env=os.environ | environment, timeout=LIMIT_S)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """`millis ARGUMENTS`, running, with its three streams as pipes."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "millis", *map(str, arguments)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")


def error_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line that the command failed with, without its beginning `millis: `."""
    assert done.returncode == code, done
    assert done.stdout == "", done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("millis: "), done.stderr
    return lines[0].removeprefix("millis: ")


class Terminal:
    """`millis ARGUMENTS` in a terminal: type into it, and wait for what it shows."""

    def __init__(self, *arguments: str | Path, columns: int = 200) -> None:
        self.fd, slave = pty.openpty()
        command = [sys.executable, "-c", OWN_TERMINAL, "-m", "millis", *map(str, arguments)]
        environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.shown = ""  # everything so far, without colours
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.fd >= 0:
            os.close(self.fd)

    def hang_up(self) -> None:
        """Closes the terminal, as a window is closed."""
        os.close(self.fd)
        self.fd = -1

    def type(self, text: str) -> None:
        """Sends the keys; \\r is Enter, \\x03 Ctrl-C, \\x04 Ctrl-D."""
        os.write(self.fd, text.encode())

    def type_until(self, key: str, pattern: str) -> None:
        """Presses a key until the pattern is shown, each time after half a second without news.

        A terminal that is sent Ctrl-C forgets what it has not shown yet, so pressing faster could hide the answer.
        """
        end = time.monotonic() + LIMIT_S
        while re.compile(pattern).search(self.shown, self._seen) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[self._seen :]!r}"
            self.type(key)
            while self._read(0.5):
                pass
        self._seen = len(self.shown)

    def wait_for(self, pattern: str) -> str:
        """What was shown since the last wait, up to the end of the first match of `pattern`."""
        while (match := re.compile(pattern).search(self.shown, self._seen)) is None:
            assert self._read(LIMIT_S), f"no {pattern!r} in {self.shown[self._seen :]!r}"
        begin, self._seen = self._seen, match.end()
        return self.shown[begin : match.end()]

    def exit_code(self) -> int:
        """Waits for the end of the process."""
        while self._read(LIMIT_S):
            pass
        return self.process.wait(timeout=LIMIT_S)

    def _read(self, limit_s: float) -> bool:
        """Takes what is shown next; False if nothing is, within the limit."""
        if not select.select([self.fd], [], [], limit_s)[0]:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # the last process with this terminal has gone
            return False
        self.shown += COLOUR.sub("", data.decode("utf-8", "replace")).replace("\r\n", "\n")
        return bool(data)
