"""Spans and metrics for OpenTelemetry: a real server, and a collector that reads OTLP as its own messages say"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from millis.config import ServerConfig
from millis.types import RequestError
from serving import QUICK, Server, until

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


class Collector:
    """Takes in what is exported, as OpenTelemetry's protocol buffers say it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.raw = b""
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        self.raw += body
        if path == "/v1/traces":
            request = ExportTraceServiceRequest.FromString(body)
            self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        else:
            assert path == "/v1/metrics"
            figures = ExportMetricsServiceRequest.FromString(body)
            self.metrics |= {
                m.name: m for r in figures.resource_metrics for scope in r.scope_metrics for m in scope.metrics
            }

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    it = Collector()
    yield it
    it.close()


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in span.attributes}


def test_a_request_becomes_a_span_of_its_callers_trace(model_path: Callable[[str], Path], collector: Collector) -> None:
    with Server(model_path("smollm2"), *QUICK, "--otlp-endpoint", collector.url) as server:
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
        body = {"model": "m", "messages": [{"role": "user", "content": "zebra"}], "max_tokens": 5, "temperature": 0}
        status, _, data = server.ask("/v1/chat/completions", {**body, "deadline_ms": 20000}, headers)
        answer = json.loads(data)
        assert status == 200
        assert server.ask("/v1/chat/completions", {**body, "model": "no-such"})[0] == 404
        assert server.ask("/v1/embeddings", {"model": "m", "input": "a horse"})[0] == 200
    until(lambda: len(collector.spans) == 3 and len(collector.metrics) == 3)
    chat, wrong, vectors = collector.spans
    told = attributes(chat)
    assert chat.name == "chat m" and chat.trace_id.hex() == TRACE and chat.parent_span_id.hex() == CALLER
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.request.model"] == "m"
    assert told["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 5
    assert told["gen_ai.response.finish_reasons"] == ["length"] and told["millis.deadline_ms"] == 20000
    assert told["gen_ai.request.max_tokens"] == 5
    took_ms = (chat.end_time_unix_nano - chat.start_time_unix_nano) / 1e6
    assert took_ms >= told["millis.prefill_ms"] + told["millis.decode_ms"]
    (first,) = chat.events
    assert chat.start_time_unix_nano < first.time_unix_nano <= chat.end_time_unix_nano
    assert wrong.status.code == 2 and attributes(wrong)["error.type"] == "model_not_found"
    assert attributes(vectors)["gen_ai.operation.name"] == "embeddings"
    assert b"zebra" not in collector.raw and answer["choices"][0]["message"]["content"].encode() not in collector.raw

    def counts(name: str) -> int:
        return sum(point.count for point in collector.metrics[f"gen_ai.server.{name}"].histogram.data_points)

    assert counts("request.duration") == 3
    assert counts("time_to_first_token") == counts("time_per_output_token") == 1


def test_content_is_told_where_that_was_asked_for(model_path: Callable[[str], Path], collector: Collector) -> None:
    with Server(model_path("smollm2"), *QUICK, "--otlp-endpoint", collector.url, "--otlp-content") as server:
        _, answer = server.chat("zebra")
    until(lambda: len(collector.spans) == 1)
    told = attributes(collector.spans[0])
    asked = json.loads(told["gen_ai.input.messages"])
    assert asked == [{"role": "user", "parts": [{"type": "text", "content": "zebra"}]}]
    (said,) = json.loads(told["gen_ai.output.messages"])
    assert said["parts"][0]["content"] == answer["choices"][0]["message"]["content"]


def test_a_collector_that_is_not_there_holds_up_nothing(model_path: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with Server(model_path("smollm2"), *QUICK, "--otlp-endpoint", url) as server:
        assert server.chat()[0] == 200
    assert "zebra" not in server.errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"otlp_endpoint": "collector:4318"}, "must be an http:// or https:// URL"),
        ({"otlp_content": True}, "otlp_content needs otlp_endpoint"),
        ({"otlp_content": "yes", "otlp_endpoint": "http://a"}, "otlp_content must be true or false"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ServerConfig(**fields)
