"""Answers that nothing is generated for: scores, vectors, ids and texts; and which endpoint is answered how."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from millis.server.api.classify import classify_body
from millis.server.api.embeddings import embedding_body
from millis.server.api.errors import unsupported
from millis.server.api.job import Endpoint, Job, check_ids, continuation_ids
from millis.server.api.similarity import rerank_body, score_body
from millis.server.api.tokenize import detokenize_body, tokenize_body
from millis.server.exchange import Answer
from millis.server.generate import Generation
from millis.server.messages import Embed, Score, Scores, Vectors
from millis.server.service import Service
from millis.tokenizer import Tokenizer
from millis.types import Timings

VECTOR_BODIES = {"embeddings": embedding_body, "score": score_body, "rerank": rerank_body}


class Batch(Answer):
    """Work of which every part has one reply."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[int] = set()

    def close(self) -> None:
        super().close()
        for number in self._open:
            self.service.client.cancel(number)

    def common(self, job: Job) -> dict[str, Any]:
        """The fields that all messages of work share."""
        number = self.service.client.number()
        self._open.add(number)
        deadline_s = self.service.deadline_s(job, self.arrival_s)
        return {
            "id": number,
            "arrival_s": self.arrival_s,
            "deadline_s": deadline_s,
            "priority": job.priority,
            "tenant": self.tenant,
        }

    async def finish(self, body: Mapping[str, Any], timings: Timings) -> None:
        """Sends the answer and counts it."""
        await self.send_json(200, body, {"server-timing": f"total;dur={timings.total_ms:.3f}"})
        total_s = time.monotonic() - self.arrival_s
        self.ended = [(timings, "stop")]
        slack_s = None if timings.deadline_ms is None else timings.deadline_ms / 1000 - total_s
        self.service.metrics.finish(timings, "stop", total_s, slack_s)

    def timed(self, job: Job, parts: list[Timings]) -> Timings:
        """The timings of all parts together."""
        total_ms = 1000 * (time.monotonic() - self.arrival_s)
        return Timings(
            queue_ms=min(part.queue_ms for part in parts),
            tokenize_ms=self.tokenize_ms,
            prefill_ms=sum(part.prefill_ms for part in parts),
            total_ms=total_ms,
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            cached_tokens=sum(part.cached_tokens for part in parts),
            steps=sum(part.steps for part in parts),
            deadline_ms=job.deadline_ms,
            slack_ms=None if job.deadline_ms is None else job.deadline_ms - total_ms,
        )


class Classification(Batch):
    """/v1/classify: each label scored behind each prompt."""

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        labels = tuple(tuple(label) for label in continuation_ids(job, tokenizer))
        order = []
        for prompt in ids:
            work = Score(prompt=tuple(prompt), continuations=labels, adapter=self.adapter, **self.common(job))
            order.append(work.id)
            self.service.client.submit(work, self.mailbox)
        found: dict[int, Scores] = {}
        while len(found) < len(order):
            reply = await self.next()
            assert isinstance(reply, Scores)
            found[reply.id] = reply
            self._open.discard(reply.id)
        rows = [found[number].values for number in order]
        timings = self.timed(job, [found[number].timings for number in order])
        await self.finish(classify_body(job, self.head(tokenizer), rows, timings), timings)


class Embedding(Batch):
    """/v1/embeddings, /v1/score and /v1/rerank: a vector of each prompt."""

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        info = self.service.client.info
        assert info is not None
        if self.adapter is not None:
            raise unsupported("model", "adapters write and classify; vectors come from the model itself")
        for prompt in ids:
            check_ids(prompt, info.vocab, "input")
        work = Embed(prompts=tuple(map(tuple, ids)), **self.common(job))
        self.service.client.submit(work, self.mailbox)
        reply = await self.next()
        assert isinstance(reply, Vectors)
        self._open.clear()
        vectors = np.frombuffer(reply.data, np.float32).reshape(reply.shape)
        timings = self.timed(job, [reply.timings])
        await self.finish(VECTOR_BODIES[job.endpoint](job, self.head(tokenizer), vectors, timings), timings)


class Tokenization(Answer):
    """/tokenize and /detokenize: answered here."""

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        info = self.service.client.info
        assert info is not None
        if job.kind == "tokenize":
            body = tokenize_body(job, ids[0], info.context, tokenizer.token_bytes)
        else:
            check_ids(ids[0], info.vocab, "tokens")
            text = await self.service.run(8 * len(ids[0]), tokenizer.decode, ids[0])
            body = detokenize_body(text)
        await self.send_json(200, body, {})


ANSWERS: Mapping[Endpoint, type[Answer]] = {
    "chat": Generation,
    "completions": Generation,
    "responses": Generation,
    "messages": Generation,
    "embeddings": Embedding,
    "classify": Classification,
    "score": Embedding,
    "rerank": Embedding,
    "tokenize": Tokenization,
    "detokenize": Tokenization,
}


class Exchange(Response):
    """An endpoint as an ASGI application, and as the response that a route of the framework returns."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self.background = None
        self._service = service
        self._endpoint: Endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await ANSWERS[self._endpoint](self._service, self._endpoint, scope, send).run(receive)
