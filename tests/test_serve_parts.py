"""Parts of the server alone: frames, the early estimate, figures over restarts, mailboxes."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from millis.config import ServerConfig
from millis.server.answering import Answering
from millis.server.api.errors import ApiError, deadline_exceeded, internal, invalid
from millis.server.api.job import Job
from millis.server.client import EngineClient, Lost, Mailbox
from millis.server.exchange import Answer, ClientGone
from millis.server.messages import (
    LENGTH,
    MAX_FRAME_BYTES,
    Batch,
    Cancel,
    Failed,
    Frames,
    Stats,
    Submit,
    Tokens,
    Vectors,
    frame,
)
from millis.server.metrics import Metrics
from millis.server.served import Model
from millis.server.service import LONG_BYTES, Service, predicted_ms
from millis.types import SamplingParams, Timings


def test_messages_arrive_whole_however_the_bytes_are_cut() -> None:
    messages = [Cancel(1), Batch([Tokens(2, (3, 4), None, "stop", Timings(total_ms=5.0))], 6.0), Cancel(7)]
    data = b"".join(map(frame, messages))
    for size in (1, 3, 7, 64, len(data)):
        frames = Frames()
        found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
        assert found == messages
    with pytest.raises(ValueError, match="a frame of"):
        Frames().feed(LENGTH.pack(MAX_FRAME_BYTES + 1))


def test_the_early_estimate_grows_with_what_is_in_the_way() -> None:
    stats = Stats(at_s=10.0, prefill_token_ms=0.5, step_ms=4.0)
    assert predicted_ms(stats, 10.0, 10.0, 0) == 4.0
    assert predicted_ms(stats, 10.02, 10.0, 0) == pytest.approx(20 + 4)  # waited already
    assert predicted_ms(stats, 11.0, 11.0, LONG_BYTES + 800) == 0.5 * 100 + 4


def test_figures_go_on_where_a_new_engine_begins_at_nought() -> None:
    metrics = Metrics("m")
    for steps in (10, 25, 5, 6):
        totals = {"steps": steps, "compiled": steps, "prefix_queries": 2 * steps, "prefix_hits": steps}
        metrics.observe(Stats(at_s=0.0, waiting=3, unprepared=2, kv_used=1, kv_total=4, **totals))
    metrics.restarted(1)
    metrics.finish(Timings(prompt_tokens=7, cached_tokens=3, completion_tokens=2), "deadline", 0.2, -0.1)
    metrics.refuse("overloaded")
    lines = metrics.text().decode().splitlines()
    for line in (
        'millis:engine_steps_total{model_name="m"} 31.0',
        'millis:grammars_compiled_total{model_name="m"} 31.0',
        'millis:num_requests_waiting{model_name="m"} 3.0',
        'millis:num_requests_unprepared{model_name="m"} 2.0',
        'millis:engine_restarts_total{model_name="m"} 1.0',
        'millis:kv_cache_usage_perc{model_name="m"} 0.25',
        'millis:prefix_cache_queries_total{model_name="m"} 62.0',
        'millis:prefix_cache_hits_total{model_name="m"} 31.0',
        'millis:deadlines_missed_total{model_name="m"} 1.0',
        'millis:deadlines_landed_total{model_name="m"} 1.0',
        'millis:request_success_total{finished_reason="deadline",model_name="m"} 1.0',
        'millis:requests_refused_total{model_name="m",reason="overloaded"} 1.0',
        'millis:slack_at_finish_seconds_bucket{le="-0.03",model_name="m"} 1.0',
    ):
        assert line in lines, line


@pytest.mark.parametrize(
    ("reply", "counted"),
    [
        (Lost(1, "engine_unavailable", "…"), 'failed_total{model_name="m",reason="engine_unavailable"}'),
        (Lost(1, "server_stopping", "…"), 'failed_total{model_name="m",reason="server_stopping"}'),
        (Lost(1, "request_poisoned", "…", False), 'failed_total{model_name="m",reason="request_poisoned"}'),
        (Failed(1, "…"), 'failed_total{model_name="m",reason="failed"}'),
        (Failed(1, "…", "invalid_grammar"), 'failed_total{model_name="m",reason="invalid_grammar"}'),
        (deadline_exceeded(), 'failed_total{model_name="m",reason="deadline_exceeded"}'),
        (internal(), 'failed_total{model_name="m",reason="internal_error"}'),
        (ClientGone(), 'failed_total{model_name="m",reason="client_gone"}'),
        (ApiError(503, "…", code="overloaded"), 'refused_total{model_name="m",reason="overloaded"}'),
        (invalid("…", None), None),
    ],
)
def test_a_request_without_an_answer_is_counted_once(reply: Any, counted: str | None) -> None:
    class Ending(Answer):
        async def _run(self, body: bytes) -> None:
            if isinstance(reply, Exception):
                raise reply
            self.checked(reply)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        pass

    model = Model("m", Path("m.gguf"), EngineClient("m.gguf", {}), Metrics("m"))
    service = Service(ServerConfig(), [model])
    scope = {"tenant": "", "request_id": "1", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(Ending(service, "chat", scope, send).run(receive))
    service.close()
    lines = service.metrics_text().decode().splitlines()
    found = [line for line in lines if line.startswith(("millis:requests_failed", "millis:requests_refused"))]
    assert found == ([] if counted is None else [f"millis:requests_{counted} 1.0"])


def test_one_request_too_many_of_a_key_may_come_again_in_a_second() -> None:
    model = Model("m", Path("m.gguf"), EngineClient("m.gguf", {}), Metrics("m"))
    service = Service(ServerConfig(key_concurrency=1), [model])
    with service.turn("a"), pytest.raises(ApiError) as caught, service.turn("a"):
        pass
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
    service.close()


def test_a_mailbox_wakes_whoever_waits_and_keeps_the_order() -> None:
    async def run() -> list[object]:
        box = Mailbox()
        waiting = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        box.put(1)
        box.put(2)
        found = [await waiting, box.get_now(), box.get_now()]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(box.get(), 0.01)
        box.put(3)  # nobody waits any more: it stays for the next
        return [*found, await box.get()]

    assert asyncio.run(run()) == [1, 2, None, 3]


def test_without_an_engine_work_fails_at_once() -> None:
    client, box = EngineClient("model", {}), Mailbox()
    client.submit(Submit(id=1, prompt=(1,), params=SamplingParams(), arrival_s=0.0), box)
    lost = box.get_now()
    assert isinstance(lost, Lost) and lost.code == "engine_unavailable" and lost.retryable
    client.cancel(1)
    assert client.in_flight == 0 and not client.ready


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_a_large_answer_holds_up_no_other(size: int) -> None:
    data = {"data": [{"embedding": row} for row in np.random.default_rng(0).normal(size=(1024, 384)).tolist()]}
    beats, sent = 0, b""

    async def run() -> None:
        nonlocal beats
        sending = asyncio.create_task(answer.send_json(200, data, {}, size))
        while not sending.done():
            await asyncio.sleep(0.001)
            beats += 1

    async def send(message: Any) -> None:
        nonlocal sent
        sent += message.get("body", b"")

    service = Service(ServerConfig(), [Model("m", Path("m.gguf"), EngineClient("m.gguf", {}), Metrics("m"))])
    answer = Answer(service, "embeddings", {"tenant": "", "request_id": "1", "headers": []}, send)
    asyncio.run(run())
    service.close()
    assert json.loads(sent) == data
    assert beats > 10 if size else beats < 5  # a short one is not worth a thread


@pytest.mark.parametrize("words", [1, LONG_BYTES])
def test_a_long_question_is_tokenized_in_a_thread(words: int) -> None:
    here, tokenized = threading.current_thread(), []

    class Words:
        around: tuple[list[int], list[int]] = ([], [])

        def encode(self, text: str) -> list[int]:
            tokenized.append(threading.current_thread())
            return [1] * len(text.split())

    class Embedder(EngineClient):
        def submit(self, work: Any, mailbox: Mailbox) -> None:
            assert work.prompts == ((1,) * min(words, 8),)
            mailbox.put(Vectors(work.id, np.ones(2, np.float32).tobytes(), (1, 2), Timings()))

    client = Embedder("e", {})
    client.info = cast(Any, SimpleNamespace(context=8))
    client._ready.set()
    embedder = Model("e", Path("e"), client, Metrics("e"), reads=True)
    embedder.tokenizer = cast(Any, Words())
    service = Service(ServerConfig(), [embedder])
    answer = Answering(service, "answer", {"tenant": "", "request_id": "1", "headers": []}, cast(Any, None))
    job = Job(endpoint="answer", kind="generate", model=None, prompts=())
    vector = asyncio.run(answer._vector(cast(Any, SimpleNamespace(embedder=embedder)), job, "word " * words))
    service.close()
    assert vector.tolist() == [1, 1] and (tokenized == [here]) == (words == 1)
