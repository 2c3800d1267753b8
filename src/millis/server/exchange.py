"""One request for an answer, from its body to its last byte. Raw ASGI: one write for whatever a step brought."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from millis.server.api.errors import ApiError, deadline_exceeded, from_error, internal, model_not_found
from millis.server.api.job import Job, Limits, check_ids, choice_params, prompt_ids, with_deadline
from millis.server.api.writer import Head, Writer
from millis.server.client import Lost, Mailbox
from millis.server.messages import Failed, Refused, Submit, Tokens
from millis.server.protocol import connection_of
from millis.server.service import DELIVERY_S, Service
from millis.tasks.text import TextStream
from millis.tokenizer import Tokenizer
from millis.types import DeadlineError, MillisError, OverloadError, Timings, TokenLogprob

log = logging.getLogger("millis.server")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How an endpoint's bodies are read and its answers written."""

    parse: Callable[[bytes, Limits], Job]
    writer: Callable[[Job, Head], Writer]


@dataclass(frozen=True, slots=True)
class Gone:
    """The client has gone."""

    id: int = 0


@dataclass(frozen=True, slots=True)
class Late:
    """The deadline is here, and the engine has not ended the answer."""

    id: int = 0


@dataclass(slots=True)
class _Choice:
    index: int
    text: TextStream
    used: int = 0  # tokens of its text
    last_s: float = 0.0  # when its latest tokens came
    done: bool = False


class Exchange(Response):
    """The response object of a generating endpoint: runs when the framework sends it."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self.background = None
        self._service = service
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(self._service, scope, send)
        await guarded(answer, scope, lambda: answer.run(self._endpoint, receive))


class _Answer:
    """The state of one exchange."""

    def __init__(self, service: Service, scope: Scope, send: Send) -> None:
        self.service, self.scope = service, scope
        self.started = False  # the response's head was sent
        self.writer: Writer | None = None
        self._send = send
        self._connection = connection_of(scope)
        self._mailbox = Mailbox()
        self._choices: dict[int, _Choice] = {}  # by the engine's number
        self._timer: asyncio.TimerHandle | None = None
        self._tokenize_ms = 0.0
        self._first_s: float | None = None
        self._ended: list[tuple[Timings, str]] = []

    async def run(self, endpoint: Endpoint, receive: Receive) -> None:
        service, arrival_s = self.service, self._connection.arrival_s
        body = await read_body(receive, service.config.max_body_bytes)
        with service.turn(self.scope.get("tenant", "")):
            job = await service.run(len(body), endpoint.parse, body, service.limits)
            job = with_deadline(job, _headers(self.scope))
            if job.model is not None and job.model != service.model:
                raise model_not_found(job.model)
            service.refuse_early(job, len(body), arrival_s)
            tokenizer = await service.loaded(job, arrival_s)
            began = time.monotonic()
            prompts = await service.run(len(body), prompt_ids, job, tokenizer)
            self._tokenize_ms = 1000 * (time.monotonic() - began)
            head = Head(
                id=self.scope["request_id"],
                created=int(time.time()),
                model=service.model,
                fingerprint=service.fingerprint,
                token_bytes=tokenizer.token_bytes,
            )
            self.writer = endpoint.writer(job, head)
            try:
                self._submit(job, prompts, tokenizer)
                await self._answer(job)
            finally:
                self._close()

    def _submit(self, job: Job, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
        service, arrival_s = self.service, self._connection.arrival_s
        info = service.client.info
        assert info is not None
        work = []
        for p, ids in enumerate(prompts):
            check_ids(ids, info.vocab)
            if service.config.max_prompt_tokens is not None and len(ids) > service.config.max_prompt_tokens:
                message = f"the prompt has {len(ids)} tokens; at most {service.config.max_prompt_tokens} are taken"
                raise ApiError(400, message, code="context_length_exceeded")
            for c in range(job.n):
                params = choice_params(job, c, len(ids), info.context)
                work.append(
                    Submit(
                        id=service.client.number(),
                        prompt=tuple(ids),
                        params=params,
                        arrival_s=arrival_s,
                        deadline_s=service.deadline_s(job, arrival_s),
                        priority=job.priority,
                        tenant=self.scope.get("tenant", ""),
                        on_deadline=job.on_deadline,
                    )
                )
                text = TextStream(tokenizer.detokenizer(continues=job.endpoint == "completions"), params.stop)
                self._choices[work[-1].id] = _Choice(p * job.n + c, text)
        if job.deadline_ms is not None and job.params.grammar is None:
            at_s = arrival_s + job.deadline_ms / 1000 - DELIVERY_S
            self._timer = asyncio.get_running_loop().call_later(at_s - time.monotonic(), self._mailbox.put, Late())
        self._connection.on_gone = lambda: self._mailbox.put(Gone())
        for one in work:
            service.client.submit(one, self._mailbox)

    async def _answer(self, job: Job) -> None:
        assert self.writer is not None
        left = len(self._choices)
        while left:
            reply: Any = await self._mailbox.get()
            sent = []
            while reply is not None:
                if isinstance(reply, Gone):
                    return
                if isinstance(reply, Late):
                    sent.append(self._land(job))
                    left = 0
                    break
                data, ended = self._take(reply)
                sent.append(data)
                left -= ended
                reply = self._mailbox.get_now()
            data = b"".join(sent)
            if job.stream and (data or not left):
                if not self.started:
                    await self._start(200, b"text/event-stream; charset=utf-8", {"server-timing": self._so_far()})
                    data = self.writer.begin() + data
                if not left:
                    data += self.writer.end()
                await self._write(data, more=bool(left))
        if not job.stream:
            timed = server_timing([timings for timings, _ in self._ended])
            await self.send_json(200, self.writer.body(), {"server-timing": timed})
        self._count(job)

    def _take(self, reply: Any) -> tuple[bytes, bool]:
        """What a message of the engine adds to the answer, and whether it was the last of its choice."""
        if isinstance(reply, (Refused, Failed, Lost)):
            raise self._error(reply)
        assert isinstance(reply, Tokens) and self.writer is not None
        choice = self._choices[reply.id]
        text, now = choice.text, time.monotonic()
        if reply.tokens and not text.stopped:
            self._measure(choice, len(reply.tokens), now)
        pieces, before = [], choice.used
        for token in reply.tokens:
            if text.stopped:
                break
            pieces.append(text.push(token))
            choice.used += 1
        logprobs: Sequence[TokenLogprob] = (reply.logprobs or ())[: choice.used - before]
        if text.stopped and reply.finish_reason is None:
            self.service.client.stop(reply.id)
        if reply.finish_reason is None:
            return (self.writer.feed(choice.index, "".join(pieces), logprobs) if pieces else b""), False
        pieces.append(text.finish())
        sent = self.writer.feed(choice.index, "".join(pieces), logprobs)
        timings = reply.timings or Timings()
        reason = "stop" if text.stopped else reply.finish_reason
        return sent + self._finish(choice, reason, timings), True

    def _finish(self, choice: _Choice, reason: Any, timings: Timings) -> bytes:
        assert self.writer is not None
        choice.done = True
        job, arrival_s, now = self.writer.job, self._connection.arrival_s, time.monotonic()
        timings.tokenize_ms = self._tokenize_ms
        timings.completion_tokens = choice.used
        timings.total_ms = 1000 * (now - arrival_s)
        if job.deadline_ms is not None:
            timings.deadline_ms, timings.slack_ms = job.deadline_ms, job.deadline_ms - timings.total_ms
        self._ended.append((timings, reason))
        return self.writer.finish(choice.index, reason, timings, choice.text.stopped_by)

    def _land(self, job: Job) -> bytes:
        """Ends what the engine has not ended at the deadline, with what there is."""
        assert self.writer is not None
        sent = b""
        for number, choice in self._choices.items():
            if choice.done:
                continue
            self.service.client.cancel(number)
            if not self.started and job.on_deadline == "partial" and not choice.used:
                raise deadline_exceeded()
            sent += self.writer.feed(choice.index, choice.text.finish())
            sent += self._finish(choice, "deadline", Timings())
        return sent

    def _measure(self, choice: _Choice, tokens: int, now: float) -> None:
        metrics = self.service.metrics
        if choice.last_s:
            for _ in range(tokens):
                metrics.inter_token.observe((now - choice.last_s) / tokens)
        elif self._first_s is None:
            self._first_s = now
            metrics.first_token.observe(now - self._connection.arrival_s)
        choice.last_s = now

    def _count(self, job: Job) -> None:
        total_s = time.monotonic() - self._connection.arrival_s
        slack_s = None if job.deadline_ms is None else job.deadline_ms / 1000 - total_s
        for timings, reason in self._ended:
            self.service.metrics.finish(timings, reason, total_s, slack_s)

    def _error(self, reply: Refused | Failed | Lost) -> ApiError:
        metrics = self.service.metrics
        if isinstance(reply, Refused):
            wait_s, predicted = reply.retry_after_s or 0.0, reply.predicted_ms or 0.0
            error: MillisError
            if reply.kind == "deadline_unmeetable":
                error = DeadlineError(reply.message, predicted_ms=predicted, retry_after_s=wait_s)
            elif reply.kind == "overloaded":
                error = OverloadError(reply.message, retry_after_s=wait_s)
            else:
                return ApiError(400, reply.message, code="invalid_value")
            return from_error(error)
        if isinstance(reply, Failed):
            metrics.fail("failed")
            log.error("request %s failed in the engine: %s", self.scope["request_id"], reply.message)
            return internal()
        metrics.fail(reply.code)
        headers = {"Retry-After": "1"} if reply.retryable else {"x-should-retry": "false"}
        status = 503 if reply.retryable else 422
        kind = "server_error" if reply.retryable else "invalid_request_error"
        return ApiError(status, reply.message, type=kind, code=reply.code, headers=headers)

    def _so_far(self) -> str:
        """What is known of the times when the first token is there."""
        first_ms = 1000 * (time.monotonic() - self._connection.arrival_s)
        return f"tokenize;dur={self._tokenize_ms:.3f}, first_token;dur={first_ms:.3f}"

    def _close(self) -> None:
        """Whatever happened: nothing of this request stays in the engine."""
        self._connection.on_gone = None
        if self._timer is not None:
            self._timer.cancel()
        for number, choice in self._choices.items():
            if not choice.done:
                self.service.client.cancel(number)

    async def send_json(self, status: int, data: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        body = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        await self._start(status, b"application/json", {**headers, "content-length": str(len(body))})
        await self._write(body, more=False)

    async def _start(self, status: int, content_type: bytes, headers: Mapping[str, str]) -> None:
        self.started = True
        raw = [(b"content-type", content_type)]
        raw += [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: ApiError) -> None:
        """Says what went wrong: as the answer, or as the last event of a stream."""
        self.service.count_error(error)
        if not self.started:
            await self.send_json(error.status, error.body_for(self.scope["path"]), error.headers)
        elif self.writer is not None:
            await self._write(self.writer.error(error), more=False)


async def guarded(answer: _Answer, scope: Scope, run: Callable[[], Any]) -> None:
    """Runs an exchange; whatever it raises becomes an answer, and nothing of the request a line in the log."""
    try:
        await run()
    except ClientGone:
        pass
    except MillisError as error:
        await answer.fail(error if isinstance(error, ApiError) else from_error(error))
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        log.error("request %s: %s%s", scope["request_id"], type(error).__name__, where)  # its text may quote a prompt
        await answer.fail(internal())


class ClientGone(Exception):
    """The client has gone before its request was whole."""


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body. ApiError 413 as soon as it is too long."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            text = f"the body exceeds {limit} bytes; send less"
            raise ApiError(413, text, code="body_too_large", headers={"connection": "close"})
        if not message.get("more_body"):
            return b"".join(parts)


def server_timing(timings: Sequence[Timings]) -> str:
    """The header of that name (W3C Server Timing): the longest of each time."""
    names = ("queue", "tokenize", "prefill", "first_token", "decode", "total")
    longest = {name: max((getattr(one, f"{name}_ms") for one in timings), default=0.0) for name in names}
    return ", ".join(f"{name};dur={value:.3f}" for name, value in longest.items())


def _headers(scope: Scope) -> dict[str, str]:
    wanted = (b"x-deadline-ms", b"x-request-timeout-seconds")
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in wanted}
