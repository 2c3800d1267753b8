"""What a server endures, with its counters behind each step: python tools/abuse.py [--model smollm2] [--scale 1.0].

500 clients leave in mid-stream, 200 read nothing, a body of 50 MB, 10,000 random bodies, kill -9 of the engine, then
SIGTERM under load. The server is `millis serve` in a process of its own; tests/ has smaller doses of the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from serving import CHAT, LIMIT_S, Server, chat, random_bodies, until  # noqa: E402

COUNTERS = ("num_requests_active", "num_requests_in_flight", "num_requests_running", "num_requests_waiting")
STORY = chat("Write a story.", max_tokens=2000, ignore_eos=True, stream=True)


def left(server: Server) -> dict[str, float]:
    """What the server holds for requests; every figure is 0 when nothing was leaked."""
    return {name: server.metric(name) for name in (*COUNTERS, "kv_cache_usage_perc")}


def settled(server: Server) -> dict[str, Any]:
    """The counters once they are 0, or after a while what they are; and that a plain request is answered."""
    end = time.monotonic() + LIMIT_S
    while any(left(server).values()) and time.monotonic() < end:
        time.sleep(0.05)
    threads = len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))
    files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    found = {"answers": server.chat()[0] == 200, "threads": threads, "files": files, "memory_mb": memory_mb(server)}
    end = time.monotonic() + LIMIT_S
    while any(left(server).values()) and time.monotonic() < end:
        time.sleep(0.05)
    return {**found, "left": left(server)}


def memory_mb(server: Server) -> list[int]:
    """Resident memory of the HTTP process and of the engine's."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (server.process.pid, *server.workers())]
    return [count * os.sysconf("SC_PAGE_SIZE") >> 20 for count in pages]


def leave(server: Server, count: int) -> dict[str, Any]:
    """Clients that go when the first piece of their answer has come, 50 at a time."""

    def one(_: int) -> str:
        try:
            stream = server.stream(STORY)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        except AssertionError:
            return "refused"
        return "left"

    with ThreadPoolExecutor(50) as pool:
        ends = list(pool.map(one, range(count)))
    return {end: ends.count(end) for end in sorted(set(ends))}


def read_nothing(server: Server, count: int) -> dict[str, Any]:
    """Clients with a small window that ask for long streams and never read, all at once."""
    body = json.dumps(STORY).encode()
    connections = []
    for _ in range(count):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode())
        connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        connections.append(connection)
    begin = time.monotonic()
    other = server.chat(deadline_ms=10_000)[0]
    waited_s = time.monotonic() - begin
    until_s = time.monotonic() + 10 * LIMIT_S
    while any(left(server).values()) and time.monotonic() < until_s:
        time.sleep(0.2)
    for connection in connections:
        connection.close()
    return {"another meanwhile": other, "after_s": round(waited_s, 2), "gone_s": round(time.monotonic() - begin, 1)}


def huge_body(server: Server, megabytes: int) -> dict[str, Any]:
    """One body, refused before it is whole."""
    begin = time.monotonic()
    try:
        status: Any = server.ask(CHAT, b'{"model": "' + b"a" * (megabytes << 20) + b'"}')[0]
    except (BrokenPipeError, ConnectionResetError):
        status = "cut off"
    return {"status": status, "s": round(time.monotonic() - begin, 2)}


def answer_random(server: Server, count: int) -> dict[str, Any]:
    """How many of random bodies had which status, over one connection."""
    connection = server.connect()
    found: dict[str, int] = {}
    for path, data in random_bodies(count):
        connection.request("POST", path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        found[str(answer.status)] = found.get(str(answer.status), 0) + 1
    connection.close()
    return dict(sorted(found.items()))


def kill_engine(server: Server) -> dict[str, Any]:
    """With 8 streams under way. again_s: from the kill to an answer."""
    streams = [server.stream(STORY) for _ in range(8)]
    for stream in streams:
        next(stream)
    (worker,) = server.workers()
    begin = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    while server.chat("Still there?")[0] != 200:
        time.sleep(0.01)
    again_s = time.monotonic() - begin
    told = sum("error" in list(stream)[-1] for stream in streams)
    return {"again_s": round(again_s, 2), "streams told": told, "restarts": server.metric("engine_restarts_total")}


def terminate(server: Server) -> dict[str, Any]:
    """SIGTERM with 40 answers of 20 tokens under way."""
    statuses: list[int] = []
    ask = lambda: statuses.append(server.chat("Write a story.", max_tokens=20, ignore_eos=True)[0])  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    until(lambda: server.metric("num_requests_active") == len(threads))
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(LIMIT_S)
    for thread in threads:
        thread.join(LIMIT_S)
    return {"exit": code, "s": round(time.monotonic() - begin, 2), "answered": statuses.count(200), "of": len(threads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of the numbers")
    given = parser.parse_args()
    times = lambda count: max(1, round(given.scale * count))  # noqa: E731
    with Server(given.model, "--write-buffer-bytes", "16384") as server:
        print(json.dumps({"start": settled(server)}), flush=True)
        for name, step in (
            ("500 leave", lambda: leave(server, times(500))),
            ("200 read nothing", lambda: read_nothing(server, times(200))),
            ("50 MB", lambda: huge_body(server, times(50))),
            ("10,000 random bodies", lambda: answer_random(server, times(10_000))),
            ("kill -9", lambda: kill_engine(server)),
        ):
            found = step()
            print(json.dumps({name: found, "then": settled(server)}), flush=True)
        print(json.dumps({"SIGTERM": terminate(server)}), flush=True)


if __name__ == "__main__":
    main()
