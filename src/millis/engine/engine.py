"""The engine loop: schedule → forward → sample → emit. Any thread may drive it; one step runs at a time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from millis.engine.adapters import Adapter
from millis.engine.batches import batch_of, score_part, tree_batch
from millis.engine.calibrate import calibrate
from millis.engine.constraint import Constraint, Matcher
from millis.engine.embedding import Embedding
from millis.engine.gate import Gate
from millis.engine.keeper import Keeper
from millis.engine.load import Counters, Load
from millis.engine.outcomes import Outcomes
from millis.engine.pinning import copy_pages, pin
from millis.engine.predict import StepModel
from millis.engine.prefix import RadixCache
from millis.engine.request import Event, Request, Score
from millis.engine.runner import Runner, Sampled
from millis.engine.scheduler import Scheduler
from millis.engine.scoring import edges_of
from millis.engine.speculate import Speculator
from millis.engine.tree import parts
from millis.engine.turn import Turn
from millis.types import (
    DeadlineError,
    FinishReason,
    Grammar,
    GrammarError,
    OnDeadline,
    Priority,
    RequestError,
    SamplingParams,
    closed_error,
)

SENTENCE_TOKENS = 16  # of the shortest useful answer, where the caller does not say
PROBE_S = 0.5  # between two probes
PROBE_TOKENS = 2  # that one writes


class Engine:
    """Owns the runner, the scheduler and the KV pages.

    Threads that wait for events take turns as leader: whoever finds no step under way runs the next one, for all. A
    server calls `step` in a loop of its own instead; `submit`, `cancel` and `load` may be called meanwhile.

    delivery_ms: what passes between an answer's last event and its reader; deadlines are kept so much earlier.
    max_gap_ms, max_step_ms, max_waiting: see EngineConfig. sentence_ends: tokens after which a text may end.
    clock: seconds; the default is one that all processes of a machine share.
    """

    def __init__(
        self,
        runner: Runner,
        eos: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
        speculator: Speculator | None = None,
        *,
        prefix_cache: bool = False,
        grammars: Callable[[Grammar], Matcher] | None = None,
        delivery_ms: float = 0.0,
        max_gap_ms: float = math.inf,
        max_step_ms: float | None = None,
        max_waiting: int = 1024,
        sentence_ends: frozenset[int] = frozenset(),
    ) -> None:
        self.runner = runner
        self.clock = clock
        self.costs = StepModel()
        self.scheduler = Scheduler(
            pages=runner.pages,
            page_tokens=runner.page_tokens,
            max_tokens=runner.max_tokens,
            max_sequences=runner.max_sequences,
            costs=self.costs,
            max_gap_ms=max_gap_ms,
            max_step_ms=math.inf if max_step_ms is None else max_step_ms,
        )
        self._caching = prefix_cache
        if prefix_cache:
            self._make_cache()
        self.speculator = speculator
        self.grammars = grammars
        self.counters = Counters()
        self.turn = Turn()
        self._gate = Gate(
            self.scheduler, self.counters, self.turn, clock, delivery_ms=delivery_ms, max_waiting=max_waiting
        )
        self._outcomes = Outcomes(runner, self.scheduler, self.counters, clock, speculator, eos, sentence_ends)
        self._keeper = Keeper(self.turn, self.counters)
        self._probed_s = -math.inf  # when `probe` last did
        self._closed = False

    def close(self) -> None:
        """Ends all requests after the step under way, and takes no other. Scores that lack values are an error."""
        with self.turn.whole():
            self._closed = True
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                if request.score is not None:
                    request.error = closed_error()
                self._outcomes.finish(request, "cancelled")

    @property
    def sentence_ends(self) -> frozenset[int]:
        """Tokens after which a text may end when its time is up."""
        return self._outcomes.sentence_ends

    @sentence_ends.setter
    def sentence_ends(self, tokens: frozenset[int]) -> None:
        self._outcomes.sentence_ends = tokens

    def _make_cache(self) -> None:
        longest = -(-self.runner.context // self.runner.page_tokens)
        most_pinned = max(0, min(self.runner.pages // 2, self.runner.pages - longest))  # the longest request still fits
        self.scheduler.prefix = RadixCache(self.scheduler.allocator, self.runner.page_tokens, most_pinned)

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
        asked_ms: float | None = None,
        priority: Priority = "standard",
        tenant: str = "",
        on_deadline: OnDeadline = "partial",
        minimum_tokens: int | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """Queues a prompt. Times are on the engine's clock; `minimum_tokens` are those of the shortest useful answer.
        asked_ms: the deadline that a refusal names, where the caller keeps some of it for what is behind the engine.

        RequestError: it is empty, holds an unknown token, or does not fit the context. GrammarError: its grammar is
        malformed, not supported, or beyond a limit. DeadlineError: not even the shortest useful answer would be done by
        the deadline, given what is promised to others. OverloadError: too many wait.
        """
        tokens = self._checked(prompt)
        room = self.room
        if len(tokens) >= room:
            raise RequestError(f"the prompt has {len(tokens)} tokens; the context holds {room}, the answer included")
        if minimum_tokens is None:
            minimum_tokens = SENTENCE_TOKENS if params.grammar is None else 1
        limit = min(room, len(tokens) + params.max_tokens)
        request = Request(
            prompt_tokens=len(tokens),
            tokens=tokens,
            params=params,
            sampler=None,
            limit=limit,
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            deadline_s=deadline_s,
            asked_ms=asked_ms,
            priority=priority,
            tenant=tenant,
            on_deadline=on_deadline,
            adapter=adapter,
            minimum=max(1, min(minimum_tokens, limit - len(tokens))),
            caches=self._caching,
        )
        request.timings.prompt_tokens = len(tokens)
        if params.grammar is None:
            with self.turn:
                self._queue(request)
            return request
        with self.turn:  # a grammar is compiled for those only that may be in time
            self._gate.check_early(request)
        request.sampler = self.runner.sampler(params, tokens)
        forced = self._constrain(request, params.grammar)
        with self.turn:
            self._queue(request)
            self._outcomes.follow(request, forced)
        return request

    def _constrain(self, request: Request, grammar: Grammar) -> list[int]:
        """Makes a request's constraint; returns what every answer begins with."""
        if self.grammars is None:
            raise GrammarError("this engine was made without grammars")
        jump = request.params.logprobs is None
        request.constraint = Constraint(self.grammars(grammar), request.sampler, jump=jump)
        return request.constraint.begin()

    def submit_score(
        self,
        prompt: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        arrival_s: float | None = None,
        deadline_s: float | None = None,
        asked_ms: float | None = None,
        priority: Priority = "standard",
        tenant: str = "",
        cache: bool = False,
        adapter: Adapter | None = None,
        best: int | None = None,
    ) -> Request:
        """Queues the scoring of continuations; `request.score.values` grows with them, in their order. See `submit`.

        A continuation's value is the summed log-probability (nats) of its tokens after the prompt. What is not
        cached of the prompt and a tree of all continuations run in one forward where a step holds them, or in several.
        With a deadline that leaves no time for them whole, `request.score.depth` tokens of each are counted.

        cache: keep the prompt for those that begin alike, even where the engine was made without a prefix cache.
        best: so many likely tokens are told of each place of the only continuation, in `request.score.ranked`.
        """
        tokens = self._checked(prompt)
        checked = tuple(tuple(self._checked(continuation)) for continuation in continuations)
        longest = len(tokens) + max((len(c) for c in checked), default=0)
        if longest > self.runner.context:
            raise RequestError(
                f"prompt and continuation have {longest} tokens; the context holds {self.runner.context}: shorten it"
            )
        if longest > self.runner.pages * self.runner.page_tokens:
            raise RequestError(
                f"{longest} tokens do not fit the KV cache of {self.runner.pages} pages; raise cache_tokens"
            )
        slots = self.runner.pages * self.runner.page_tokens - len(tokens)
        if best is None:
            score = Score(checked, list(parts(checked, min(self.runner.max_tokens - 1, slots))))
        else:
            assert len(checked) == 1
            score = Score(checked, [(1, None)], best=best)
        nodes = max((len(tree.tokens) for _, tree in score.parts if tree is not None), default=0)
        request = Request(
            prompt_tokens=len(tokens),
            tokens=tokens,
            params=SamplingParams(),
            sampler=None,
            limit=max(longest, len(tokens) + nodes),
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            deadline_s=deadline_s,
            asked_ms=asked_ms,
            priority=priority,
            tenant=tenant,
            adapter=adapter,
            score=score,
            caches=cache or self._caching,
        )
        request.timings.prompt_tokens = len(tokens)
        with self.turn:
            if cache and self.scheduler.prefix is None:
                self._make_cache()
            self._queue(request)
            if not checked:
                self._outcomes.finish(request, "stop")
        return request

    def score(
        self,
        prompt: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        tenant: str = "",
        adapter: Adapter | None = None,
    ) -> list[float]:
        """For each continuation, the summed log-probability (nats) of its tokens after the prompt."""
        request = self.submit_score(prompt, continuations, tenant=tenant, adapter=adapter)
        self.wait(request)
        assert request.score is not None
        return request.score.values

    def wait(self, request: Request) -> None:
        """Until the request has ended; its events are taken."""
        if request.finish_reason is None or request.inbox or request.error is not None:
            for _ in self.events(request):
                pass

    def events(self, request: Request) -> Generator[Event, None, None]:
        """The request's events, up to and including its last; closing the iterator early cancels the request."""
        try:
            while True:
                with self.turn:
                    self.turn.take(lambda: bool(request.inbox) or request.error is not None)
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

    def keep(self, request: Request) -> None:
        """Goes on with a request that has a deadline while its reader does something else; a thread sees to it."""
        if request.due_s is not None:
            self._keeper.keep(request, self._lead)

    def cancel(self, request: Request, reason: FinishReason = "cancelled", *, wait: bool = True) -> None:
        """Ends a request and frees its pages; does nothing to one that has ended.

        It waits for the step under way. wait=False: it does not, and then the request ends before the next step.
        """
        with self.turn:
            if not wait and self.turn.taken:
                request.abandoned, request.ending = True, reason
            elif self.turn.take(lambda: request.finish_reason is not None):
                try:
                    self._outcomes.finish(request, reason)
                finally:
                    self.turn.give()

    def _leave(self, request: Request) -> None:
        """Ends a request whose reader has gone: at once where that needs no waiting, otherwise before the next step.

        The garbage collector may close `events` in the middle of a step, on the very thread that runs it.
        """
        request.abandoned = True
        if self.turn.acquire(blocking=False):
            try:
                if not self.turn.taken and request.finish_reason is None:
                    self._outcomes.finish(request, "cancelled")
            finally:
                self.turn.release()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def load(self) -> Load:
        """What is going on, and what was counted since the start."""
        with self.turn:
            predicted_ms, actual_ms = self.costs.latest()
            return Load(
                running=len(self.scheduler.running),
                waiting=len(self.scheduler.waiting),
                pages=self.runner.pages,
                free_pages=self.scheduler.allocator.free,
                preemptions=self.scheduler.preemptions,
                backlog_ms=self.scheduler.backlog_ms(),
                step_predicted_ms=predicted_ms,
                step_actual_ms=actual_ms,
                median_error=self.costs.median_error(),
                margin_ms=self.costs.margin_ms,
                counters=self.counters.copy(),
            )

    def calibrate(self, *, budget_s: float = 1.5, quick: bool = False) -> None:
        """Measures what steps take here, for deadlines, in about `budget_s` at most; quick: a handful of steps."""
        with self.turn.whole():
            pages = self.scheduler.allocator.take(self.scheduler.allocator.free)
            if not pages:
                return
            try:
                calibrate(self.costs, self.runner, self.clock, pages, budget_s=budget_s, quick=quick)
            finally:
                self.scheduler.allocator.give(pages)

    @property
    def wants_probe(self) -> bool:
        """Whether `probe` would compute anything now."""
        doubted = self._gate.doubted and self.clock() >= self._probed_s + PROBE_S
        return (doubted or self._gate.missed.wanted is not None) and not self.has_work and not self._closed

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Around the submitting of a request: one that is refused lets the engine see what steps take by now."""
        try:
            yield
        except DeadlineError:
            if self.wants_probe:
                threading.Thread(target=self.probe, name="probe", daemon=True).start()
            raise

    def probe(self) -> bool:
        """Computes something for nobody, if a request was refused although nothing ran; whether it did.

        What steps take is learned from those that run: while all is refused, a busy moment would be believed for ever;
        so once in PROBE_S seconds at most. And what refused prompts have in common is cached: with it, the next may be
        in time. It gives way to whoever comes.
        """
        with self.turn:
            if not self.wants_probe:
                return False
            missed, self._gate.missed.wanted = self._gate.missed.wanted, None
            self._gate.doubted, self._probed_s = False, self.clock()
        most = max(1, self.room - PROBE_TOKENS)
        rows = max(1, min(self.costs.chunk, most))
        if missed is None:
            self._compute_for_nobody([0] * rows, "", caches=False)
            return True
        request, shared = missed
        prompt = request.tokens[: min(shared, most)]
        for end in (*range(rows, len(prompt), rows), len(prompt)):  # a chunk at a time, for others may come
            if not self._compute_for_nobody(prompt[:end], request.tenant, caches=True):
                break
        return True

    def _compute_for_nobody(self, prompt: list[int], tenant: str, *, caches: bool) -> bool:
        """A prompt and PROBE_TOKENS tokens behind it; False: it gave way to another request."""
        params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=0, ignore_eos=True)
        probe = self.submit(prompt, params, priority="batch", tenant=tenant)
        probe.caches = caches
        while probe.finish_reason is None:
            if len(self.scheduler.running) + len(self.scheduler.waiting) > 1:
                self.cancel(probe)
            else:
                self.step()
        return probe.finish_reason != "cancelled"

    def step(self) -> bool:
        """One forward over everything scheduled; false when there was nothing to compute.

        A failure ends the requests that were running and is raised.
        """
        with self.turn:
            self.turn.take()
        return self._lead()

    def _lead(self) -> bool:
        """Runs a step as the leader. A failure ends its requests; an interrupt leaves them to be computed anew."""
        try:
            return self._step()
        except Exception as error:
            with self.turn:
                for request in list(self.scheduler.running):
                    request.error = error
                    self._outcomes.finish(request, "cancelled")
            raise
        except BaseException:
            with self.turn:
                for request in list(self.scheduler.running):
                    self.scheduler.preempt(request)
            raise
        finally:
            with self.turn:
                self.turn.give()

    def _step(self) -> bool:
        with self.turn:
            self._outcomes.drop_late()
            decoding = self.scheduler.decoding()
        if self.speculator is not None:
            self.speculator.propose(decoding)
        with self.turn:
            begin = self.clock()
            chunks = self.scheduler.schedule(begin)
            copy_pages(self.runner, self.scheduler)
            if not chunks:
                return False
            if any(chunk.request.adapter for chunk in chunks):  # those that share one pass over it together
                chunks.sort(key=lambda chunk: chunk.request.adapter.number if chunk.request.adapter else 0)
            predicted_ms = self.costs.ms(self.scheduler.work)
            self._gate.free_s = begin + predicted_ms / 1000
            self._outcomes.approach(chunks, begin, predicted_ms)
        for chunk in chunks:
            chunk.request.timings.steps += 1
            if chunk.request.first_step_s is None:
                chunk.request.first_step_s = begin
        if chunks[0].tree is not None:
            values, sampled = self.runner.score_tree(*tree_batch(chunks)), Sampled([], [])
        elif chunks[0].scores:
            found, sampled = score_part(self.runner, chunks[0]), Sampled([], [])
        else:
            sampled = self.runner.step(batch_of(chunks), [c.request.sampler if c.last else None for c in chunks])
        now = self.clock()
        took_ms = 1000 * (now - begin)
        if self.speculator is not None and not chunks[0].scores:
            self.speculator.observe(chunks, sampled.tokens, took_ms)
        with self.turn:
            self.costs.observe(self.scheduler.work, predicted_ms, took_ms)
            self.counters.steps += 1
            if chunks[0].tree is not None:
                for chunk, some in zip(chunks, edges_of(chunks, values), strict=True):
                    self._outcomes.take_tree(chunk, some, now)
            elif chunks[0].scores:
                self._outcomes.take_scores(chunks[0], found, now)
            else:
                self._outcomes.emit(chunks, sampled, now)
        return True

    def _queue(self, request: Request) -> None:
        """Admits a request or refuses it, before any of it is computed."""
        if self._closed:
            raise closed_error()
        self._gate.check(request)
        if request.score is None and request.sampler is None:
            request.sampler = self.runner.sampler(request.params, request.tokens)
        self.scheduler.add(request)
        self.counters.admitted += 1
        if request.adapter is not None:
            request.adapter.users += 1

    def pin(self, tokens: Sequence[int], tenant: str = "") -> int:
        """Computes the beginning of prompts to come and keeps it for ever; returns how many of its tokens.

        It serves `tenant`, or everybody where that is empty: what the operator pins is no secret, and whoever sends it
        can tell by timing that it is cached. RequestError: no prefix cache, a bad prompt, or no room: pinned pages may
        take half of the KV cache, and must leave room for the longest request.
        """
        prefix, tokens, salt = self.scheduler.prefix, self._checked(tokens), tenant or None
        if prefix is None or not self._caching:
            raise RequestError("there is no prefix cache to pin to; load the model with prefix_cache=True")
        if len(tokens) >= self.runner.context:
            raise RequestError(f"a prefix of {len(tokens)} tokens leaves no room in a context of {self.runner.context}")
        with self.turn.whole():
            return pin(self.runner, self.scheduler, prefix, tokens, salt)

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[N, width] the mean of each prompt's final hidden states. RequestError: one does not fit.

        Other requests may take steps between two pieces.
        """
        embedding = self.embedding(prompts)
        try:
            while not embedding.whole:
                if not embedding.step():  # others go first
                    self.step()
        finally:
            embedding.close()
        return embedding.vectors

    def embedding(self, prompts: Sequence[Sequence[int]]) -> Embedding:
        """As `embed`, for a caller that reads a piece at a time."""
        if self._closed:
            raise closed_error()
        checked = [self._checked(prompt) for prompt in prompts]
        longest = max(len(prompt) for prompt in checked)
        if longest > self.room:
            raise RequestError(f"a prompt has {longest} tokens; the context holds {self.room}")
        return Embedding(checked, self.runner, self.scheduler, self.turn, self.clock)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self.runner.vocab:
            token = next(token for token in ids if not 0 <= token < self.runner.vocab)
            raise RequestError(f"token {token} is not in the vocabulary of {self.runner.vocab}")
        return ids
