"""What is counted and measured, for Prometheus: named as vLLM names it, with our prefix. Nothing of any prompt."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from millis.server.messages import Stats
from millis.types import Timings

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2, 2, 3, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.5, 1, 5)
SLACK_SECONDS = (-1, -0.3, -0.1, -0.03, -0.01, -0.003, 0, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ("model_name",)
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The figures of one model. `beside`: those of another model of the same server, whose page they share."""

    def __init__(self, model: str, beside: Metrics | None = None) -> None:
        self._registry: CollectorRegistry = CollectorRegistry() if beside is None else beside._registry
        self._families: dict[str, Any] = {} if beside is None else beside._families
        self._model = model
        self._last = Stats(at_s=0.0)
        self._restarts = 0
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token sent", SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between tokens of an answer", STEP_SECONDS)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "Arrival to last byte", SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "Arrival to first step", SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "First step to first token", SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token", SECONDS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt", LENGTHS)
        self.answer_length = self._histogram("request_generation_tokens", "Tokens of an answer", LENGTHS)
        self.slack = self._histogram("slack_at_finish_seconds", "Deadline minus last byte", SLACK_SECONDS)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found there")
        self.deadlines_met = self._counter("deadlines_met", "Answers whose last byte was in time")
        self.deadlines_missed = self._counter("deadlines_missed", "Answers whose last byte was late")
        self.deadlines_landed = self._counter("deadlines_landed", "Answers shortened to be in time")
        self.engine_restarts = self._counter("engine_restarts", "Crashes of the engine process")
        self.preemptions = self._counter("num_preemptions", "Requests that lost their place for a while")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Tokens guessed")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right")
        self.steps = self._counter("engine_steps", "Steps of the engine")
        self.compiled = self._counter("grammars_compiled", "Grammars compiled, those refused then among them")
        self._finished = self._family(Counter, "request_success", "Answers, by how they ended", "finished_reason")
        self._refused = self._family(Counter, "requests_refused", "Requests refused, by why", "reason")
        self._failed = self._family(Counter, "requests_failed", "Admitted requests without an answer, by why", "reason")
        self.running = self._gauge("num_requests_running", "Requests in steps")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting for their first step")
        self.unprepared = self._gauge("num_requests_unprepared", "Of these: waiting for a grammar or an adapter")
        self.in_flight = self._gauge("num_requests_in_flight", "Answers the engine owes the server")
        self.active = self._gauge("num_requests_active", "Requests whose body has come and whose answer has not ended")
        self.connections = self._gauge("num_connections", "Open connections")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1")
        self.predicted = self._gauge("step_predicted_seconds", "What the latest step was thought to take")
        self.actual = self._gauge("step_actual_seconds", "What the latest step took")
        self.backlog = self._gauge("backlog_seconds", "What computing the prompts that wait is thought to take")
        self.delivery = self._gauge("delivery_seconds", "From a step's end to the server process, of late at most")
        self.engine_up = self._gauge("engine_up", "1: the engine is loaded and warm")

    def finish(self, timings: Timings, reason: str, total_s: float, slack_s: float | None) -> None:
        """An answer has ended: its last byte was sent `total_s` after its first byte came."""
        self._finished.labels(self._model, reason).inc()
        self.end_to_end.observe(total_s)
        self.queue.observe(timings.queue_ms / 1000)
        self.prefill.observe(timings.prefill_ms / 1000)
        self.decode.observe(timings.decode_ms / 1000)
        self.prompt_length.observe(timings.prompt_tokens)
        self.answer_length.observe(timings.completion_tokens)
        self.prompt_tokens.inc(timings.prompt_tokens)
        self.generation_tokens.inc(timings.completion_tokens)
        if slack_s is not None:
            self.slack.observe(slack_s)
            (self.deadlines_met if slack_s >= 0 else self.deadlines_missed).inc()
            if reason == "deadline":
                self.deadlines_landed.inc()

    def refuse(self, reason: str) -> None:
        """A request was refused before any work."""
        self._refused.labels(self._model, reason).inc()

    def fail(self, reason: str) -> None:
        """An admitted request has no answer."""
        self._failed.labels(self._model, reason).inc()

    def observe(self, stats: Stats) -> None:
        """Takes in the engine's state. Its totals begin anew with each process."""
        last = self._last if stats.steps >= self._last.steps else Stats(at_s=0.0)
        self.steps.inc(stats.steps - last.steps)
        self.prefix_queries.inc(max(0, stats.prefix_queries - last.prefix_queries))
        self.prefix_hits.inc(max(0, stats.prefix_hits - last.prefix_hits))
        self.drafted.inc(max(0, stats.drafted - last.drafted))
        self.accepted.inc(max(0, stats.accepted - last.accepted))
        self.preemptions.inc(max(0, stats.preemptions - last.preemptions))
        self.compiled.inc(max(0, stats.compiled - last.compiled))
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.unprepared.set(stats.unprepared)
        self.kv_usage.set(stats.kv_used / stats.kv_total if stats.kv_total else 0.0)
        self.predicted.set(stats.step_predicted_ms / 1000)
        self.actual.set(stats.step_actual_ms / 1000)
        self.backlog.set(stats.backlog_ms / 1000)
        self._last = stats

    def restarted(self, times: int) -> None:
        """So often has the engine process been restarted since the start."""
        self.engine_restarts.inc(times - self._restarts)
        self._restarts = times

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return self._family(Histogram, name, about, buckets=buckets).labels(self._model)  # type: ignore[no-any-return]

    def _counter(self, name: str, about: str) -> Counter:
        return self._family(Counter, name, about).labels(self._model)  # type: ignore[no-any-return]

    def _gauge(self, name: str, about: str) -> Gauge:
        return self._family(Gauge, name, about).labels(self._model)  # type: ignore[no-any-return]

    def _family(self, kind: type[Any], name: str, about: str, *labels: str, **more: Any) -> Any:
        """A figure of all models, made once for a server."""
        if name not in self._families:
            self._families[name] = kind(f"millis:{name}", about, (*_LABELS, *labels), registry=self._registry, **more)
        return self._families[name]
