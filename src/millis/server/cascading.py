"""A cascade over HTTP: the answer of a request's first model, or a larger one's where that is sure to be in time.

The rules are those of tasks/cascade.py. Each model runs in a process of its own, and they are asked one after the
other; the larger model's process says whether its answer fits into what is left. Whatever becomes of it, the first
answer is there. Nothing is written before it is decided whose answer counts, but the role that a chat's stream begins
with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from millis.server.api import endpoints
from millis.server.api.errors import ApiError
from millis.server.api.job import Job
from millis.server.api.writer import Head, Writer
from millis.server.generate import TOLD_BYTES, Generation, server_timing
from millis.server.rewriting import rewritten
from millis.server.served import Model
from millis.tasks.cascade import cascade_timings, certainty, expected_tokens
from millis.tokenizer import Tokenizer
from millis.types import FinishReason, Timings, TokenLogprob

WHY = {"deadline_unmeetable": "no time", "deadline_exceeded": "not whole"}  # a larger answer is not taken; else failed


class Held(Writer):
    """Keeps the events of an answer; its endpoint's writer hears of them once the answer is taken."""

    def __init__(self, job: Job, head: Head) -> None:
        super().__init__(replace(job, stream=False), head)
        self._wanted, self._writer = job, endpoints.writer(job, head)
        self._fed: list[tuple[str, Sequence[TokenLogprob]]] = []

    def begin(self, prompt_tokens: int = 0) -> bytes:
        super().begin(prompt_tokens)
        return self._writer.begin(prompt_tokens) if self.job.endpoint == "chat" else b""

    def feed(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        self._fed.append((text, logprobs))
        self.choices[index].logprobs += logprobs
        return b""

    def take(self, reason: FinishReason, timings: Timings) -> bytes:
        """The answer is taken: what is still to be sent of its stream, or nothing where `body` is to be sent."""
        job, writer = self._wanted, self._writer
        sent = [] if job.endpoint == "chat" else [writer.begin(self.prompt_tokens)]
        for text, logprobs in () if reason == "deadline" and job.on_deadline == "fallback" else self._fed:
            sent.append(writer.feed(0, text, () if job.params.logprobs is None else logprobs))
        sent += [writer.finish(0, reason, timings, self.choices[0].stop), writer.end()]
        return b"".join(sent)

    def body(self) -> dict[str, Any]:
        return self._writer.body()

    def error(self, error: ApiError) -> bytes:
        return self._writer.error(error)


class Turn(Generation):
    """One model's answer to a request that may name several."""

    def writer_for(self, job: Job, tokenizer: Tokenizer) -> Writer:
        if not job.models:
            return super().writer_for(job, tokenizer)
        assert self.job is not None
        return Held(replace(job, params=self.job.params, stream=self.job.stream), self.head(tokenizer))

    async def ask(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer, *, last: bool) -> float:
        """Has the answer written; how sure the model is of it. last: nobody asks."""
        if not last and job.params.logprobs is None:
            job = replace(job, params=replace(job.params, logprobs=0))
        await self.generate(job, ids, tokenizer)
        return certainty(self.writer.choices[0].logprobs)

    @property
    def writer(self) -> Held:
        """What holds the answer."""
        assert isinstance(self._writer, Held)
        return self._writer


class Larger(Turn):
    """The answer of a larger model, without which there is one, too."""

    def __init__(self, first: Turn, name: str, model: Model, adapter: str | None) -> None:
        super().__init__(first.service, first._endpoint, first._scope, first._send)
        self.mailbox, self.connection, self.arrival_s = first.mailbox, first.connection, first.arrival_s
        self.job, self.tokenize_ms = first.job, first.tokenize_ms  # which this model may need, too
        self.model, self.served, self.adapter = name, model, adapter
        self._created = first.writer.head.created

    def head(self, tokenizer: Tokenizer) -> Head:
        return replace(super().head(tokenizer), created=self._created)

    async def replaces(self, tokens: int, *, last: bool) -> tuple[str, float]:
        """Asks for an answer where that of the model before has so many tokens: "replaced", or why it is not taken,
        and how sure the model is."""
        job, tokenizer = self.job, self.served.tokenizer
        assert job is not None
        passed_ms = 1000 * (time.monotonic() - self.arrival_s)
        if job.deadline_ms is not None and passed_ms + self.tokenize_ms >= job.deadline_ms:
            return "no time", 0.0
        if tokenizer is None or not self.served.ready:
            return "failed", 0.0
        self.minimum_tokens = expected_tokens(tokens)
        try:
            ids = await self.tokenized(job, tokenizer, self.service.in_thread)
            job = replace(job, on_deadline="error", stream=False)
            return "replaced", await self.ask(job, ids, tokenizer, last=last)
        except ApiError as error:
            self.count_error(error)
            self.close()
            return WHY.get(error.code or "", "failed"), 0.0


class Cascading(Turn):
    """The answer to a request that names one model or several."""

    _larger: Larger | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._found: dict[str, tuple[Model, str | None]] = {}  # by name, each with its adapter

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        if job.models:
            self.ends = False
            await self._answer(job, ids, tokenizer)
        else:
            await super().answer(job, ids, tokenizer)

    def fitted(self, job: Job) -> Job:
        if self.served.rewrites:
            return rewritten(job, self.served)
        models = list(self.service.models.values())
        for name in job.models:
            self._found[name] = self.service.find(name, "models")
            self._found[name][0].check(job.endpoint, self._scope["path"], models, "models")
        return job

    def close(self) -> None:
        super().close()
        if self._larger is not None:
            self._larger.close()

    async def _write(self, data: bytes, left: int) -> None:
        """Of a cascade, no more than how its stream begins."""
        if self.ends:
            await super()._write(data, left)
        elif not self.started:
            await super()._write(b"", 0)

    async def _answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        sure = first = await self.ask(job, ids, tokenizer, last=False)
        taken: Turn = self
        spent = [(self.model, self._elapsed_ms())]
        why = ""
        for name in job.models[1:]:
            if sure >= job.confidence:
                why = "confident"
                break
            if taken.ended[0][1] == "deadline":  # the timer may have told of it, and there is no other
                why = "no time"
                break
            self._larger = larger = Larger(self, name, *self._found[name])
            began_ms = self._elapsed_ms()
            why, sure = await larger.replaces(taken.ended[0][0].completion_tokens, last=name == job.models[-1])
            if why != "no time":
                spent.append((name, self._elapsed_ms() - began_ms))
            if why != "replaced":
                break
            taken.count(job, taken.ended[0][0].total_ms / 1000)
            taken = larger
        timings, reason = taken.ended[0]
        model_ms = tuple((name, round(ms, 3)) for name, ms in spent)
        more = {"model": taken.model, "model_ms": model_ms, "why": why, "confidence": first}
        timings = cascade_timings(timings, self._elapsed_ms(), job.deadline_ms, **more)
        taken.ended = [(timings, reason)]
        told = TOLD_BYTES * timings.completion_tokens
        data = await self.service.run(told, taken.writer.take, reason, timings)
        if job.stream:
            await self.write(data, more=False)
        else:
            await self.send_json(200, taken.writer.body(), {"server-timing": server_timing(taken.ended)})
        taken.count(job)
        self.served, self.ended, self._choices = taken.served, taken.ended, taken._choices  # what collectors are told

    def _elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self.arrival_s)
