"""Answers that nothing is generated for: scores, vectors, ids and texts; and which endpoint is answered how."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from millis.server.answering import Answering
from millis.server.api.classify import labels_body
from millis.server.api.embeddings import embedding_body
from millis.server.api.errors import invalid, unsupported
from millis.server.api.job import PROMPT_FIELDS, Endpoint, Job, check_ids
from millis.server.api.similarity import cosines, rerank_body, score_body
from millis.server.api.tokenize import detokenize_body, tokenize_body
from millis.server.api.writer import Head
from millis.server.cascading import Cascading
from millis.server.exchange import Answer
from millis.server.messages import Embed, Score, Scores, Vectors
from millis.server.rewriting import rewritten
from millis.server.service import Service
from millis.tasks.encoder import sigmoid, softmax
from millis.tasks.labels import Question, exclusive
from millis.tokenizer import Tokenizer, shortened
from millis.types import RequestError, Timings

TIMES = ("queue", "tokenize", "prefill", "total")
PAIR_BODIES = {"score": score_body, "rerank": rerank_body}


class Batch(Answer):
    """Work of which every part has one reply."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[int] = set()

    def close(self) -> None:
        super().close()
        for number in self._open:
            self.served.client.cancel(number)

    def common(self, job: Job) -> dict[str, Any]:
        """The fields of a message, whose work `close` calls off."""
        found = self.shared(job, self.served)
        self._open.add(found["id"])
        return found

    async def finish(self, body: Mapping[str, Any], timings: Timings, size: int = 0) -> None:
        """Sends the answer, of about `size` bytes where they may be many, and counts it."""
        shown = ", ".join(f"{name};dur={getattr(timings, f'{name}_ms'):.3f}" for name in TIMES)
        await self.send_json(200, body, {"server-timing": shown}, size)
        total_s = time.monotonic() - self.arrival_s
        self.ended = [(timings, "stop")]
        slack_s = None if timings.deadline_ms is None else timings.deadline_ms / 1000 - total_s
        self.served.metrics.finish(timings, "stop", total_s, slack_s)

    def timed(self, job: Job, parts: list[Timings]) -> Timings:
        """The timings of all parts together, which may have shared steps: up to the end of the last."""
        total_ms = 1000 * (time.monotonic() - self.arrival_s)
        queue_ms = min(part.queue_ms for part in parts)
        return Timings(
            queue_ms=queue_ms,
            tokenize_ms=self.tokenize_ms,
            prefill_ms=max(part.queue_ms + part.prefill_ms + part.decode_ms for part in parts) - queue_ms,
            total_ms=total_ms,
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            cached_tokens=sum(part.cached_tokens for part in parts),
            steps=sum(part.steps for part in parts),
            deadline_ms=job.deadline_ms,
            slack_ms=None if job.deadline_ms is None else job.deadline_ms - total_ms,
        )

    def fitted(self, job: Job) -> Job:
        if job.truncate is not None and not self.served.reads:
            raise unsupported("truncate_prompt_tokens", "inputs are read whole; shorten them")
        return job

    def cut(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer, room: int) -> list[list[int]]:
        """What a model reads of each text. ApiError: one is longer than it reads, and may not be cut."""
        if job.truncate is not None and job.truncate > 0:
            room = min(room, job.truncate)
        suffix = tokenizer.around[1]
        found = []
        for i, text in enumerate(ids):
            if len(text) > room and (job.truncate is None or room <= len(suffix)):
                field = job.extra["fields"][i] if "fields" in job.extra else None
                name = f"text {i}" if field is None else field
                message = f"{name} has {len(text)} tokens; {self.served.name} reads {room}: shorten it"
                if self.served.reads:
                    message += ", or send truncate_prompt_tokens: -1 to have its end cut off"
                raise invalid(message, field or PROMPT_FIELDS.get(job.endpoint), "context_length_exceeded")
            found.append(shortened(text, room, suffix))
        return found

    async def read(self, job: Job, ids: list[list[int]], *, head: bool = False) -> tuple[NDArray[np.float32], Timings]:
        """A row for each prompt: its vector or what the head makes of it."""
        info = self.served.client.info
        assert info is not None
        for i, prompt in enumerate(ids):
            check_ids(prompt, info.vocab, f"input[{i}]" if len(ids) > 1 else "input")
        work = Embed(prompts=tuple(map(tuple, ids)), head=head, **self.common(job))
        self.served.client.submit(work, self.mailbox)
        reply = await self.next()
        assert isinstance(reply, Vectors)
        self._open.clear()
        return np.frombuffer(reply.data, np.float32).reshape(reply.shape), self.timed(job, [reply.timings])


class Classification(Batch):
    """/v1/classify: each label scored behind each prompt or, where a model was trained for its labels, by its head."""

    def fitted(self, job: Job) -> Job:
        job = super().fitted(job)
        if not self.served.reads:
            if not job.continuations:
                message = f"labels is missing: {self.served.name} has no trained head that knows its own"
                raise invalid(message, "labels", "missing_required_parameter")
            return job
        for name in job.extra["asks"]:
            raise unsupported(name, f"{self.served.name} was trained for its labels, and is asked nothing")
        own = self.served.labels
        unknown = [label for label in job.continuations if label not in own]
        if unknown:
            raise invalid(f"labels: {self.served.name} was not trained to tell {unknown[0]!r:.60}", "labels")
        truncate = -1 if job.truncate is None else job.truncate  # training cut them there, too
        return replace(job, prompts=job.extra["texts"], continuations=job.continuations or own, truncate=truncate)

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        if self.served.reads:
            await self._by_head(job, ids, tokenizer)
            return
        info = self.served.client.info
        assert info is not None
        question: Question = job.extra["question"]
        answers = question.answers(tokenizer)
        if question.multi:
            size = len(question.labels) * sum(map(len, job.extra["texts"]))
            asked = await self.service.run(size, _yes_or_no, question, job.extra["texts"], tokenizer)
        else:
            asked = [(prompt, answers) for prompt in ids]
        order = []
        for i, (prompt, continuations) in enumerate(asked):
            length = len(prompt) + max(map(len, continuations))
            if length > info.context:
                message = f"text {i} and its labels have {length} tokens; the context holds {info.context}: shorten it"
                raise invalid(message, "input", "context_length_exceeded")
            work = Score(
                prompt=tuple(prompt),
                continuations=tuple(map(tuple, continuations)),
                adapter=self.adapter,
                **self.common(job),
            )
            order.append(work.id)
            self.served.client.submit(work, self.mailbox)
        found: dict[int, Scores] = {}
        while len(found) < len(order):
            reply = await self.next()
            assert isinstance(reply, Scores)
            found[reply.id] = reply
            self._open.discard(reply.id)
        replies = [found[number] for number in order]
        rows = [
            question.scores(reply.values if question.multi or not reply.complete else exclusive(reply.values, answers))
            for reply in replies
        ]
        cut = [{} if reply.complete else {"complete": False} for reply in replies]
        timings = self.timed(job, [reply.timings for reply in replies])
        await self.finish(labels_body(job, self.head(tokenizer), rows, timings, question.multi, cut), timings)

    async def _by_head(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        info = self.served.client.info
        assert info is not None and info.head is not None
        texts = self.cut(job, ids, tokenizer, info.reads)
        logits, timings = await self.read(job, texts, head=True)
        logits = logits[:, [info.head.labels.index(label) for label in job.continuations]]
        several = info.head.problem == "multi_label"
        rows = (sigmoid(logits) if several else softmax(logits)).tolist()
        cut = [{"truncated": True} if len(text) < len(whole) else {} for text, whole in zip(texts, ids, strict=True)]
        await self.finish(labels_body(job, self.head(tokenizer), rows, timings, several, cut), timings)


def _yes_or_no(
    question: Question, texts: Sequence[str], tokenizer: Tokenizer
) -> list[tuple[list[int], list[list[int]]]]:
    return [question.yes_or_no(text, tokenizer) for text in texts]


class Embedding(Batch):
    """/v1/embeddings, /v1/score and /v1/rerank: a vector of each prompt, or a cross-encoder's number of each pair."""

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        info = self.served.client.info
        assert info is not None
        if self.adapter is not None:
            raise unsupported("model", "adapters write and classify; vectors come from the model itself")
        if info.relates and job.endpoint in PAIR_BODIES:
            size = 8 * sum(len(ids[i]) + len(ids[j]) for i, j in job.extra["pairs"])
            pairs = await self.service.run(size, self._pairs, job, ids, tokenizer, info.context)
            logits, timings = await self.read(job, pairs, head=True)
            body = PAIR_BODIES[job.endpoint](job, self.head(tokenizer), sigmoid(logits[:, 0]).tolist(), timings)
            return await self.finish(body, timings)
        ids = self.cut(job, ids, tokenizer, info.context)
        vectors, timings = await self.read(job, ids)
        size = vectors.nbytes if job.endpoint == "embeddings" else 0
        body = await self.service.run(vectors.nbytes, _vector_body, job, self.head(tokenizer), vectors, timings)
        await self.finish(body, timings, size)

    def _pairs(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer, room: int) -> list[list[int]]:
        """The ids of the texts that are compared, two by two. ApiError: two are longer than the model reads."""
        before, behind = map(len, tokenizer.around)
        bare = [text[before : len(text) - behind] for text in ids]
        if job.truncate is not None and job.truncate > 0:
            room = min(room, job.truncate)
        found = []
        for first, second in job.extra["pairs"]:
            field, other = job.extra["fields"][second], job.extra["fields"][first]
            pair = tokenizer.pair(bare[first], bare[second])
            if len(pair) > room and job.truncate is None:
                message = f"{other} and {field} have {len(pair)} tokens; {self.served.name} reads {room}: shorten them"
                message += ", or send truncate_prompt_tokens: -1 to have the end cut off"
                raise invalid(message, field, "context_length_exceeded")
            if len(pair) > room:
                try:
                    pair = tokenizer.pair(bare[first], bare[second], room)
                except RequestError as error:
                    raise invalid(f"{other}: {error}", other, "context_length_exceeded") from None
            found.append(pair)
        return found


def _vector_body(job: Job, head: Head, vectors: NDArray[np.float32], timings: Timings) -> dict[str, Any]:
    if job.endpoint == "embeddings":
        return embedding_body(job, head, vectors, timings)
    return PAIR_BODIES[job.endpoint](job, head, cosines(job, vectors), timings)


class Tokenization(Answer):
    """/tokenize, /detokenize and /v1/messages/count_tokens: answered here."""

    def fitted(self, job: Job) -> Job:
        return rewritten(job, self.served) if self.served.rewrites else job

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        info = self.served.client.info
        assert info is not None
        size = 8 * len(ids[0])
        if job.endpoint == "count_tokens":
            body: dict[str, Any] = {"input_tokens": len(ids[0])}
        elif job.kind == "tokenize":
            body = await self.service.run(size, tokenize_body, job, ids[0], info.context, tokenizer.token_bytes)
        else:
            check_ids(ids[0], info.vocab, "tokens")
            text = await self.service.run(size, tokenizer.decode, ids[0])
            body = detokenize_body(text)
        await self.send_json(200, body, {}, size if job.kind == "tokenize" else 0)


ANSWERS: Mapping[Endpoint, type[Answer]] = {
    "chat": Cascading,
    "completions": Cascading,
    "responses": Cascading,
    "messages": Cascading,
    "count_tokens": Tokenization,
    "embeddings": Embedding,
    "classify": Classification,
    "score": Embedding,
    "rerank": Embedding,
    "answer": Answering,
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
