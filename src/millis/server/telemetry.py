"""Spans and metrics of requests for an OpenTelemetry collector, by the GenAI conventions. Needs the extra `otel`.

A request is told when it has ended, with the times it had: while it runs, nothing is done for it. Prompts and
answers are in its span only where that was asked for. Names: OpenTelemetry's semantic conventions for generative AI.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from millis import __version__
from millis.server.api.job import Conversation, Endpoint, Instruction, Job
from millis.types import RequestError, Timings

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram

EXPORT_S = 2.0  # a collector that does not answer is given up after so long
LAST_EXPORT_MS = 2000  # at the end, all of it together
DURATION_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
)
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
OPERATIONS: Mapping[Endpoint, str] = {
    "chat": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
}  # elsewhere the endpoint's own name, which for embeddings is the conventions' too


@dataclass(slots=True, kw_only=True)
class Told:
    """What is known of a request once it has ended. Times: time.monotonic() seconds."""

    endpoint: Endpoint
    model: str
    request_id: str
    headers: Iterable[tuple[bytes, bytes]]  # of the request: a caller's trace goes on in our span
    arrival_s: float
    first_s: float | None  # when the first token was sent
    job: Job | None  # None: its body was refused
    ended: Sequence[tuple[Timings, str]]  # of each choice: how it ended, too
    texts: Sequence[str]
    error: str | None


class Telemetry:
    """Where requests are told. RequestError: the extra is not installed."""

    def __init__(self, endpoint: str, *, content: bool = False) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise RequestError(
                f"otlp_endpoint needs {error.name}; install it with: pip install 'millis[serve,otel]'"
            ) from None
        base = endpoint.rstrip("/")
        resource = Resource.create({"service.name": "millis", "service.version": __version__})
        spans = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=EXPORT_S)
        figures = OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=EXPORT_S)
        self._content = content
        self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._spans.add_span_processor(BatchSpanProcessor(spans))
        reader = PeriodicExportingMetricReader(figures)
        self._meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._tracer = self._spans.get_tracer("millis.server", __version__)
        self._duration = self._histogram("request.duration", "Arrival to last byte", DURATION_S)
        self._first = self._histogram("time_to_first_token", "Arrival to first token", FIRST_TOKEN_S)
        self._token = self._histogram("time_per_output_token", "Between tokens of an answer", TOKEN_S)

    def tell(self, told: Told) -> None:
        """Takes in a request that has ended; it is sent from a thread, with others."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end_s, end_ns = time.monotonic(), time.time_ns()
        operation = OPERATIONS.get(told.endpoint, told.endpoint)
        common = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "millis",
            "gen_ai.request.model": told.model,
            "gen_ai.response.model": told.model,
        }
        if told.error is not None:
            common["error.type"] = told.error
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in told.headers}
        span = self._tracer.start_span(
            f"{operation} {told.model}",
            context=extract(carrier),
            kind=SpanKind.SERVER,
            start_time=_earlier(end_ns, end_s - told.arrival_s),
            attributes={**common, **self._details(told)},
        )
        if told.first_s is not None:
            span.add_event("millis.first_token", timestamp=_earlier(end_ns, end_s - told.first_s))
        if told.error is not None:
            span.set_status(Status(StatusCode.ERROR, told.error))
        span.end(end_ns)
        self._duration.record(end_s - told.arrival_s, common)
        if told.first_s is not None:
            self._first.record(told.first_s - told.arrival_s, common)
            for timings, _ in told.ended:
                if timings.completion_tokens > 1:
                    self._token.record(timings.decode_ms / 1000 / (timings.completion_tokens - 1), common)

    def close(self) -> None:
        """Sends what is left, as far as the collector takes it soon."""
        self._spans.force_flush(LAST_EXPORT_MS)
        self._meters.shutdown(LAST_EXPORT_MS)
        self._spans.shutdown()

    def _details(self, told: Told) -> dict[str, Any]:
        found: dict[str, Any] = {"gen_ai.response.id": told.request_id}
        if told.ended:
            timings = [each for each, _ in told.ended]
            found["gen_ai.response.finish_reasons"] = [reason for _, reason in told.ended]
            found["gen_ai.usage.input_tokens"] = max(each.prompt_tokens for each in timings)
            found["gen_ai.usage.output_tokens"] = sum(each.completion_tokens for each in timings)
            for name in ("queue", "tokenize", "prefill", "decode"):
                found[f"millis.{name}_ms"] = max(getattr(each, f"{name}_ms") for each in timings)
            found["millis.cached_tokens"] = max(each.cached_tokens for each in timings)
        if told.job is None:
            return found
        if told.job.deadline_ms is not None:
            found["millis.deadline_ms"] = told.job.deadline_ms
        if told.job.kind == "generate":
            params = told.job.params
            found["gen_ai.request.choice.count"] = told.job.n
            found["gen_ai.request.temperature"] = params.temperature
            found["gen_ai.request.top_p"] = params.top_p
            if not told.job.open_ended:
                found["gen_ai.request.max_tokens"] = params.max_tokens
        if self._content:
            found["gen_ai.input.messages"] = _json(_messages(told.job))
            found["gen_ai.output.messages"] = _json(
                [
                    {"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": reason}
                    for text, (_, reason) in zip(told.texts, told.ended, strict=False)
                ]
            )
        return found

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        meter = self._meters.get_meter("millis.server", __version__)
        return meter.create_histogram(
            f"gen_ai.server.{name}", "s", about, explicit_bucket_boundaries_advisory=list(buckets)
        )


def _earlier(now_ns: int, seconds: float) -> int:
    return now_ns - round(1e9 * seconds)


def _messages(job: Job) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for prompt in job.prompts:
        if isinstance(prompt, Conversation):
            found += prompt.messages
        else:
            text = prompt.text if isinstance(prompt, Instruction) else prompt
            found.append({"role": "user", "content": text})
    return [
        {"role": message["role"], "parts": [{"type": "text", "content": message.get("content")}]} for message in found
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
