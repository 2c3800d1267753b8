"""/v1/answer at work: the question's vector, the quotes, and a sentence of the model where there is time for one."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from millis.server.api.answer import AnswerWriter
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation, Job, prompt_ids
from millis.server.api.writer import Writer
from millis.server.generate import Generation
from millis.server.library import Library
from millis.server.messages import Embed, Vectors
from millis.tasks.answer import LEAST_MS, messages
from millis.tokenizer import Tokenizer, shortened
from millis.types import Timings

NO_SENTENCE = ("deadline_unmeetable", "deadline_exceeded", "context_length_exceeded")  # the quote is the answer


class Answering(Generation):
    """An answer from documents. Whatever keeps the model from writing in time, the quote is there."""

    ends = False
    _embedding = 0  # the number of the work that makes the vector, while it is on its way
    _written: AnswerWriter

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        library = self.service.library
        assert library is not None
        question = job.prompts[0]
        assert isinstance(question, str)
        vector = await self._vector(library, job, question) if library.needs_vector(question) else None
        embed_ms = self._elapsed_ms()
        answer = await self.service.in_thread(library.look, question, vector)
        timings = answer.timings
        timings.deadline_ms, timings.embed_ms, timings.quote_ms = job.deadline_ms, embed_ms, self._elapsed_ms()
        timings.search_ms = timings.quote_ms - embed_ms
        self._written = AnswerWriter(job, self.head(tokenizer))
        self._written.answer = answer
        if job.stream:
            await self.start(200, b"text/event-stream; charset=utf-8", {"server-timing": self._server_timing()})
            await self.write(self._written.begin(), more=True)
        writes = not self.served.reads and tokenizer.has_chat_template
        if not (answer.found and writes) or job.extra["extractive"] or self._late(job):
            await self._end(job)
            return
        chat = replace(job, prompts=(Conversation(tuple(messages(question, answer.sources))),))
        begin = time.monotonic()
        prompts = await self.service.run(len(question), prompt_ids, chat, tokenizer)
        self.tokenize_ms += 1000 * (time.monotonic() - begin)
        try:
            await self.generate(job, prompts, tokenizer)
        except ApiError as error:
            if error.code not in NO_SENTENCE:
                raise
            self.close()
        await self._end(job)

    def close(self) -> None:
        super().close()
        if self._embedding and self.service.library is not None and self.service.library.embedder is not None:
            self.service.library.embedder.client.cancel(self._embedding)

    def writer_for(self, job: Job, tokenizer: Tokenizer) -> Writer:
        return self._written

    async def _end(self, job: Job) -> None:
        writer, timings = self._written, self._written.answer.timings
        writer.settle()
        for done, _ in self.ended:
            timings.prompt_tokens, timings.cached_tokens = done.prompt_tokens, done.cached_tokens
            timings.completion_tokens = done.completion_tokens
            timings.first_token_ms = done.first_token_ms if done.completion_tokens else 0.0
        timings.total_ms = self._elapsed_ms()
        if job.stream:
            await self.write(writer.end(), more=False)
        else:
            await self.send_json(200, writer.body(), {"server-timing": self._server_timing()})
        if not self.ended:
            quoted = Timings(tokenize_ms=self.tokenize_ms, prefill_ms=timings.quote_ms, total_ms=timings.total_ms)
            self.ended.append((quoted, "stop"))
        self.count(job)

    async def _vector(self, library: Library, job: Job, question: str) -> NDArray[np.float32]:
        """[D] f32. ApiError: not even the vector can be there in time, or its process starts again."""
        embedder = library.embedder
        assert embedder is not None
        tokenizer = await self.service.loaded(embedder, job, self.arrival_s)
        info = embedder.client.info
        assert info is not None
        begin = time.monotonic()
        ids = await self.service.run(len(question), tokenizer.encode, question)
        ids = shortened(ids, info.context, tokenizer.around[1])
        self.tokenize_ms += 1000 * (time.monotonic() - begin)
        work = Embed(prompts=(tuple(ids),), **self.shared(job, embedder))
        self._embedding = work.id
        embedder.client.submit(work, self.mailbox)
        reply = await self.next()
        assert isinstance(reply, Vectors)
        self._embedding = 0
        return np.frombuffer(reply.data, np.float32)

    def _late(self, job: Job) -> bool:
        """Whether too little time is left to ask the model at all."""
        return job.deadline_ms is not None and job.deadline_ms - self._elapsed_ms() < LEAST_MS

    def _elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self.arrival_s)

    def _server_timing(self) -> str:
        timings = self._written.answer.timings
        names = ("embed", "search", "first_token", "total") if timings.total_ms else ("embed", "search")
        return ", ".join(f"{name};dur={getattr(timings, f'{name}_ms'):.3f}" for name in names)
