"""Answers that are generated: tokens of the engine → text → the endpoint's writer, one write for a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millis.server.api import endpoints
from millis.server.api.completions import CompletionWriter
from millis.server.api.echo import Echo, echo_of
from millis.server.api.errors import ApiError, deadline_exceeded, from_error, invalid
from millis.server.api.job import PROMPT_FIELDS, Job, check_ids, choice_params
from millis.server.api.writer import Writer
from millis.server.exchange import Answer, Late
from millis.server.messages import Score, Scores, Submit, Tokens
from millis.server.rewriting import Whole, check_source
from millis.server.service import predicted_ms
from millis.tasks.text import TextStream
from millis.tokenizer import Tokenizer
from millis.types import DeadlineError, FinishReason, Timings, TokenLogprob

TOLD_BYTES = 64  # of an answer, at least, that tells of a token's log-probability


@dataclass(slots=True)
class _Choice:
    index: int
    text: TextStream
    prompt_tokens: int
    work: Submit | None  # None: it is its prompt alone
    read: Timings | None = None  # of the prompt, which was read for it before anything was written
    used: int = 0  # tokens of its text
    last_s: float = 0.0  # when its latest tokens came
    done: bool = False


@dataclass(slots=True)
class _Prompt:
    """A prompt, how it is shown, and the choices that are written behind it."""

    tokens: tuple[int, ...]
    echo: Echo | None
    choices: list[_Choice]


class Generation(Answer):
    """An answer with one or more choices."""

    ends = True  # with its last token, the answer is whole
    minimum_tokens: int | None = None  # of the shortest answer worth giving, where that is not the engine's rule
    _writer: Writer | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._choices: dict[int, _Choice] = {}  # by the engine's number
        self._reading: dict[int, _Prompt] = {}  # likewise, prompts of which something is to be told first
        self._left = 0  # choices that have not ended

    async def answer(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        await self.generate(job, ids, tokenizer)
        assert self._writer is not None
        if not job.stream:
            told = 0 if job.best is None else sum(map(len, ids))
            if job.params.logprobs is not None:
                told += sum(timings.completion_tokens for timings, _ in self.ended)
            size = TOLD_BYTES * told
            body = await self.service.run(size, self._writer.body)
            await self.send_json(200, body, {"server-timing": server_timing(self.ended)}, size)
        self.count(job)

    def writer_for(self, job: Job, tokenizer: Tokenizer) -> Writer:
        """What writes the answer."""
        return endpoints.writer(job, self.head(tokenizer))

    async def generate(self, job: Job, ids: list[list[int]], tokenizer: Tokenizer) -> None:
        """Feeds the writer with what the engine makes of each prompt, and sends that where it streams."""
        self._job = job
        self._writer = self.writer_for(job, tokenizer)
        self._opening = self._writer.begin(sum(map(len, ids)))  # goes out with the first token, or not at all
        for prompt in await self._prompts(ids, tokenizer):
            if job.best is not None and len(prompt.tokens) > 1:
                self._read(prompt)
            else:
                self._opening += await self._follow(prompt, None)
        if job.stream and not self._left:
            await self._write(b"", 0)
        while self._left:
            reply = await self.mailbox.get()
            sent = []
            while reply is not None:
                if isinstance(reply, Late) and job.params.grammar is not None and not self._reading:
                    self._refuse_unbegun(job)
                elif isinstance(reply, Late):
                    sent.append(self._land())
                elif isinstance(self.checked(reply), Scores):
                    data = await self._follow(self._reading.pop(reply.id), reply)
                    if self.started:
                        sent.append(data)
                    else:
                        self._opening += data
                else:
                    sent.append(self._take(reply))
                reply = self.mailbox.get_now() if self._left else None
            if job.stream:
                await self._write(b"".join(sent), self._left)

    def close(self) -> None:
        super().close()
        for number in self._reading:
            self.served.client.cancel(number)
        for number, choice in self._choices.items():
            if not choice.done:
                self.served.client.cancel(number)

    def texts(self) -> list[str]:
        return [choice.text.text for choice in self._choices.values()]

    def error_event(self, error: ApiError) -> bytes:
        return b"" if self._writer is None else self._writer.error(error)

    async def _prompts(self, prompts: list[list[int]], tokenizer: Tokenizer) -> list[_Prompt]:
        """The prompts with their choices, each of which has its number from here on."""
        client, job = self.served.client, self._job
        info = client.info
        assert info is not None
        unknown = next((token for token in job.params.logit_bias if token >= info.vocab), None)
        if unknown is not None:
            raise invalid(f"logit_bias names token {unknown}; the model has {info.vocab} tokens", "logit_bias")
        told, most = job.n * sum(map(len, prompts)), self.service.limits.told_tokens
        if job.best is not None and told > most:
            message = f"log-probabilities of {most} tokens of prompts can be told at once, not of {told}: send less"
            raise invalid(message, PROMPT_FIELDS[job.endpoint])
        rewrites = self.served.rewrites
        found = []
        for p, ids in enumerate(prompts):
            check_ids(ids, info.vocab, f"prompt[{p}]" if len(prompts) > 1 else "prompt")
            if rewrites:
                check_source(job, len(ids), info.context)
            echo = None
            if job.echo or job.best is not None:
                echo = await self.service.run(TOLD_BYTES * len(ids), echo_of, job.prompts[p], ids, tokenizer)
            prompt = _Prompt(tuple(ids), echo, [])
            for c in range(job.n):
                params = choice_params(job, c, 0 if rewrites else len(ids), info.context)
                work = Submit(
                    params=params,
                    on_deadline=job.on_deadline,
                    minimum_tokens=self.minimum_tokens,
                    **self._common(prompt),
                )
                detokenizer = tokenizer.detokenizer(continues=job.endpoint == "completions")
                text = Whole(tokenizer) if rewrites else TextStream(detokenizer, params.stop)
                choice = _Choice(p * job.n + c, text, len(ids), work if job.writes else None)
                self._choices[work.id] = choice
                prompt.choices.append(choice)
            found.append(prompt)
        self._left = len(self._choices)
        return found

    def _common(self, prompt: _Prompt) -> dict[str, Any]:
        """The fields that all messages of a prompt share."""
        return {**self.shared(self._job, self.served), "prompt": prompt.tokens, "adapter": self.adapter}

    def _read(self, prompt: _Prompt) -> None:
        """Asks what the model holds of each of a prompt's tokens."""
        common = self._common(prompt) | {"prompt": prompt.tokens[:1]}
        work = Score(continuations=(prompt.tokens[1:],), best=self._job.best, **common)
        self._reading[work.id] = prompt
        self.served.client.submit(work, self.mailbox)

    async def _follow(self, prompt: _Prompt, found: Scores | None) -> bytes:
        """Writes what is known of a prompt, and has the engine go on behind it; what it computed of it is cached."""
        writer, sent = self._writer, b""
        if found is not None:
            prompt.choices[0].read = found.timings
        if prompt.echo is not None:
            assert isinstance(writer, CompletionWriter)
            told = 0 if found is None else TOLD_BYTES * len(prompt.tokens)
            ranked = None if found is None else found.ranked
            indices = [choice.index for choice in prompt.choices]
            sent += await self.service.run(told, writer.echo, indices, prompt.echo, ranked)
        for choice in prompt.choices:
            if choice.work is not None:
                self.served.client.submit(choice.work, self.mailbox)
            else:
                sent += self._finish(choice, "length", Timings(prompt_tokens=choice.prompt_tokens))
        return sent

    async def _write(self, data: bytes, left: int) -> None:
        assert self._writer is not None
        if not (data or not left):
            return
        if not self.started:
            first_ms = 1000 * (time.monotonic() - self.arrival_s)
            timed = f"tokenize;dur={self.tokenize_ms:.3f}, first_token;dur={first_ms:.3f}"
            await self.start(200, b"text/event-stream; charset=utf-8", {"server-timing": timed})
            data = self._opening + data
        if not left and self.ends:
            data += self._writer.end()
        await self.write(data, more=bool(left) or not self.ends)

    def _take(self, reply: Any) -> bytes:
        """What a message of the engine adds to the answer."""
        assert isinstance(reply, Tokens) and self._writer is not None
        choice = self._choices[reply.id]
        text, before = choice.text, choice.used
        if reply.tokens and not text.stopped:
            self._measure(choice, len(reply.tokens))
        pieces = []
        for token in reply.tokens:
            if text.stopped:
                break
            pieces.append(text.push(token))
            choice.used += 1
        logprobs: Sequence[TokenLogprob] = (reply.logprobs or ())[: choice.used - before]
        if self._job.echo and reply.end is not None and not text.stopped:  # who reads the last place finds it there
            logprobs = [*logprobs, reply.end]
        if reply.finish_reason is None:
            if text.stopped:
                self.served.client.stop(reply.id)
            return self._writer.feed(choice.index, "".join(pieces), logprobs) if pieces else b""
        pieces.append(text.finish())
        sent = self._writer.feed(choice.index, "".join(pieces), logprobs)
        reason = "stop" if text.stopped else reply.finish_reason
        return sent + self._finish(choice, reason, reply.timings or Timings())

    def _finish(self, choice: _Choice, reason: FinishReason, timings: Timings) -> bytes:
        assert self._writer is not None
        choice.done = True
        self._left -= 1
        if (read := choice.read) is not None:  # all of the prompt was computed then
            timings.queue_ms, timings.cached_tokens = read.queue_ms, read.cached_tokens
            timings.prefill_ms += read.prefill_ms + read.decode_ms
            timings.steps += read.steps
        timings.tokenize_ms = self.tokenize_ms
        timings.completion_tokens = choice.used
        timings.total_ms = 1000 * (time.monotonic() - self.arrival_s)
        if self._job.deadline_ms is not None:
            timings.deadline_ms, timings.slack_ms = self._job.deadline_ms, self._job.deadline_ms - timings.total_ms
        self.ended.append((timings, reason))
        return self._writer.finish(choice.index, reason, timings, choice.text.stopped_by)

    def _land(self) -> bytes:
        """Ends what the engine has not ended at the deadline, with what there is. ApiError: there is nothing."""
        assert self._writer is not None
        sent = b""
        for number, choice in self._choices.items():
            if choice.done:
                continue
            self.served.client.cancel(number)
            if not choice.used and not self.started and self._job.on_deadline == "partial":
                raise deadline_exceeded()
            sent += self._writer.feed(choice.index, choice.text.finish())
            sent += self._finish(choice, "deadline", Timings(prompt_tokens=choice.prompt_tokens))
        return sent

    def _refuse_unbegun(self, job: Job) -> None:
        """ApiError where a choice has no token yet, or a late answer is not wanted. One that has may be late: cut short
        it had no form."""
        if all(choice.done or choice.used for choice in self._choices.values()):
            if job.on_deadline == "error":
                raise deadline_exceeded()
            return
        predicted = predicted_ms(self.served.client.stats, time.monotonic(), self.arrival_s, 0)
        message = f"its grammar was not compiled within {job.deadline_ms:.0f} ms; allow more time, or simplify it"
        raise from_error(DeadlineError(message, predicted_ms=predicted, retry_after_s=1.0))

    def _measure(self, choice: _Choice, tokens: int) -> None:
        metrics, now = self.served.metrics, time.monotonic()
        if choice.last_s:
            for _ in range(tokens):
                metrics.inter_token.observe((now - choice.last_s) / tokens)
        else:
            metrics.first_token.observe(now - self.arrival_s)
            self.first_s = self.first_s or now
        choice.last_s = now

    def count(self, job: Job, total_s: float | None = None) -> None:
        """Counts the answer, which took `total_s` up to its last byte; unless given, that was sent now."""
        total_s = time.monotonic() - self.arrival_s if total_s is None else total_s
        slack_s = None if job.deadline_ms is None else job.deadline_ms / 1000 - total_s
        for timings, reason in self.ended:
            self.served.metrics.finish(timings, reason, total_s, slack_s)


def server_timing(ended: Sequence[tuple[Timings, str]]) -> str:
    """The header of that name (W3C Server Timing): the longest of each time."""
    names = ("queue", "tokenize", "prefill", "first_token", "decode", "total")
    longest = {name: max(getattr(timings, f"{name}_ms") for timings, _ in ended) for name in names}
    return ", ".join(f"{name};dur={value:.3f}" for name, value in longest.items())
