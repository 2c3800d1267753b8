"""The HTTP application: routes, and what each request goes through from its body to its last byte."""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from millis.config import ServerConfig
from millis.server.client import EngineClient, Lost
from millis.server.messages import Failed, Refused, Submit, Tokens
from millis.server.protocol import connection_of
from millis.server.thin import ApiError, parse_chat
from millis.tasks.text import TextStream
from millis.tokenizer import Tokenizer


class Service:
    """What all requests share."""

    def __init__(self, config: ServerConfig, client: EngineClient, model: str) -> None:
        self.config = config
        self.client = client
        self.model = model
        self.tokenizer: Tokenizer | None = None
        self.draining = False


class Gone(Exception):
    """The client has gone."""


class Exchange(Response):
    """One request and its answer, as raw ASGI."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._chat(scope, receive, send)
        except ApiError as error:
            body = json.dumps(error.body_for(scope["path"])).encode()
            await _send_json(send, error.status, body, error.headers)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = self.service.client
        connection = connection_of(scope)
        body = await _read(receive, self.service.config.max_body_bytes)
        job = parse_chat(body)
        tokenizer = self.service.tokenizer
        if tokenizer is None or not client.ready:
            raise ApiError(503, "the model is still loading", code="not_ready", headers={"Retry-After": "1"})
        began = time.monotonic()
        try:
            ids = tokenizer.encode_chat(job["messages"])
        except Exception as error:
            raise ApiError(400, str(error)) from None
        tokenize_ms = 1000 * (time.monotonic() - began)
        deadline = job.get("deadline_ms")
        params = job["params"]
        number = client.number()
        text = TextStream(tokenizer.detokenizer(), params.stop)
        mailbox = client.submit(
            Submit(
                id=number,
                prompt=tuple(ids),
                params=params,
                arrival_s=connection.arrival_s,
                deadline_s=None if deadline is None else connection.arrival_s + deadline / 1000,
            )
        )
        connection.on_gone = lambda: (client.cancel(number), mailbox.put(Lost(number, "gone", "")))  # type: ignore
        head = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": self.service.model}
        started, reason, timings = False, None, None
        while reason is None:
            item = await mailbox.get()
            if isinstance(item, Refused):
                status = 503 if item.kind != "invalid_request" else 400
                headers = {"Retry-After": "1", "x-should-retry": "false"} if status == 503 else {}
                raise ApiError(status, item.message, code=item.kind, predicted_ms=item.predicted_ms, headers=headers)
            if isinstance(item, (Lost, Failed)):
                raise ApiError(503, item.message, code=getattr(item, "code", "engine_failed"), type="server_error")
            assert isinstance(item, Tokens)
            piece = "".join(text.push(token) for token in item.tokens)
            if text.stopped:
                client.stop(number)
            reason, timings = item.finish_reason, item.timings
            if reason is not None:
                piece += text.finish()
            if job.get("stream"):
                chunks = []
                if not started:
                    started = True
                    await _start_sse(send)
                    chunks.append(_chunk(head, {"role": "assistant", "content": ""}, None))
                if piece:
                    chunks.append(_chunk(head, {"content": piece}, None))
                if reason is not None:
                    assert timings is not None
                    timings.tokenize_ms = tokenize_ms
                    usage = {"prompt_tokens": len(ids), "completion_tokens": timings.completion_tokens}
                    usage["total_tokens"] = sum(usage.values())
                    last = {"usage": usage, "timings": timings.asdict()}
                    chunks.append(_chunk(head, {}, "stop" if text.stopped else reason, last) + b"data: [DONE]\n\n")
                if chunks:
                    await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": reason is None})
        if not job.get("stream"):
            assert timings is not None
            timings.tokenize_ms = tokenize_ms
            message = {"role": "assistant", "content": text.text}
            usage = {"prompt_tokens": len(ids), "completion_tokens": timings.completion_tokens}
            usage["total_tokens"] = sum(usage.values())
            choice = {"index": 0, "message": message, "finish_reason": "stop" if text.stopped else reason}
            answer = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            answer["timings"] = timings.asdict()
            await _send_json(send, 200, json.dumps(answer, ensure_ascii=False).encode(), {})


def create_app(service: Service) -> FastAPI:
    """The application with all its routes."""
    app = FastAPI(title="Millis")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return Exchange(service)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [{"id": service.model, "object": "model", "created": 0, "owned_by": "millis"}]})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        ok = service.client.ready and service.tokenizer is not None and not service.draining
        return JSONResponse({"status": "ready" if ok else "not_ready"}, 200 if ok else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse("")

    return app


def _chunk(head: dict[str, Any], delta: dict[str, Any], reason: str | None, more: dict[str, Any] | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    data = {**head, "object": "chat.completion.chunk", "choices": [choice], **(more or {})}
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise ApiError(413, f"the body exceeds {limit} bytes; send less", code="body_too_large")
        if not message.get("more_body"):
            return b"".join(parts)


async def _start_sse(send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_json(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
