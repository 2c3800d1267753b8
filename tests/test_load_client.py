"""The load tool's client against a real server: when bytes arrived, by a clock of the test; connections; what fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_server import HEAD, LAST, LoadServer, Request, answer, chunk, delta, event, good, stream, usage, whole
from millis.bench.serve_answer import Answer, read
from millis.bench.serve_client import BODY_LIMIT, HEAD_LIMIT, Client, Connection
from millis.bench.serve_run import Level, Run
from millis.bench.serve_trace import Planned
from millis.bench.serve_wire import Exchange, Server
from millis.types import RequestError

BODY = b'{"messages": []}'


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def with_server(script: Any, use: Callable[[LoadServer, Server], Awaitable[None]]) -> None:
    async def run() -> None:
        server = LoadServer(script)
        await server.start()
        try:
            await use(server, Server.parse(server.url))
        finally:
            await server.stop()

    asyncio.run(run())


def asked(script: Any, *, timeout_s: float = 30.0) -> Answer:
    """One request, and what the client makes of the answer."""
    found: list[Answer] = []

    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target, timeout_s=timeout_s)
        exchange = Exchange(target.request("/v1/chat/completions", BODY), client.clock())
        found.append(read(await client.ask(exchange), Answer()))
        await client.close()

    with_server(script, use)
    return found[0]


def test_times_are_those_of_the_bytes() -> None:
    """The clock moves only between what the server writes, and only when the client has read what came before."""
    clock, exchanges = Clock(), list[Exchange]()
    steps = [
        (0.010, HEAD + chunk(event(delta("", role="assistant")))),  # no token
        (0.030, chunk(event(delta("One")))),
        (0.005, chunk(event(delta(" two")))),
        (0.007, chunk(event(delta(" three")) + event(delta("", "length")))),
        (0.001, chunk(event(usage(7, 3)) + event(b"[DONE]"))),
        (0.002, LAST),
    ]

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        exchange, size = exchanges[0], 0
        for seconds, data in steps:
            clock.now += seconds
            writer.write(data)
            size += len(data.removeprefix(HEAD))
            while exchange.end_s is None and (data == LAST or len(exchange.pieces) < steps.index((seconds, data)) + 1):
                await asyncio.sleep(0)

    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target, clock=clock)
        exchange = Exchange(target.request("/v1/chat/completions", BODY), clock.now - 0.004)  # it was due 4 ms ago
        exchanges.append(exchange)
        await client.ask(exchange)
        await client.close()

    with_server(script, use)
    found = read(exchanges[0], Answer())
    assert found.completed and found.text == "One two three" and found.finish_reason == "length"
    assert found.lateness_s == pytest.approx(0.004)
    assert found.ttft_s == pytest.approx(0.004 + 0.010 + 0.030)
    assert found.itl_s == pytest.approx([0.005, 0.007])
    assert found.e2e_s == pytest.approx(0.004 + 0.010 + 0.030 + 0.005 + 0.007 + 0.001 + 0.002)
    assert found.tpot_s == pytest.approx((0.005 + 0.007 + 0.001 + 0.002) / 2)
    assert (found.prompt_tokens, found.output_tokens, found.counted) == (7, 3, True)


def test_connections_are_kept_and_the_body_arrives_whole() -> None:
    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target)
        for i in range(3):
            data = target.request("/v1/chat/completions", b'{"prompt": "%d"}' % i, {"X-Deadline-Ms": "500"})
            assert read(await client.ask(Exchange(data, client.clock())), Answer()).completed
        await client.close()
        assert [request.body["prompt"] for request in server.requests] == ["0", "1", "2"]
        assert {request.connection for request in server.requests} == {0}
        assert server.requests[0].headers["x-deadline-ms"] == "500"
        assert server.requests[0].headers["host"] == f"127.0.0.1:{server.port}"

    with_server(good, use)


def test_requests_beyond_the_limit_wait_for_a_connection() -> None:
    free = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        await free.wait()
        writer.write(answer(request))

    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target, limit=2)
        exchanges = [Exchange(target.request("/v1/completions", BODY), client.clock()) for _ in range(5)]
        for exchange in exchanges:
            client.send(exchange)
        while len(server.requests) < 2:
            await asyncio.sleep(0)
        free.set()
        await client.drained()
        await client.close()
        assert all(read(exchange, Answer()).completed for exchange in exchanges)
        assert (server.connections, client.waited) == (2, 3)

    with_server(script, use)


def test_a_kept_connection_that_was_closed_meanwhile_is_no_error() -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.connection == 0 and len(served) == 1:
            writer.transport.abort()  # as a server does whose patience with an idle connection ends just now
        else:
            served.append(request)
            writer.write(answer(request))

    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target)
        for _ in range(2):
            exchange = Exchange(target.request("/v1/completions", BODY), client.clock())
            assert read(await client.ask(exchange), Answer()).completed
        await client.close()
        assert server.connections == 2

    served: list[Request] = []
    with_server(script, use)


@pytest.mark.parametrize(
    ("bytes_back", "error"),
    [
        (b"", "disconnected"),
        (HEAD + chunk(event(delta("One"))), "disconnected"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "answer is not HTTP"),
        (HEAD + b"zz\r\n", "answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (HEAD_LIMIT // 5), "answer too long"),
        (HEAD + chunk(b":" * (BODY_LIMIT + 1)), "answer too long"),
        (HEAD + LAST, "answer without an end"),
        (stream(delta("", role="assistant"), delta("", "stop")), "answer without a token"),
        (stream(delta("One"), {"error": {"code": "engine_restarted"}}), "error in the stream: engine_restarted"),
        (HEAD + chunk(b"data: {\n\n") + LAST, "malformed answer"),
        (HEAD + chunk(b"data: [1]\n\n") + LAST, "malformed answer"),
        (stream({"choices": [{"delta": {"content": 5}}]}), "malformed answer"),
        (stream({"choices": {"a": 1}}), "malformed answer"),
        (whole(b'{"error": {"code": "model_not_found"}}', "404 Not Found"), "http 404: model_not_found"),
        (whole(b"<html>", "500 Oops"), "http 500"),
        (whole(b"", "302 Found"), "http 302"),
    ],
)
def test_what_is_no_answer_is_an_error_that_says_why(bytes_back: bytes, error: str) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes_back)
        await writer.drain()
        writer.close()

    found = asked(script)
    assert found.error == error and not found.completed and found.refused is None


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests"])
def test_a_refusal_is_no_error(status: str) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b'{"error": {"code": "deadline_unmeetable", "message": "no"}}', status))

    found = asked(script)
    assert (found.refused, found.error, found.completed, found.admitted) == ("deadline_unmeetable", None, False, False)


def test_a_server_that_says_nothing_is_a_timeout() -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    assert asked(script, timeout_s=0.05).error == "timeout"


def test_a_port_that_nobody_listens_at() -> None:
    async def run() -> None:
        server = LoadServer()
        await server.start()
        target = Server.parse(server.url)
        await server.stop()
        client = Client(target)
        assert (await client.ask(Exchange(target.request("/v1/models"), client.clock()))).error == "connection refused"
        await client.close()

    asyncio.run(run())


def test_answers_that_end_with_the_connection_or_come_after_a_continue() -> None:
    body = event(delta("One", "stop")) + event(b"[DONE]")

    async def until_closed(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async def after_continue(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + stream(delta("One", "stop")))

    async def not_streamed(request: Request, writer: asyncio.StreamWriter) -> None:
        choice = {"message": {"content": "One"}, "finish_reason": "stop"}
        writer.write(whole(event({"choices": [choice], "usage": {"completion_tokens": 1}})[6:]))

    for script in (until_closed, after_continue, not_streamed):
        found = asked(script)
        assert found.completed and found.text == "One" and found.output_tokens == 1


class Silent:
    """A client as a connection sees it."""

    def __init__(self) -> None:
        self.now, self.ended = 0.0, list[str | None]()

    def clock(self) -> float:
        return self.now

    def end(self, exchange: Exchange, error: str | None) -> None:
        self.ended.append(error)

    def lost(self, connection: Connection) -> None:
        pass


class Nowhere(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        pass


TEXTS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6)


@given(texts=TEXTS, data=st.data())
def test_any_split_of_the_bytes_gives_the_same_answer(texts: list[str], data: st.DataObject) -> None:
    """Chunks of HTTP end inside events, and reads inside chunks; a token came with the last byte of its event."""
    body = b"".join(event(delta(text)) for text in texts) + event(delta("", "stop")) + event(b"[DONE]")
    sent = HEAD + b"".join(map(chunk, cut(body, data))) + LAST
    client = Silent()
    connection = Connection(cast(Client, client))
    connection.connection_made(Nowhere())
    exchange = Exchange(b"", 0.0)
    connection.start(exchange)
    for piece in cut(sent, data):
        client.now += 1.0
        connection.data_received(piece)
    found = read(exchange, Answer())
    assert client.ended == [None] and exchange.end_s == client.now
    assert found.completed and found.text == "".join(texts) and found.output_tokens == len(texts)
    assert b"".join(piece for _, piece in exchange.pieces) == body
    times, come, due = [], 0, 0
    for text in texts:
        due += len(event(delta(text)))
        come = next(when for when, size in arrived(exchange) if size >= due)
        times.append(come)
    assert found.ttft_s == times[0]
    assert found.itl_s == [after - before for before, after in zip(times, times[1:], strict=False)]


def cut(data: bytes, choice: st.DataObject) -> list[bytes]:
    marks = sorted(choice.draw(st.sets(st.integers(1, len(data) - 1), max_size=12)))
    return [data[a:b] for a, b in zip([0, *marks], [*marks, len(data)], strict=True)]


def arrived(exchange: Exchange) -> list[tuple[float, int]]:
    """How much of the body was there when."""
    total, found = 0, []
    for when, piece in exchange.pieces:
        total += len(piece)
        found.append((when, total))
    return found


def test_the_open_loop_sends_on_time_whatever_the_server_does() -> None:
    """Nothing is answered before the last request is out; latencies count from when each was due."""
    clock, slept = Clock(), list[float]()
    everything = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        await everything.wait()
        writer.write(answer(request))

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += 1.25 * seconds  # the machine wakes us late
        await asyncio.sleep(0)

    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target, clock=clock)
        planned = [Planned(arrival, 32, None, 500.0) for arrival in (10.0, 10.8, 10.8, 14.0)]
        run = Run(client, Level(rate=1.0), planned, 9.0, 300.0, lambda answer: None, sleep)
        run.requests = [target.request("/v1/completions", BODY)] * 4

        async def watch() -> None:
            while len(server.requests) < 4:
                await asyncio.sleep(0)
            clock.now = 200.0
            everything.set()

        await asyncio.gather(run.to_the_end(), watch())
        await client.close()
        found = run.read()
        assert [a.start_s - 100.0 for a in found] == pytest.approx([1.0, 1.8, 1.8, 5.0])
        assert [a.e2e_s for a in found] == pytest.approx([99.0, 98.2, 98.2, 95.0])
        assert not any(a.in_time for a in found) and all(a.completed for a in found)
        assert slept == pytest.approx([1.0, 0.55, 0.0, 3.0625])

    with_server(script, use)


def test_the_closed_loop_keeps_so_many_under_way_and_stops_in_time() -> None:
    clock, under_way, most = Clock(), list[Request](), list[int]()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        under_way.append(request)
        for _ in range(20):
            await asyncio.sleep(0)
        most.append(len(under_way))
        under_way.remove(request)
        clock.now += 1.0
        writer.write(answer(request))

    async def use(server: LoadServer, target: Server) -> None:
        client = Client(target, clock=clock)
        run = Run(client, Level(concurrency=3), [Planned(0.0, 32)] * 50, 0.0, 10.0, lambda answer: None)
        run.requests = [target.request("/v1/completions", BODY)] * 50
        await run.to_the_end()
        await client.close()
        assert max(most) <= 3 and 10 <= len(run.read()) <= 13  # one a second; those under way at the end go on
        assert run.ended == len(run.read()) == len(server.requests)

    with_server(script, use)


@pytest.mark.parametrize(
    ("text", "url", "name", "loopback"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("a=http://localhost/v1/", "http://localhost", "a", True),
        ("https://[::1]:9/x/v1", "https://[::1]:9/x", "[::1]:9", True),
        ("far=https://example.org/llm", "https://example.org/llm", "far", False),
        ("http://127.0.0.1.example.org", "http://127.0.0.1.example.org", "127.0.0.1.example.org", False),
        ("http://10.0.0.1/?", "http://10.0.0.1", "10.0.0.1", False),
    ],
)
def test_urls(text: str, url: str, name: str, loopback: bool) -> None:
    server = Server.parse(text)
    assert (server.url, server.name, server.loopback) == (url, name, loopback)


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://a/ x", "http://a\r\nX: y", "http://u@a"]
)
def test_what_is_no_url_is_said(text: str) -> None:
    with pytest.raises(RequestError, match="URL"):
        Server.parse(text)
