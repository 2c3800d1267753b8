"""The life of a server: an engine that is killed, poison, SIGTERM under load, what cannot start."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millis.server import client
from millis.server.messages import Frames, Start, Submit, frame
from millis.server.open_files import OTHERS
from millis.types import ModelError, SamplingParams
from serving import CHAT, LIMIT_S, QUICK, Server, chat, until, workers
from shell import Terminal, error_line, millis


def test_a_killed_engine_fails_what_it_had_and_comes_back(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK) as server:
        poison = chat("Write a story about a crash.", max_tokens=4000, ignore_eos=True, stream=True)
        for crash in (1, 2):
            stream = server.stream(poison)
            next(stream)
            (worker,) = server.workers()
            os.kill(worker, signal.SIGKILL)
            last = list(stream)[-1]
            assert last["error"]["code"] == "engine_restarted"
            until(lambda: server.chat("Still there?")[0] == 200)  # each waits for the new process
            assert server.metric("engine_restarts_total") == crash
            assert server.workers() != [worker]
        status, answer = server.json(CHAT, {**poison, "stream": False})
        assert status == 422 and answer["error"]["code"] == "request_poisoned"
        assert server.metric("requests_failed_total", reason="engine_restarted") == 2
        assert server.metric("num_requests_in_flight") == 0
    assert server.process.returncode == 0
    assert "crash." not in server.errors  # no prompt in the log


def test_a_small_cache_is_the_context_that_clients_are_told(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK, "--cache-tokens", "128") as server:
        room = server.json("/v1/models/m")[1]["max_model_len"]
        assert room == 128
        status, answer = server.chat("Hello", max_tokens=room)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        status, answer = server.chat("Hello", max_tokens=None, ignore_eos=True)
        assert answer["usage"]["total_tokens"] == room and answer["choices"][0]["finish_reason"] == "length"


def test_sigterm_lets_answers_end_and_takes_no_new_ones(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK) as server:
        answers: list[tuple[int, Any]] = []
        ask = lambda: answers.append(server.chat("Write a story.", max_tokens=60, ignore_eos=True))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: server.metric("num_requests_active") == 4)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(LIMIT_S)
        assert server.process.wait(LIMIT_S) == 0
    assert [status for status, _ in answers] == [200] * 4
    assert all(answer["usage"]["completion_tokens"] == 60 for _, answer in answers)


def test_a_terminal_that_closes_lets_answers_end(model_path: Callable[[str], Path]) -> None:
    command = ("serve", "-m", model_path("smollm2"), "--served-name", "m", "--port", "0", *QUICK)
    with Terminal(*command) as terminal:
        port = int(terminal.wait_for(r"http://127\.0\.0\.1:\d+").rsplit(":", 1)[1])
        found: list[Any] = []

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
            body = chat("Write a story.", max_tokens=300, ignore_eos=True, stream=True)
            connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            found.append(answer.readline())
            begun.set()
            found.append(answer.read())
            connection.close()

        begun = threading.Event()
        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(LIMIT_S)
        (engine,) = workers(terminal.process.pid)
        terminal.hang_up()
        thread.join(LIMIT_S)
        assert terminal.process.wait(LIMIT_S) == 0
    assert b'"finish_reason":"length"' in found[1] and found[1].endswith(b"data: [DONE]\n\n")
    assert not _alive(engine)


def test_a_second_hangup_is_no_hurry_and_nohup_is_kept_to(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK, before=("nohup",)) as server:
        (engine,) = server.workers()
        for process in (engine, server.process.pid):
            os.kill(process, signal.SIGHUP)
        assert server.chat()[0] == 200 and server.workers() == [engine]
    with Server(model_path("smollm2"), *QUICK) as server:
        stream = server.stream(chat("Write a story.", max_tokens=300, ignore_eos=True, stream=True))
        next(stream)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            server.process.send_signal(number)
            os.kill(server.workers()[0], signal.SIGHUP)
        assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(LIMIT_S) == 0


@pytest.mark.parametrize(("hard", "served"), [("hard", 300), ("256", 256 - OTHERS)])
def test_a_low_limit_of_open_files_is_raised_or_told(hard: str, served: int, model_path: Callable[[str], Path]) -> None:
    limits = f'ulimit -Sn 256; [ {hard} = hard ] || ulimit -Hn 256; exec "$@"'
    with Server(model_path("smollm2"), *QUICK, before=("bash", "-c", limits, "_")) as server:
        text = Path(f"/proc/{server.process.pid}/limits").read_text()
        assert re.search(rf"Max open files +{4096 + OTHERS if hard == 'hard' else 256} ", text)
        idle = [server.raw() for _ in range(served - 1)]
        assert server.ask("/health")[0] == 200
        if hard != "hard":
            with server.raw() as last, server.raw() as surplus:
                assert last.send(b"GET /health HTTP/1.1\r\n") and b" 503 " in surplus.recv(100)
        for connection in idle:
            connection.close()
    assert ("128 connections at once instead of the 4096 of --max-connections" in server.errors) == (hard != "hard")


@pytest.mark.parametrize("pause_s", [0.0, 0.4])
def test_a_server_that_is_stopped_while_it_loads_just_ends(pause_s: float, model_path: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "millis", "serve", "-m", str(model_path("smollm2")), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        until(lambda: bool(workers(process.pid)))  # the engine is on its way
        time.sleep(pause_s)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0 and "Error" not in text and "Traceback" not in text, text


def test_the_drain_has_an_end(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK, "--drain-s", "0.2") as server:
        stream = server.stream(chat("Write a story.", max_tokens=6000, ignore_eos=True, stream=True))
        next(stream)
        server.process.send_signal(signal.SIGINT)
        assert list(stream)[-1]["error"]["code"] == "server_stopping"
        assert server.process.wait(LIMIT_S) == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_engine_holds_up_neither_deadlines_nor_the_end(
    number: int, code: int, model_path: Callable[[str], Path]
) -> None:
    with Server(model_path("smollm2"), *QUICK, "--drain-s", "0.2") as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        asked: list[tuple[str, dict[str, Any]]] = [
            (CHAT, chat()),
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/classify", {"input": "a", "labels": ["b", "c"]}),
            ("/v1/completions", {"prompt": "a b c", "echo": True, "logprobs": 1, "max_tokens": 1}),
        ]
        for path, body in asked:
            began = time.monotonic()
            status, answer = server.json(path, {"model": "m", **body, "deadline_ms": 300})
            assert (status, answer["error"]["code"]) == (503, "deadline_exceeded"), path
            assert time.monotonic() - began < 2, path
        waiting = threading.Thread(target=server.chat)  # for ever, if nobody ends it
        waiting.start()
        until(lambda: server.metric("num_requests_active") == 1)
        server.process.send_signal(number)
        assert server.process.wait(10) == code
        waiting.join(LIMIT_S)
        assert not _alive(worker)


def test_an_engine_that_owes_a_word_is_ended_though_nobody_waits_long(
    model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "HUNG_S", 0.5)
    monkeypatch.setattr(client, "WATCH_S", 0.1)

    async def run() -> None:
        engine = client.EngineClient(str(model_path("smollm2")), {"threads": 1, "max_batch_tokens": 64})
        await engine.start()
        assert engine.pid is not None

        async def given_up() -> None:
            work = Submit(
                id=engine.number(), prompt=(1,), params=SamplingParams(max_tokens=1), arrival_s=time.monotonic()
            )
            engine.submit(work, client.Mailbox())
            await asyncio.sleep(0.1)
            engine.cancel(work.id)

        await given_up()
        await asyncio.sleep(1.0)
        assert engine.restarts == 0  # it has nothing to say
        os.kill(engine.pid, signal.SIGSTOP)
        end = time.monotonic() + LIMIT_S
        while engine.restarts == 0:
            await given_up()
            assert time.monotonic() < end, "the engine still hangs"
        await engine.close()

    asyncio.run(run())


def test_an_engine_that_cannot_be_started_again_is_tried_until_it_can(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK) as server:
        (worker,) = server.workers()
        pid, limit = server.process.pid, resource.RLIMIT_NOFILE
        soft, hard = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (1, hard))  # what is open stays open
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)  # nobody connects meanwhile: that would take a file, too
        resource.prlimit(pid, limit, (soft, hard))
        until(lambda: server.chat("Still there?")[0] == 200)
    assert server.process.returncode == 0
    assert "the engine process cannot be started (Too many open files); it starts again in 0.1 s" in server.errors


def test_a_first_engine_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    engine = client.EngineClient("model", {})
    with pytest.raises(ModelError, match=r"the engine process cannot be started \(No such file or directory\)"):
        asyncio.run(asyncio.wait_for(engine.start(), LIMIT_S))


# A system that starts no thread, then the life of an engine process on it.
NO_THREADS = """\
import threading

def refused(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = refused

from types import SimpleNamespace
from millis.server.process import main

main(lambda start, line: SimpleNamespace(warm_up=lambda again: None, take=print))
"""


def test_an_engine_process_without_threads_says_so() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        ours.sendall(frame(Start("model", {})))
        command = [sys.executable, "-c", NO_THREADS, str(number)]
        done = subprocess.run(command, pass_fds=[number], capture_output=True, text=True, timeout=LIMIT_S)
        (failed,) = Frames().feed(ours.recv(1 << 16))
    assert (done.returncode, done.stderr, failed.id) == (1, "", 0)
    assert "starts no more threads; raise its limit of processes" in failed.message


def test_the_engine_ends_with_a_server_that_is_killed(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), *QUICK) as server:
        (worker,) = server.workers()
        server.process.kill()
        server.process.wait(LIMIT_S)
        until(lambda: not _alive(worker))


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_what_cannot_start_says_why_in_one_line(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(model_path("smollm2"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    assert "broken.gguf" in error_line(millis("serve", "-m", broken, "--port", "0"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in error_line(millis("serve", "-m", model, "--port", port))
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    line = error_line(millis("serve", "-m", model, "--port", "0", "--api-key-file", keys))
    assert "line 1" in line and "secret" not in line
    assert "drain_s" in error_line(millis("serve", "-m", model, "--drain-s", "-1"), 2)
    assert "MILLIS_SERVE_PROT" in error_line(millis("serve", MILLIS_SERVE_PROT="1"), 2)


def test_the_verb_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "millis", "serve", "--help"], capture_output=True, text=True, check=True
    )
    for flag in ("--port", "--api-key-file", "--drain-s", "--max-sequences", "--config", "Example: millis serve"):
        assert flag in done.stdout


def test_answers_come_over_tls(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with Server(model_path("smollm2"), *QUICK, *files) as server:
        assert server.facts["url"].startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(server.facts["url"] + "/ready", timeout=LIMIT_S, context=trust) as answer:
            assert answer.status == 200
    line = error_line(millis("serve", "-m", model_path("smollm2"), "--tls-cert", key, "--tls-key", certificate))
    assert "PEM" in line
