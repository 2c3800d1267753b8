"""One request, from its body to its last byte: what all endpoints share. Raw ASGI, so that a write costs little."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send

from millis.server.api import endpoints
from millis.server.api.errors import ApiError, deadline_exceeded, from_error, internal, invalid
from millis.server.api.job import PROMPT_FIELDS, Endpoint, Job, prompt_ids, with_deadline
from millis.server.api.truncation import answer_room
from millis.server.api.writer import Head, to_json
from millis.server.client import Lost, Mailbox
from millis.server.messages import Failed, Refused
from millis.server.protocol import connection_of
from millis.server.served import Model
from millis.server.service import DELIVERY_S, LONG_BYTES, Service
from millis.server.telemetry import Told
from millis.tokenizer import Tokenizer
from millis.types import DeadlineError, FinishReason, MillisError, OverloadError, Timings

log = logging.getLogger("millis.server")
REFUSAL_S = 0.02  # the engine may take so long to refuse what is late already, and says more than that it is
DEADLINE_HEADERS = (b"x-deadline-ms", b"x-request-timeout-seconds")


class Gone:
    """Put into the mailbox when the client has gone."""


class Late:
    """Put into the mailbox at the deadline: the engine has not ended the answer."""


class Answer:
    """The state of one exchange. Subclasses say what is done with the job's token ids."""

    def __init__(self, service: Service, endpoint: Endpoint, scope: Scope, send: Send) -> None:
        self.service = service
        self.mailbox = Mailbox()
        self.started = False  # the response's head was sent
        self.connection = connection_of(scope)
        self.arrival_s = self.connection.arrival_s
        self.tenant: str = scope["tenant"]
        self.request_id: str = scope["request_id"]
        self.tokenize_ms = 0.0
        self.job: Job | None = None
        self.ended: list[tuple[Timings, FinishReason]] = []  # of each part that was answered: how, too
        self.first_s: float | None = None  # when the first token was sent
        self._error: str | None = None
        self._counted = False  # among the failures
        self._timer: asyncio.TimerHandle | None = None
        self.served = service.main
        self.model = service.main.name  # as the request names it
        self.adapter: str | None = None
        self._endpoint: Endpoint = endpoint
        self._scope, self._send = scope, send

    async def run(self, receive: Receive) -> None:
        """Answers. Whatever goes wrong becomes an answer too, and nothing of the request a line in the log."""
        try:
            _check_encoding(self._scope)
            body = await read_body(receive, self.service.config.max_body_bytes)
            with self.service.turn(self.tenant):
                try:
                    await self._run(body)
                finally:
                    self.close()
        except ClientGone:
            self._error = "client_gone"
            self._count_failure(self._error)
        except MillisError as error:
            await self._fail(from_error(error))
        except Exception as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = "" if place is None else f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
            log.error("request %s: %s%s", self.request_id, type(error).__name__, where)  # its text may quote a prompt
            await self._fail(internal())
        finally:
            if self.service.telemetry is not None:
                self.service.telemetry.tell(self._told())

    async def _run(self, body: bytes) -> None:
        service = self.service
        past, size = None, len(body)
        if self._endpoint == "responses" and service.config.max_stored:
            past = service.past(self.tenant)
            size += past.size
        job = await service.run(size, endpoints.parse, self._endpoint, body, service.limits, past)
        job = with_deadline(job, _deadline_headers(self._scope))
        param = "models" if job.models else "model"
        self.served, self.adapter = service.find(job.model, param)
        self.model = job.model or self.served.name
        self.job = job
        service.refuse_early(self.served, job, len(body), self.arrival_s)
        tokenizer = await service.loaded(self.served, job, self.arrival_s)
        self.served.check(job.endpoint, self._scope["path"], list(service.models.values()), param)
        job = self.job = self.fitted(job)
        ids = await self.tokenized(job, tokenizer, partial(service.run, size))
        if self.connection.gone:
            raise ClientGone
        self.connection.on_gone = lambda: self.mailbox.put(Gone())
        self.watch_deadline(job)
        await self.answer(job, ids, tokenizer)

    async def tokenized(
        self, job: Job, tokenizer: Tokenizer, run: Callable[..., Awaitable[list[list[int]]]]
    ) -> list[list[int]]:
        """The token ids of each prompt, made by `run`, which calls a function. ApiError: too many, or none."""
        began = time.monotonic()
        remembering = tokenizer.remembering(self.served.recent, self.tenant)
        ids = await run(prompt_ids, job, remembering, self.room(job))
        self.tokenize_ms = 1000 * (time.monotonic() - began)
        self._check_lengths(ids)
        return ids

    def fitted(self, job: Job) -> Job:
        """The job as the model that it names does it. ApiError: it asks for what that model does not do."""
        return job

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        """Does the work and writes the answer. ids: of each prompt."""
        raise NotImplementedError

    def texts(self) -> list[str]:
        """What was written, a text a choice."""
        return []

    def close(self) -> None:
        """Whatever happened: nothing of this request stays behind."""
        self.connection.on_gone = None
        if self._timer is not None:
            self._timer.cancel()

    def room(self, job: Job) -> int | None:
        """Tokens that a prompt may have which can be made shorter."""
        info = self.served.client.info
        if info is None or not job.drops_oldest:
            return None
        room = answer_room(info.context, None if job.open_ended else job.params.max_tokens)
        return min(room, self.service.config.max_prompt_tokens or room)

    def shared(self, job: Job, model: Model) -> dict[str, Any]:
        """The fields that all messages of work share."""
        return {
            "id": model.client.number(),
            "arrival_s": self.arrival_s,
            "deadline_s": self.service.deadline_s(model, job, self.arrival_s),
            "asked_ms": job.deadline_ms,
            "priority": job.priority,
            "tenant": self.tenant,
        }

    def watch_deadline(self, job: Job) -> None:
        """Where the engine is held up, what there is goes out in time."""
        if job.deadline_ms is not None:
            left_s = self.arrival_s + job.deadline_ms / 1000 - DELIVERY_S - time.monotonic()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(left_s, REFUSAL_S), self.mailbox.put, Late())

    def head(self, tokenizer: Tokenizer) -> Head:
        """What an answer says of itself."""
        service = self.service
        return Head(
            self.request_id,
            int(time.time()),
            self.model,
            service.fingerprint,
            tokenizer.token_bytes,
            lambda: tokenizer.detokenizer(continues=True),
        )

    async def next(self) -> Any:
        """The next reply of the engine. ClientGone, or the ApiError that a refusal, a crash or the deadline means."""
        return self.checked(await self.mailbox.get())

    def checked(self, reply: Any) -> Any:
        """A reply that is an answer."""
        if isinstance(reply, Gone):
            raise ClientGone
        if isinstance(reply, Late):
            raise deadline_exceeded()
        if isinstance(reply, Failed):
            self._count_failure(reply.code)
            if reply.code == "invalid_grammar":
                raise _invalid_form(reply.message, self.job)
            log.error("request %s failed in the engine", self.request_id)
            raise internal()
        if isinstance(reply, Lost):
            self._count_failure(reply.code)
        return checked_reply(reply, self.job)

    async def send_json(self, status: int, data: Mapping[str, Any], headers: Mapping[str, str], size: int = 0) -> None:
        """Sends the whole answer. size: about its bytes, where they may be many."""
        body = await self.service.run(size, _body, data, size > LONG_BYTES)
        await self.start(status, b"application/json", {**headers, "content-length": str(len(body))})
        await self.write(body, more=False)

    async def start(self, status: int, content_type: bytes, headers: Mapping[str, str]) -> None:
        """Sends the head of the response."""
        self.started = True
        raw = [(b"content-type", content_type)]
        raw += [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, *, more: bool) -> None:
        """Sends a part of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def error_event(self, error: ApiError) -> bytes:
        """What ends a stream that fails."""
        return b""

    def _told(self) -> Told:
        return Told(
            endpoint=self._endpoint,
            model=self.served.name,
            request_id=self.request_id,
            headers=self._scope["headers"],
            arrival_s=self.arrival_s,
            first_s=self.first_s,
            job=self.job,
            ended=self.ended,
            texts=self.texts(),
            error=self._error,
        )

    async def _fail(self, error: ApiError) -> None:
        self._error = error.code or str(error.status)
        self.count_error(error)
        if self.started:
            await self.write(self.error_event(error), more=False)
        else:
            await self.send_json(error.status, error.body_for(self._scope["path"]), error.headers)

    def count_error(self, error: ApiError) -> None:
        """Counts an error of the model, unless it is counted already."""
        if not self._counted:
            self.service.count_error(error, self.served)

    def _count_failure(self, reason: str) -> None:
        self._counted = True
        self.served.metrics.fail(reason)

    def _check_lengths(self, ids: list[list[int]]) -> None:
        limit = self.service.config.max_prompt_tokens
        longest = max(map(len, ids), default=0)
        if limit is not None and longest > limit:
            message = f"the prompt has {longest} tokens; at most {limit} are taken: shorten it"
            raise invalid(message, PROMPT_FIELDS.get(self._endpoint), "context_length_exceeded")


def _body(data: Mapping[str, Any], long: bool) -> bytes:
    return to_json(data, long=long, allow_nan=True).encode("utf-8", "replace")


class ClientGone(Exception):
    """The client has gone before its answer was whole."""


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body. ApiError 413 as soon as it is too long; ClientGone."""
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
            raise ApiError(413, text, code="body_too_large")  # the rest is read and dropped, up to the body's timeout
        if not message.get("more_body"):
            return b"".join(parts)


def checked_reply(reply: Any, job: Job | None = None) -> Any:
    """A reply of the engine that is an answer. ApiError: a refusal, or work that was lost."""
    if isinstance(reply, Refused):
        raise _refusal(reply, job)
    if isinstance(reply, Lost):
        raise _lost(reply)
    return reply


def _refusal(reply: Refused, job: Job | None) -> ApiError:
    wait_s, predicted = reply.retry_after_s or 0.0, reply.predicted_ms or 0.0
    if reply.kind == "deadline_unmeetable":
        return from_error(DeadlineError(reply.message, predicted_ms=predicted, retry_after_s=wait_s))
    if reply.kind == "overloaded":
        return from_error(OverloadError(reply.message, retry_after_s=wait_s))
    if reply.kind == "invalid_grammar":
        return _invalid_form(reply.message, job, reply.rule)
    return invalid(reply.message, None)


def _invalid_form(message: str, job: Job | None, rule: str | None = None) -> ApiError:
    """A form of the answer that cannot be used, and the field that its grammar, or this rule of it, is from."""
    field = None if job is None or rule is None else job.rules.get(rule)
    if field is not None:
        return invalid(f"{field}: {message}", field, "invalid_grammar")
    return invalid(message, None if job is None else job.form, "invalid_grammar")


def _lost(reply: Lost) -> ApiError:
    if reply.retryable:
        headers = {"Retry-After": "1"}
        return ApiError(503, reply.message, type="server_error", code=reply.code, headers=headers)
    return ApiError(422, reply.message, code=reply.code, headers={"x-should-retry": "false"})


def _check_encoding(scope: Scope) -> None:
    """ApiError 415: the body is compressed."""
    given = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"identity")
    if given.strip().lower() not in (b"", b"identity"):
        message = f"the content-encoding {given.decode('latin-1')!r:.60} is not read here; send the body uncompressed"
        raise ApiError(415, message, param="content-encoding", code="unsupported_content_encoding")


def _deadline_headers(scope: Scope) -> dict[str, str]:
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in DEADLINE_HEADERS}
