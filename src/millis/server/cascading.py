"""A cascade over HTTP: the answer of a request's first model, or a larger one's where that is sure to be in time.

The rules are those of tasks/cascade.py. Each model runs in a process of its own, and they are asked one after the
other; the larger model's process says whether its answer fits into what is left. Whatever becomes of it, the first
answer is there.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from millis.server.api import endpoints
from millis.server.api.errors import ApiError
from millis.server.api.job import Job, prompt_ids
from millis.server.api.writer import Writer
from millis.server.generate import Generation, server_timing
from millis.server.rewriting import rewritten
from millis.server.served import Model
from millis.tasks.cascade import certainty, expected_tokens
from millis.tokenizer import Tokenizer

WHY = {"deadline_unmeetable": "no time", "deadline_exceeded": "not whole"}  # a larger answer is not taken; else failed


class Turn(Generation):
    """One model's answer to a request that may name several."""

    def writer_for(self, job: Job, tokenizer: Tokenizer) -> Writer:
        assert self.job is not None
        return endpoints.writer(replace(job, params=self.job.params), self.head(tokenizer))

    async def ask(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer, *, last: bool) -> float:
        """Has the answer written; how sure the model is of it. last: nobody asks."""
        if not last and job.params.logprobs is None:
            job = replace(job, params=replace(job.params, logprobs=0))
        await self.generate(job, ids, tokenizer)
        return certainty(self.writer.choices[0].logprobs)

    @property
    def writer(self) -> Writer:
        """What holds the answer."""
        assert self._writer is not None
        return self._writer


class Larger(Turn):
    """The answer of a larger model, without which there is one, too."""

    def __init__(self, first: Turn, name: str, model: Model, adapter: str | None) -> None:
        super().__init__(first.service, first._endpoint, first._scope, first._send)
        self.mailbox, self.connection, self.arrival_s = first.mailbox, first.connection, first.arrival_s
        self.job, self.tokenize_ms = first.job, first.tokenize_ms  # which this model may need, too
        self.model, self.served, self.adapter = name, model, adapter

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
        self.watch_deadline(job)
        try:
            began = time.monotonic()
            ids = await self.service.in_thread(prompt_ids, job, tokenizer)
            self.tokenize_ms = 1000 * (time.monotonic() - began)
            self._check_lengths(ids)
            return "replaced", await self.ask(replace(job, on_deadline="error"), ids, tokenizer, last=last)
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

    async def _answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        sure = first = await self.ask(job, ids, tokenizer, last=False)
        taken: Turn = self
        spent = [(self.model, self._elapsed_ms())]
        why = ""
        for name in job.models[1:]:
            if sure >= job.confidence:
                why = "confident"
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
        timings = taken.ended[0][0]
        timings.total_ms = self._elapsed_ms()
        if job.deadline_ms is not None:
            timings.slack_ms = job.deadline_ms - timings.total_ms
        body = taken.writer.body()
        body["timings"] |= {
            "model": taken.model,
            "model_ms": [(name, round(ms, 3)) for name, ms in spent],
            "why": why,
            "confidence": round(first, 4),
        }
        await self.send_json(200, body, {"server-timing": server_timing(taken.ended)})
        taken.count(job)
        self.served, self.ended, self._choices = taken.served, taken.ended, taken._choices  # what collectors are told

    def _elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self.arrival_s)
