"""millis bench serve as its users meet it: servers in turns, tables and JSON, checks of answers, Ctrl-C, pictures."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from load_server import Request, answer, delta, good, running, stream, usage, whole
from shell import LIMIT_S, error_line, millis, started

FAST = ("--rate", "2000")  # arrivals a second: the test waits for nothing
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def bench(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    done = millis("bench", "serve", *arguments, "--json")
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_servers_take_turns_and_get_the_same_requests() -> None:
    order: list[str] = []
    lock, under_way, overlaps = threading.Lock(), dict[str, int](), list[str]()

    def named(name: str) -> Any:
        async def script(request: Request, writer: asyncio.StreamWriter) -> None:
            with lock:
                order.append(name)
                under_way[name] = under_way.get(name, 0) + 1
                overlaps.extend(other for other, count in under_way.items() if other != name and count)
            await asyncio.sleep(0)
            with lock:
                under_way[name] -= 1
            writer.write(answer(request))

        return script

    with running(named("a"), named("b")) as (a, b):
        urls = (f"a={a.url}", f"b={b.url}/v1")
        found = bench(*urls, *FAST, "--requests", "9", "--rounds", "3", "--warmup", "1", "--deadline-ms", "300-5000")
        assert "".join(order) == "ab" + "aaabbb" + "bbbaaa" + "aaabbb"  # one each warms up; who is first changes
        assert not overlaps
        bodies = [sorted(json.dumps(request.body) for request in server.requests[1:]) for server in (a, b)]
        assert bodies[0] == bodies[1] and len(set(bodies[0])) == 9
        due = [sorted(float(r.headers["x-deadline-ms"]) for r in server.requests[1:]) for server in (a, b)]
        assert due[0] == due[1] and len(set(due[0])) > 5
        body = a.requests[1].body
        assert body | {"messages": []} == {
            "model": "tiny",
            "messages": [],
            "max_tokens": 32,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert [len(m["content"].split()) for m in body["messages"]] == [60]
    assert [run["server"] for run in found["runs"]] == ["a", "b"]
    for run in found["runs"]:
        assert (run["num_prompts"], run["completed"], run["total_output_tokens"]) == (9, 9, 27)
        assert run["total_input_tokens"] == 9 * run["mean_input_tokens"] and "ttfts" not in run
        assert run["request_rate"] == 2000 and run["client_waited"] == 0 and run["finish_reasons"] == {"stop": 9}


def test_a_table_for_people() -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) % 4:
            writer.write(answer(request))
        else:
            writer.write(whole(b'{"error": {"code": "deadline_unmeetable"}}', "503 Service Unavailable"))

    with running(script) as (server,):
        done = millis("bench", "serve", f"ours={server.url}", *FAST, "--requests", "18", "--deadline-ms", "60000")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("poisson arrivals, 60 words in, 32 tokens out, chat, deadline 60000 ms")
    titles, cells = lines[1].split("  "), lines[2].split()
    assert {"load", "server", "sent", "good/s", "refused", "TTFT", "E2E"} <= {title.strip() for title in titles}
    assert cells[:3] == ["2e+03/s", "ours", "18"] and "100 %" in lines[2] and "errors" not in lines[1]
    assert any("refused deadline_unmeetable 5" in line for line in lines[3:])


def test_every_answer_is_checked_against_the_schema(tmp_path: Path) -> None:
    texts = ['{"n": 1}', '{"n": "1"}', '{"n": 1', '{"n": NaN}', " [1] "]

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        text = texts[(len(server.requests) - 2) % len(texts)]
        writer.write(stream(*map(delta, text), delta("", "stop"), usage(5, len(text))))

    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    with running(script) as (server,):
        found = bench(server.url, *FAST, "--requests", "10", "--warmup", "1", "--schema", path)
        form = server.requests[-1].body["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    run = found["runs"][0]
    assert (run["schema_checked"], run["schema_valid"], run["good"]) == (10, 2, 2)


def test_lengths_in_tokens_are_as_the_server_counts(tmp_path: Path) -> None:
    """The test's server counts two tokens a word, and adds seven, or 31 where it puts in its own system message."""

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        words = sum(len(message["content"].split()) for message in request.body["messages"])
        writer.write(
            stream(delta("One", "length"), usage((7 if len(request.body["messages"]) == 2 else 31) + 2 * words, 1))
        )

    with running(script) as (server,):
        options = ("--detailed", "--shared-prefix-tokens", "80", "--prompt-tokens", "107", "--trace", "closed")
        found = bench(server.url, *options, "--requests", "5", "--concurrency", "2", "--endpoint", "chat")
        assert found["runs"][0]["input_lens"] == [187] * 5 and found["runs"][0]["max_concurrency"] == 2
        assert found["runs"][0]["goodput"] is None
        systems = {request.body["messages"][0]["content"] for request in server.requests[-5:]}
        assert len(systems) == 1 and len(systems.pop().split()) == 40
        path = tmp_path / "trace.csv"
        path.write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:15:46,207,44\n2023-11-16 18:15:47,5000,5\n2023-11-16 18:15:48,9,900\n"
        )
        found = bench(server.url, "--detailed", "--trace", "azure", "--trace-file", path, "--speed", "1000")
        assert sorted(found["runs"][0]["input_lens"]) == [33, 207, 1023]  # words are whole, and one at least
        assert sorted(request.body["max_tokens"] for request in server.requests[-3:]) == [5, 44, 128]


def test_completions_keys_and_models_by_name() -> None:
    with running(good) as (server,):
        options = ("--endpoint", "completions", "--model", "other", "--api-key", "sk-secret", "--language", "zh")
        done = millis("bench", "serve", server.url, *FAST, "--requests", "3", "--json", *options)
        assert done.returncode == 0 and "sk-secret" not in done.stdout
        assert all(request.line == "POST /v1/completions HTTP/1.1" for request in server.requests)
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer sk-secret"}
        assert {request.body["model"] for request in server.requests} == {"other"}
        assert all(request.body["prompt"].startswith("工单") for request in server.requests)


def test_ctrl_c_reports_what_there_is() -> None:
    """After twelve answers the server is silent: only the interrupt can end this load before its timeouts."""
    silent = threading.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) > 12:
            silent.set()
            await asyncio.Event().wait()
        writer.write(answer(request))

    with running(script) as (server,):
        options = ("--trace", "closed", "--concurrency", "1", "--requests", "1000", "--timeout", "3000", "--json")
        process = started("bench", "serve", server.url, *options)
        assert silent.wait(LIMIT_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
    found = json.loads(out)
    assert process.returncode == 130 and err == ""
    assert found["interrupted"] is True
    assert (found["runs"][0]["num_prompts"], found["runs"][0]["completed"]) == (10, 10)  # two warmed up


def test_ctrl_c_before_anything_was_measured() -> None:
    asked = threading.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.Event().wait()

    with running(script) as (server,):
        process = started("bench", "serve", server.url, "--timeout", "3000")
        assert asked.wait(LIMIT_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out, err) == (130, "", "interrupted before anything was measured\n")


def test_errors_of_a_server_that_is_not_there_or_not_ready() -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b'{"error": {"code": "invalid_api_key"}}', "401 Unauthorized"))

    with running(script) as (server,):
        line = error_line(millis("bench", "serve", server.url))
        assert line.startswith(f"{server.url}/v1/chat/completions: the first request failed: http 401: invalid_api_key")
    line = error_line(millis("bench", "serve", server.url))
    assert "connection refused" in line and "is the server ready?" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("http://example.org",), "--yes-remote"),
        (("http://localhost.example.org",), "--yes-remote"),
        (("localhost:8000",), "URL"),
        (("http://localhost:1", "http://localhost:1"), "same name"),
        (("http://localhost:1", "--rate", "1x"), "--capacity"),
        (("http://localhost:1", "--rate", "fast"), "--rate"),
        (("http://localhost:1", "--trace", "closed", "--rate", "1"), "--concurrency"),
        (("http://localhost:1", "--concurrency", "4"), "--trace closed"),
        (("http://localhost:1", "--trace", "azure"), "--trace-file"),
        (("http://localhost:1", "--trace", "sine"), "poisson"),
        (("http://localhost:1", "--endpoint", "responses"), "completions"),
        (("http://localhost:1", "--deadline-ms", "soon"), "deadline"),
        (("http://localhost:1", "--slo", "itl:5"), "--slo"),
        (("http://localhost:1", "--api-key", "a\r\nX: y"), "--api-key"),
        (("http://localhost:1", "--plot", "load.gif"), ".png or .svg"),
        (("http://localhost:1", "--language", "fr"), "zh"),
    ],
)
def test_wrong_use_is_said_before_anything_is_sent(arguments: tuple[str, ...], word: str) -> None:
    assert word in error_line(millis("bench", "serve", *arguments), code=2)


@pytest.mark.parametrize(("content", "word"), [("{", "JSON"), ("[]", "object"), ('{"type": "thing"}', "JSON schema")])
def test_a_schema_that_is_none(content: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content, encoding="utf-8")
    assert word in error_line(millis("bench", "serve", "http://localhost:1", "--schema", path), code=2)


@pytest.mark.parametrize("trace", [("--rate", "500,2000", "--deadline-ms", "60000"), ("--trace", "closed")])
def test_pictures(trace: tuple[str, ...], tmp_path: Path) -> None:
    if not find_spec("matplotlib"):
        assert "millis[bench]" in error_line(
            millis("bench", "serve", "http://localhost:1", "--plot", tmp_path / "a.svg")
        )
        return
    with running(good, good) as (a, b):
        paths = [tmp_path / "load.svg", tmp_path / "load.png"]
        plots = [part for path in paths for part in ("--plot", str(path))]
        done = millis("bench", "serve", f"first={a.url}", f"second={b.url}", *trace, "--requests", "6", *plots)
        assert done.returncode == 0, done.stderr
    assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from millis import cli

    for name in [name for name in sys.modules if name.startswith("millis.bench.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httptools", None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "serve", "http://localhost:1"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "millis: a load needs httptools; install it with: pip install 'millis[bench]'\n"
