"""The engine loop: schedule → forward → sample → emit. Any thread may drive it; one step runs at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from millis.engine.constraint import Constraint, Matcher
from millis.engine.pooling import groups, mean_hidden
from millis.engine.prefix import Match, RadixCache
from millis.engine.request import Event, Request
from millis.engine.runner import Batch, Runner, Sampled
from millis.engine.scheduler import Chunk, Scheduler
from millis.engine.speculate import Speculator
from millis.types import FinishReason, Grammar, GrammarError, RequestError, SamplingParams, TokenLogprob


class Engine:
    """Owns the runner, the scheduler and the KV pages.

    Threads that wait for events take turns as leader: whoever finds no step under way runs the next one, for all.
    """

    def __init__(
        self,
        runner: Runner,
        eos: frozenset[int],
        clock: Callable[[], float] = time.perf_counter,
        speculator: Speculator | None = None,
        prefix_cache: bool = False,
        grammars: Callable[[Grammar], Matcher] | None = None,
    ) -> None:
        self.runner = runner
        self.eos = eos
        self.clock = clock
        self.scheduler = Scheduler(
            pages=runner.pages,
            page_tokens=runner.page_tokens,
            max_tokens=runner.max_tokens,
            max_sequences=runner.max_sequences,
        )
        if prefix_cache:
            longest = -(-runner.context // runner.page_tokens)
            most_pinned = max(0, min(runner.pages // 2, runner.pages - longest))  # the longest request still fits
            self.scheduler.prefix = RadixCache(self.scheduler.allocator, runner.page_tokens, most_pinned)
        self.speculator = speculator
        self.grammars = grammars
        self._turn = threading.Condition(threading.Lock())
        self._stepping = False
        self._step_s = 0.0  # how long the latest step of decodes took

    @property
    def room(self) -> int:
        """Tokens of the longest sequence: what the context and the KV cache hold."""
        return min(self.runner.context, self.runner.pages * self.runner.page_tokens)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        arrival_s: float | None = None,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> Request:
        """Queues a prompt; it may use what is cached of the same tenant's.

        RequestError: it is empty, holds an unknown token, or does not fit the context. GrammarError: its grammar is
        malformed, not supported, or beyond a limit.
        """
        tokens = self._checked(prompt)
        room = self.room
        if len(tokens) >= room:
            raise RequestError(f"the prompt has {len(tokens)} tokens; the context holds {room}, the answer included")
        request = Request(
            prompt_tokens=len(tokens),
            tokens=tokens,
            params=params,
            sampler=self.runner.sampler(params, tokens),
            limit=min(room, len(tokens) + params.max_tokens),
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            deadline_s=deadline_s,
            tenant=tenant,
        )
        request.timings.prompt_tokens = len(tokens)
        forced = self._constrain(request)
        with self._turn:
            self.scheduler.add(request)
            self._follow(request, forced)
        return request

    def _constrain(self, request: Request) -> list[int]:
        """Makes a request's constraint, where it has a grammar; returns what every answer begins with."""
        params = request.params
        if params.grammar is None:
            return []
        if self.grammars is None:
            raise GrammarError("this engine was made without grammars")
        request.constraint = Constraint(self.grammars(params.grammar), request.sampler, jump=params.logprobs is None)
        return request.constraint.begin()

    def events(self, request: Request) -> Iterator[Event]:
        """The request's events, up to and including its last; closing the iterator early cancels the request."""
        try:
            while True:
                with self._turn:
                    while self._stepping and not request.inbox:
                        self._turn.wait()
                    if not request.inbox and request.error is None:
                        self._stepping = True
                if request.error is not None:
                    raise request.error
                if request.inbox:
                    event = request.inbox.popleft()
                    yield event
                    if event.finish_reason is not None:
                        return
                else:
                    self._lead()
        finally:
            self._leave(request)

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """Ends a request between steps and frees its pages; does nothing to one that has ended."""
        with self._turn:
            while self._stepping:
                self._turn.wait()
            if request.finish_reason is None:
                self._finish(request, reason, None)

    def _leave(self, request: Request) -> None:
        """Ends a request whose reader has gone: at once where that needs no waiting, otherwise before the next step.

        The garbage collector may close `events` in the middle of a step, on the very thread that runs it.
        """
        request.abandoned = True
        if self._turn.acquire(blocking=False):
            try:
                if not self._stepping and request.finish_reason is None:
                    self._finish(request, "cancelled", None)
            finally:
                self._turn.release()

    def step(self) -> None:
        """One forward over everything scheduled. Callers outside `events` must be alone with the engine."""
        with self._turn:
            self._drop_late()
            decoding = self.scheduler.decoding()
        if self.speculator is not None:
            self.speculator.propose(decoding)
        with self._turn:
            chunks = self.scheduler.schedule()
        self._copy_pages()
        if not chunks:
            return
        begin = self.clock()
        for chunk in chunks:
            chunk.request.timings.steps += 1
            if chunk.request.first_step_s is None:
                chunk.request.first_step_s = begin
        sampled = self.runner.step(batch_of(chunks), [c.request.sampler if c.last else None for c in chunks])
        now = self.clock()
        if self.speculator is not None:
            self.speculator.observe(chunks, sampled.tokens, 1000 * (now - begin))
        drafted = any(chunk.drafts for chunk in chunks)
        self._step_s = min(self._step_s, now - begin) if drafted else now - begin
        with self._turn:
            self._emit(chunks, sampled, now)

    def score(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, tenant: str = "") -> list[float]:
        """For each continuation, the summed log-probability (nats) of its tokens after the prompt.

        The prompt is computed once; every continuation then overwrites the cache's positions behind it.
        """
        prompt = self._checked(prompt)
        checked = [self._checked(continuation) for continuation in continuations]
        longest = len(prompt) + max((len(c) for c in checked), default=0)
        if longest > self.runner.context:
            raise RequestError(
                f"prompt and continuation have {longest} tokens; the context holds {self.runner.context}"
            )
        with self._turn:
            while self._stepping:
                self._turn.wait()
            match, pages = self._begin(tenant, prompt, longest)
            try:
                self._prefill(pages, match.tokens, prompt[:-1])
                if self.scheduler.prefix is not None:
                    self.scheduler.prefix.record(match, len(prompt))
                    self.scheduler.prefix.insert(tenant, prompt[:-1], pages)
                return [self._score_run(pages, len(prompt) - 1, [prompt[-1], *c[:-1]], c) for c in checked]
            finally:
                self.scheduler.allocator.give(pages)

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[N, width] the mean of each prompt's final hidden states. RequestError: one does not fit.

        Other requests may take steps between two groups of prompts that run together.
        """
        checked = [self._checked(prompt) for prompt in prompts]
        longest = max(len(prompt) for prompt in checked)
        if longest > self.room:
            raise RequestError(f"a prompt has {longest} tokens; the context holds {self.room}")
        means = []
        for group in groups(checked, self.runner, self.runner.pages // 2):
            with self._turn:
                while self._stepping:
                    self._turn.wait()
                pages = self._pages_for(
                    sum(-(-len(p) // self.runner.page_tokens) for p in group) * self.runner.page_tokens
                )
                try:
                    means.append(mean_hidden(self.runner, group, pages))
                finally:
                    self.scheduler.allocator.give(pages)
        return np.concatenate(means)

    def pin(self, tokens: Sequence[int], tenant: str = "") -> int:
        """Computes the beginning of prompts to come and keeps it for ever; returns how many of its tokens.

        It serves `tenant`, or everybody where that is empty: what the operator pins is no secret, and whoever sends it
        can tell by timing that it is cached. RequestError: no prefix cache, a bad prompt, or no room: pinned pages may
        take half of the KV cache, and must leave room for the longest request.
        """
        prefix, tokens, salt = self.scheduler.prefix, self._checked(tokens), tenant or None
        if prefix is None:
            raise RequestError("there is no prefix cache to pin to; load the model with prefix_cache=True")
        if len(tokens) >= self.runner.context:
            raise RequestError(f"a prefix of {len(tokens)} tokens leaves no room in a context of {self.runner.context}")
        with self._turn:
            while self._stepping:
                self._turn.wait()
            wanted = prefix.pinned_pages + prefix.unpinned(salt, tokens)
            if wanted > prefix.most_pinned:
                raise RequestError(
                    f"pinned prefixes would take {wanted} pages of {self.runner.page_tokens} tokens; "
                    f"{prefix.most_pinned} may be pinned: raise cache_tokens"
                )
            match, pages = self._begin(salt, tokens, len(tokens))
            try:
                self._prefill(pages, match.tokens, tokens)
                return prefix.pin(salt, tokens, pages)
            finally:
                self.scheduler.allocator.give(pages)

    def _begin(self, tenant: str | None, tokens: list[int], room: int) -> tuple[Match, list[int]]:
        """Pages for `room` positions outside any step, the first of them holding what is cached of `tokens`."""
        prefix = self.scheduler.prefix
        if prefix is None:
            return Match(), self._pages_for(room)
        match = prefix.find(tenant, tokens)
        pages = prefix.hold(match)
        try:
            pages += self._pages_for(room - len(pages) * self.runner.page_tokens)
        except BaseException:
            self.scheduler.allocator.give(pages)
            raise
        if match.partial is not None:
            self.scheduler.copies.append((match.partial.page, pages[len(match.nodes)]))
        self._copy_pages()
        return match, pages

    def _copy_pages(self) -> None:
        copies = self.scheduler.copies
        while copies:  # an interrupt here repeats at most the copy it met
            self.runner.copy_page(*copies[0])
            copies.popleft()

    def _prefill(self, pages: list[int], start: int, tokens: list[int]) -> None:
        """Computes tokens[start:] into `pages`."""
        self._score_run(pages, start, tokens[start:], [-1] * (len(tokens) - start))

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        for token in ids:
            if not 0 <= token < self.runner.vocab:
                raise RequestError(f"token {token} is not in the vocabulary of {self.runner.vocab}")
        return ids

    def _pages_for(self, tokens: int) -> list[int]:
        count = -(-tokens // self.runner.page_tokens)
        pages = self.scheduler.allocator.take(count) if self.scheduler.reclaim(count) else None
        if pages is None:
            raise RequestError(
                f"{tokens} tokens do not fit the KV cache of {self.runner.pages} pages; raise cache_tokens"
            )
        return pages

    def _score_run(self, pages: list[int], start: int, tokens: list[int], targets: list[int]) -> float:
        total = 0.0
        for at in range(0, len(tokens), self.runner.max_tokens):
            part = tokens[at : at + self.runner.max_tokens]
            batch = Batch(_ints(part), _ints([start + at]), _ints([len(part)]), _ints([pages]))
            total += float(self.runner.score(batch, _ints(targets[at : at + len(part)])).sum(dtype=np.float64))
        return total

    def _lead(self) -> None:
        """Runs a step as the leader. A failure ends its requests; an interrupt leaves them to be computed anew."""
        try:
            self.step()
        except Exception as error:
            with self._turn:
                for request in list(self.scheduler.running):
                    request.error = error
                    self._finish(request, "cancelled", None)
            raise
        except BaseException:
            with self._turn:
                for request in list(self.scheduler.running):
                    self.scheduler.preempt(request)
            raise
        finally:
            with self._turn:
                self._stepping = False
                self._turn.notify_all()

    def _drop_late(self) -> None:
        """Ends the requests that nobody waits for and those whose next token would come after their deadline."""
        due = self.clock() + self._step_s
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.abandoned:
                self._finish(request, "cancelled", None)
            elif request.deadline_s is not None and due > request.deadline_s:
                self._land(request)

    def _land(self, request: Request) -> None:
        """Ends a request whose time is up; an answer of a grammar is made whole, without the model."""
        closing = None if request.constraint is None else request.constraint.closing()
        for token in closing or ():
            request.tokens.append(token)
            request.inbox.append(Event(token))
        self._finish(request, "deadline", None)

    def _emit(self, chunks: list[Chunk], sampled: Sampled, now: float) -> None:
        for chunk, tokens, logprobs in zip(chunks, sampled.tokens, sampled.logprobs, strict=True):
            request = chunk.request
            # [0, computed) hold the keys of the request's own tokens; behind them lie those of wrong drafts.
            request.computed = chunk.start + chunk.length + max(0, len(tokens) - 1)
            if not chunk.last:
                continue
            if request.first_token_s is None:
                self.scheduler.publish(request)
                request.first_token_s = now
            request.last_token_s = now
            request.timings.drafted_tokens += len(chunk.drafts)
            request.timings.accepted_tokens += len(tokens) - 1
            for token, logprob in zip(tokens, logprobs, strict=True):
                self._emit_token(request, token, logprob)
                if request.finish_reason is not None:
                    break

    def _emit_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        if token in self.eos and not request.params.ignore_eos:
            self._finish(request, "stop", None)
            return
        forced: list[int] = []
        if request.constraint is not None:
            try:
                forced = request.constraint.advance(token)
            except GrammarError as error:
                request.error = error
                self._finish(request, "cancelled", None)
                return
        self._append(request, token, logprob, whole=not forced)
        self._follow(request, forced)

    def _follow(self, request: Request, forced: Sequence[int]) -> None:
        """Emits what a grammar forces: tokens that the model need not choose, computed with the next step."""
        for i, token in enumerate(forced):
            if request.finish_reason is None:
                self._append(request, token, None, whole=i == len(forced) - 1)

    def _append(self, request: Request, token: int, logprob: TokenLogprob | None, *, whole: bool) -> None:
        """Emits one more token, the last where the limit is reached or a grammar has come to its end."""
        request.tokens.append(token)
        if whole and request.constraint is not None and request.constraint.stopped:
            self._finish(request, "stop", token, logprob)
        elif len(request.tokens) >= request.limit:
            self._finish(request, "length", token, logprob)
        else:
            request.inbox.append(Event(token, logprob))

    def _finish(
        self, request: Request, reason: FinishReason, token: int | None, logprob: TokenLogprob | None = None
    ) -> None:
        self.scheduler.remove(request)
        if self.speculator is not None:
            self.speculator.forget(request)
        request.finish(reason, self.clock())
        request.inbox.append(Event(token, logprob, reason))


def batch_of(chunks: Sequence[Chunk]) -> Batch:
    """The arrays of a step: one sequence a chunk, page tables padded with −1."""
    width = max(len(chunk.request.pages) for chunk in chunks)
    tables = np.full((len(chunks), width), -1, np.int32)
    tokens: list[int] = []
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.request.pages)] = chunk.request.pages
        tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.length]
        tokens += chunk.drafts
    return Batch(
        _ints(tokens),
        _ints([chunk.start for chunk in chunks]),
        _ints([chunk.length + len(chunk.drafts) for chunk in chunks]),
        tables,
        _ints([len(chunk.drafts) for chunk in chunks]),
    )


def _ints(values: Sequence[int] | Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)
