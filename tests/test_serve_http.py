"""millis serve as its clients meet it: answers, streams, errors, cut connections, hostile bodies. One server."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millis
from serving import CHAT, Server, chat, random_bodies, until


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2"), "--write-buffer-bytes", "4096", "--drain-timeout-s", "0.5") as running:
        yield running


def test_labels_have_the_scores_that_the_library_gives_them(server: Server, model_path: Callable[[str], Path]) -> None:
    lm = millis.LanguageModel(model_path("smollm2"))
    texts = ["I want my money back", "钱还没有退给我"]
    for labels, multi in ((["refund", "card_arrival"], False), (["退款", "表扬"], False), (["退款", "表扬"], True)):
        asked = {"model": "m", "input": texts, "labels": labels, "multi_label": multi}
        status, body = server.json("/v1/classify", asked | {"examples": [{"text": "很好", "label": labels[1]}]})
        assert status == 200, body
        found = lm.classify(texts, labels, examples=[("很好", labels[1])], multi=multi)
        for one, want in zip(body["data"], found, strict=True):
            assert one["scores"] == pytest.approx(want.scores, abs=0.05)  # the server computes prompts in other chunks


def idle(server: Server) -> bool:
    names = ("num_requests_active", "num_requests_in_flight", "num_requests_running", "num_requests_waiting")
    return sum(server.metric(name) for name in (*names, "kv_cache_usage_perc")) == 0


def test_a_chat_is_answered_as_the_library_answers_it(server: Server, model_path: Callable[[str], Path]) -> None:
    status, headers, data = server.ask(CHAT, chat("What is the capital of France?"))
    answer = json.loads(data)
    assert status == 200
    lm = millis.load(model_path("smollm2"))
    expected = lm.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=8)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)
    assert answer["usage"]["prompt_tokens"] == expected.timings.prompt_tokens
    assert 0 < answer["timings"]["first_token_ms"] <= answer["timings"]["total_ms"]
    assert "total;dur=" in headers["server-timing"] and headers["x-content-type-options"] == "nosniff"
    assert headers["x-request-id"] in answer["id"]


def test_a_stream_says_the_same_and_ends_with_timings_and_usage(server: Server) -> None:
    body = chat("Count to five.", max_tokens=24)
    whole = server.json(CHAT, body)[1]["choices"][0]
    events = list(server.stream({**body, "stream": True, "stream_options": {"include_usage": True}}))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert text == whole["message"]["content"]
    assert len(events) > 3
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0
    assert events[-1]["timings"]["total_ms"] > 0
    assert events[-2]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_a_stop_text_ends_the_answer_before_it(server: Server) -> None:
    whole = server.chat("Count to five.", max_tokens=24)[1]["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:4]
    status, answer = server.chat("Count to five.", max_tokens=24, stop=[stop])
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    until(lambda: idle(server))


def test_several_choices_and_prompts_keep_their_places(server: Server) -> None:
    body = {"model": "m", "prompt": ["One two three", "A B C"], "n": 2, "max_tokens": 5, "temperature": 0}
    status, answer = server.json("/v1/completions", body)
    assert status == 200
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
    assert answer["usage"]["completion_tokens"] == 20


def test_seeds_repeat_and_logprobs_come_with_every_token(server: Server) -> None:
    body = chat("Tell me a story.", temperature=1, seed=7, logprobs=True, top_logprobs=2)
    first, second = server.json(CHAT, body)[1], server.json(CHAT, body)[1]
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    content = first["choices"][0]["logprobs"]["content"]
    assert len(content) == first["usage"]["completion_tokens"]
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in content)


def test_tokens_looked_up_in_the_prefix_cache_are_counted_and_no_others(server: Server) -> None:
    def counted() -> tuple[float, float]:
        return server.metric("prefix_cache_queries_total"), server.metric("prefix_cache_hits_total")

    until(lambda: idle(server))
    queries, hits = counted()
    scored = {"model": "m", "prompt": "A river of words. " * 8, "max_tokens": 0, "echo": True, "logprobs": 1}
    assert server.json("/v1/completions", scored)[0] == 200  # all of its tokens are computed
    said = [server.chat("Which rivers flow east?", max_tokens=2)[1]["usage"] for _ in range(2)]
    cached = [one["prompt_tokens_details"]["cached_tokens"] for one in said]
    assert 0 < cached[1] < said[1]["prompt_tokens"]
    until(lambda: counted() == (queries + sum(one["prompt_tokens"] for one in said), hits + sum(cached)))


def test_labels_are_scored_and_texts_tokenized(server: Server) -> None:
    body = {"model": "m", "input": ["I love it", "I hate it"], "labels": ["positive", "negative"]}
    status, answer = server.json("/v1/classify", body)
    assert status == 200
    assert [sum(row["probs"]) for row in answer["data"]] == pytest.approx([1, 1])
    assert answer["timings"]["prompt_tokens"] > 0
    status, ids = server.json("/tokenize", {"prompt": "Hello wörld 你好"})
    assert server.json("/detokenize", {"tokens": ids["tokens"]})[1] == {"prompt": "Hello wörld 你好"}


def test_what_a_client_may_get_wrong_is_named(server: Server) -> None:
    cases: list[tuple[str, Any, int, str]] = [
        (CHAT, b"{", 400, "invalid_json"),
        (CHAT, {"model": "m"}, 400, "messages"),
        (CHAT, chat(model="gpt-9"), 404, "gpt-9"),
        (CHAT, chat(temperature=9), 400, "temperature"),
        (CHAT, chat(n=99), 400, "n is 99"),
        (CHAT, chat(colour=1), 400, "colour"),
        (CHAT, chat(max_tokens=10**6), 400, "context"),
        (CHAT, chat(logit_bias={"999999": 1}), 400, "999999"),
        ("/v1/completions", {"model": "m", "prompt": [999999]}, 400, "999999"),
        ("/v1/embeddings", {"model": "m", "input": "x", "dimensions": 64}, 400, "dimensions"),
        ("/v1/nothing", {}, 404, "/docs"),
    ]
    for path, body, expected, part in cases:
        status, answer = server.json(path, body)
        assert status == expected, (path, body, answer)
        assert part in json.dumps(answer["error"]), answer
    assert server.ask(CHAT, None)[0] == 405
    assert server.ask(CHAT, chat(), {"x-deadline-ms": "soon"})[0] == 400
    assert server.ask(CHAT, chat(), {"sec-fetch-site": "cross-site"})[0] == 403


def test_the_field_at_fault_is_told(server: Server) -> None:
    long = "word " * 9000
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (CHAT, chat(logit_bias={"999999": 1}), "logit_bias", "invalid_value"),
        ("/v1/completions", {"prompt": [[1], [999999]]}, "prompt[1]", "invalid_value"),
        ("/v1/completions", {"prompt": ["a", ""]}, "prompt[1]", "invalid_value"),
        ("/v1/embeddings", {"input": [[1], [999999]]}, "input[1]", "invalid_value"),
        ("/v1/embeddings", {"input": ["a", long]}, "input", "context_length_exceeded"),
        ("/v1/classify", {"input": ["a", long], "labels": ["b", "c"]}, "input", "context_length_exceeded"),
        ("/v1/rerank", {"query": "a", "documents": ["b", "", "c"]}, "documents[1]", "invalid_value"),
    ]
    for path, body, param, code in cases:
        status, answer = server.json(path, {"model": "m", **body})
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code), answer


def test_a_name_or_a_page_that_is_not_this_servers_is_refused(server: Server) -> None:
    rebound = {"host": "evil.example", "origin": "http://evil.example"}
    foreign = {"origin": "http://evil.example"}
    own = {"host": f"localhost:{server.port}", "origin": f"http://localhost:{server.port}"}
    cases = ((rebound, "host_not_allowed"), (foreign, "cross_site_request"), ({"origin": "null"}, "cross_site_request"))
    for sent, code in cases:
        status, headers, data = server.ask(CHAT, chat(), sent)
        assert (status, json.loads(data)["error"]["code"]) == (403, code)
        assert "vary" not in headers and "access-control-allow-origin" not in headers
    assert server.ask(CHAT, chat(), own)[0] == 200
    assert server.ask(CHAT, None, {**own, "access-control-request-method": "POST"}, "OPTIONS")[0] == 405


def test_probes_may_ask_for_the_head_alone(server: Server) -> None:
    for path in ("/health", "/ready"):
        status, headers, data = server.ask(path, method="HEAD")
        assert (status, data) == (200, b"")
        assert headers["content-length"] == server.ask(path)[1]["content-length"]


def test_a_path_asked_another_way_says_which_ways_there_are(server: Server) -> None:
    cases = ((CHAT, "GET", "POST"), ("/health", "DELETE", "GET, HEAD"), ("/v1/models", "POST", "GET"))
    for path, method, allowed in cases:
        status, headers, data = server.ask(path, method=method)
        assert (status, headers["allow"]) == (405, allowed)
        error = json.loads(data)["error"]
        assert error["code"] == "method_not_allowed" and f"takes {headers['allow']}, not" in error["message"]
    error = json.loads(server.ask("/v1/nothing")[2])["error"]
    assert error["code"] == "not_found" and "'/v1/nothing'" in error["message"]
    assert json.loads(server.ask("/v1/messages")[2])["type"] == "error"


@pytest.mark.parametrize(
    "data",
    [
        b"BREW /\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nno size\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_what_is_no_http_is_an_error_as_any_other(server: Server, data: bytes) -> None:
    with server.raw() as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_client_that_would_rather_speak_another_protocol_is_answered(server: Server) -> None:
    """As Java's HttpClient asks by default, the body in a write of its own; and again on the same connection."""
    body = json.dumps({"prompt": "Hi"}).encode()
    asks = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{asks}\r\n".encode()
    chunked = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    answers = []
    with server.raw() as connection:
        for parts in ([head, body], [head + body], [chunked + b"%x\r\n" % len(body), body + b"\r\n0\r\n\r\n"]):
            for part in parts:
                connection.sendall(part)
            answer = connection.recv(65536)
            while b"}" not in answer:
                answer += connection.recv(65536)
            answers.append(answer)
    assert all(answer.startswith(b"HTTP/1.1 200") and b'"tokens":[' in answer for answer in answers)


def test_a_compressed_body_is_refused_by_name(server: Server) -> None:
    status, _, data = server.ask(CHAT, gzip.compress(json.dumps(chat()).encode()), {"content-encoding": "gzip"})
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (415, "content-encoding") and "'gzip'" in error["message"]
    assert server.ask(CHAT, chat(), {"content-encoding": "identity"})[0] == 200


def test_noise_behind_a_request_does_not_stand_in_its_stream(server: Server) -> None:
    body = json.dumps(chat("Count.", max_tokens=2000, ignore_eos=True, stream=True)).encode()
    with server.raw() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n".encode())
        connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        answer = connection.recv(65536)
        connection.sendall(b"\x00 no HTTP\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1 and b"[DONE]" not in answer
    until(lambda: idle(server))


def test_a_large_body_is_refused_before_it_is_read_whole(server: Server) -> None:
    status, _, data = server.ask(CHAT, b'{"model": "' + b"a" * (5 << 20) + b'"}')
    assert status == 413 and b"body_too_large" in data
    assert server.chat()[0] == 200


def test_headers_without_end_are_cut_off(server: Server) -> None:
    with server.raw() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"a: " + b"b" * 1000 + b"\r\n")
                if b" 431 " in peek(connection):
                    raise ConnectionResetError
    assert server.chat()[0] == 200


def peek(connection: socket.socket) -> bytes:
    connection.setblocking(False)
    try:
        return connection.recv(65536)
    except BlockingIOError:
        return b""
    finally:
        connection.settimeout(30)


def test_life_is_told(server: Server) -> None:
    assert server.json("/health") == (200, {"status": "ok"})
    assert server.json("/ready") == (200, {"status": "ready"})
    status, models = server.json("/v1/models")
    assert status == 200 and [one["id"] for one in models["data"]] == ["m"]
    assert server.json("/v1/models/m")[1]["id"] == "m"
    assert server.ask("/v1/models/other")[0] == 404
    schema = server.json("/openapi.json")[1]
    assert {CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"} <= set(schema["paths"])
    status, headers, page = server.ask("/docs")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert all(path in page.decode() for path in schema["paths"]) and b"deadline_ms" in page
    assert not re.search(rb"(src|href)=.?(https?:|//)", page)


def test_figures_count_what_was_answered(server: Server) -> None:
    before = {name: server.metric(name) for name in ("generation_tokens_total", "deadlines_met_total")}
    finished = server.metric("request_success_total", finished_reason="length")
    status, answer = server.chat("Write a long story.", max_tokens=6, deadline_ms=60_000)
    assert status == 200 and answer["timings"]["slack_ms"] > 0
    assert server.metric("generation_tokens_total") == before["generation_tokens_total"] + 6
    assert server.metric("deadlines_met_total") == before["deadlines_met_total"] + 1
    assert server.metric("request_success_total", finished_reason="length") == finished + 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert server.metric(f"{name}_count") > 0


def test_a_deadline_that_cannot_be_met_is_refused_without_a_retry(server: Server) -> None:
    status, headers, data = server.ask(CHAT, chat(), {"x-deadline-ms": "0.01"})
    error = json.loads(data)["error"]
    assert (status, error["code"]) in ((503, "deadline_unmeetable"), (503, "deadline_exceeded"))
    assert headers["x-should-retry"] == "false"
    until(lambda: idle(server))


def test_a_fallback_is_the_answer_when_time_runs_out(server: Server) -> None:
    body = chat("Write a long story.", max_tokens=4000, ignore_eos=True, deadline_ms=900, on_deadline="fallback")
    status, answer = server.json(CHAT, {**body, "fallback": "Sorry, no time."})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "Sorry, no time."
    assert answer["choices"][0]["finish_reason"] == "deadline"
    status, answer = server.json(CHAT, {**body, "on_deadline": "error"})
    assert status == 503 and answer["error"]["code"] == "deadline_exceeded"
    until(lambda: idle(server))


def test_clients_that_leave_free_their_slots(server: Server) -> None:
    streams = [server.stream(chat("Write a story.", max_tokens=4000, ignore_eos=True, stream=True)) for _ in range(6)]
    for stream in streams:
        next(stream)
    assert not idle(server)
    for stream in streams:
        stream.close()
    until(lambda: idle(server))
    assert server.chat()[0] == 200


def test_a_client_that_leaves_requests_in_the_pipe_frees_its_slot(server: Server) -> None:
    gone = server.metric("requests_failed_total", reason="client_gone")
    body = json.dumps(chat("Write a story.", max_tokens=4000, ignore_eos=True, stream=True)).encode()
    with server.raw() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n".encode())
        connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    until(lambda: idle(server))
    assert server.metric("requests_failed_total", reason="client_gone") == gone + 1


def test_a_reader_that_reads_nothing_is_cut_off_and_holds_no_slot(server: Server) -> None:
    body = json.dumps(chat("Write a story.", max_tokens=6000, ignore_eos=True, stream=True, n=8)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        connection.sendall(b"content-type: application/json\r\n")
        connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: server.metric("num_requests_running") > 0)
        until(lambda: idle(server))  # 48,000 tokens would have taken minutes


def test_random_bodies_fail_nothing(server: Server) -> None:
    """2,000 bodies: noise, and valid ones with a value or a key replaced. No answer is a 5xx, none hangs."""
    connection = server.connect()
    for path, data in random_bodies(2000):
        connection.request("POST", path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status < 500, (path, data, answer.status)
    connection.close()
    until(lambda: idle(server))
