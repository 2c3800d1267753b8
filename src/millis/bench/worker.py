"""One engine in a process of its own, for the bench: JSON lines in on standard input, out on standard output.

`python worker.py ENGINE.py` loads the file's `class Engine` under the interpreter that has the engine's libraries. So
this file imports the standard library only, and nothing of ours. An Engine has `version`, perhaps `facts` (a dict), and

    __init__(spec)                   loads; spec: {"model": path, "threads": n, "context": tokens}
    run(prompt, new_tokens, emit)    greedy, past end-of-sequence; calls emit(token) as each token is known

Requests: {"do": "load", "spec": {...}}, {"do": "run", "prompt": [ids], "new_tokens": n}. A reply is {"ok": {...}} or
{"error": text}.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(engine_file: str) -> None:
    sys.path.pop(0)  # this folder's modules must not shadow anybody's
    if sys.platform == "linux":  # a worker is mostly stopped, and would outlive a parent that was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    server = Server(engine_file)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"ok": getattr(server, "do_" + request.pop("do"))(**request)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Server:
    """What can be asked of a worker."""

    def __init__(self, engine_file: str) -> None:
        self._file = engine_file
        self._engine: Any = None

    def do_load(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Imports and loads the engine: {"version", "facts", "import_ms", "load_ms"}."""
        begin = time.perf_counter()
        kind = runpy.run_path(self._file)["Engine"]
        imported = time.perf_counter()
        self._engine = kind(spec)
        loaded = time.perf_counter()
        ms = {"import_ms": 1000 * (imported - begin), "load_ms": 1000 * (loaded - imported)}
        return {"version": str(self._engine.version), "facts": getattr(self._engine, "facts", {}), **ms}

    def do_run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """{"tokens", "ms": milliseconds from the start to each of them}."""
        tokens: list[int] = []
        times: list[float] = []

        def emit(token: int) -> None:
            times.append(time.perf_counter())
            tokens.append(int(token))

        begin = time.perf_counter()
        self._engine.run(prompt, new_tokens, emit)
        return {"tokens": tokens, "ms": [1000 * (at - begin) for at in times]}


if __name__ == "__main__":
    main(sys.argv[1])
