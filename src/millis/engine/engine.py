"""The engine loop: schedule → forward → sample → emit. Any thread may drive it; one step runs at a time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.engine.adapters import Adapter, natives
from millis.engine.calibrate import calibrate
from millis.engine.constraint import Constraint, Matcher
from millis.engine.landing import EPSILON_MS, Stage, stage
from millis.engine.load import Counters, Load
from millis.engine.pooling import groups, mean_hidden
from millis.engine.predict import StepModel
from millis.engine.prefix import RadixCache
from millis.engine.promises import Verdict
from millis.engine.request import Event, Request, Score
from millis.engine.runner import Batch, Runner, Sampled
from millis.engine.scheduler import Chunk, Scheduler
from millis.engine.scoring import edges_of, path_sums, tree_batch
from millis.engine.speculate import Speculator
from millis.engine.tree import parts
from millis.types import (
    DeadlineError,
    FinishReason,
    Grammar,
    GrammarError,
    ModelError,
    OnDeadline,
    OverloadError,
    Priority,
    RequestError,
    SamplingParams,
    TokenLogprob,
)

SENTENCE_TOKENS = 16  # of the shortest useful answer, where the caller does not say
RESERVE = 4.0  # requests like its own for which a tenant that has had its share leaves room
PROBE_S = 0.5  # between two probes
PROBE_TOKENS = 2  # that one writes
KEEPER_S = 0.005  # for which nobody computes, while a deadline runs, before its keeper does
NEVER_S = 60.0  # when to try again what would be late on an idle engine, too


class Engine:
    """Owns the runner, the scheduler and the KV pages.

    Threads that wait for events take turns as leader: whoever finds no step under way runs the next one, for all. A
    server calls `step` in a loop of its own instead; `submit`, `cancel` and `load` may be called meanwhile.

    delivery_ms: what passes between an answer's last event and its reader; deadlines are kept so much earlier.
    max_gap_ms, max_step_ms, max_waiting: see EngineConfig. sentence_ends: tokens after which a text may end.
    """

    def __init__(
        self,
        runner: Runner,
        eos: frozenset[int],
        clock: Callable[[], float] = time.perf_counter,
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
        self.eos = eos
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
        self.sentence_ends = sentence_ends
        self.counters = Counters()
        self._delivery_ms = delivery_ms
        self._max_waiting = max_waiting
        self._turn = threading.Condition(threading.Lock())
        self._stepping = False  # a thread uses the runner
        self._line: deque[object] = deque()  # those that want to, who came first at the front
        self._kept: list[Request] = []
        self._keeper: threading.Thread | None = None
        self._free_s = -math.inf  # when the step under way is thought to end
        self._doubted, self._probed_s = False, -math.inf  # a request was refused although nothing ran; the last probe

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
        priority: Priority = "standard",
        tenant: str = "",
        on_deadline: OnDeadline = "partial",
        minimum_tokens: int | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """Queues a prompt. Times are on the engine's clock; `minimum_tokens` are those of the shortest useful answer.

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
            priority=priority,
            tenant=tenant,
            on_deadline=on_deadline,
            adapter=adapter,
            minimum=max(1, min(minimum_tokens, limit - len(tokens))),
            caches=self._caching,
        )
        request.timings.prompt_tokens = len(tokens)
        if params.grammar is None:
            with self._turn:
                self._queue(request)
            return request
        with self._turn:  # a grammar is compiled for those only that may be in time
            self._refuse_overload()
            self._refuse_hopeless(request)
        request.sampler = self.runner.sampler(params, tokens)
        forced = self._constrain(request, params.grammar)
        with self._turn:
            self._queue(request)
            self._follow(request, forced)
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
        priority: Priority = "standard",
        tenant: str = "",
        cache: bool = False,
        adapter: Adapter | None = None,
    ) -> Request:
        """Queues the scoring of continuations; `request.score.values` grows with them, in their order. See `submit`.

        A continuation's value is the summed log-probability (nats) of its tokens after the prompt. What is not
        cached of the prompt and a tree of all continuations run in one forward where a step holds them, or in several.
        With a deadline that leaves no time for them whole, `request.score.depth` tokens of each are counted.

        cache: keep the prompt for those that begin alike, even where the engine was made without a prefix cache.
        """
        tokens = self._checked(prompt)
        checked = tuple(tuple(self._checked(continuation)) for continuation in continuations)
        longest = len(tokens) + max((len(c) for c in checked), default=0)
        if longest > self.runner.context:
            raise RequestError(
                f"prompt and continuation have {longest} tokens; the context holds {self.runner.context}"
            )
        if longest > self.runner.pages * self.runner.page_tokens:
            raise RequestError(
                f"{longest} tokens do not fit the KV cache of {self.runner.pages} pages; raise cache_tokens"
            )
        slots = self.runner.pages * self.runner.page_tokens - len(tokens)
        score = Score(checked, list(parts(checked, min(self.runner.max_tokens - 1, slots))))
        nodes = max((len(tree.tokens) for _, tree in score.parts if tree is not None), default=0)
        request = Request(
            prompt_tokens=len(tokens),
            tokens=tokens,
            params=SamplingParams(),
            sampler=None,
            limit=max(longest, len(tokens) + nodes),
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            deadline_s=deadline_s,
            priority=priority,
            tenant=tenant,
            adapter=adapter,
            score=score,
            caches=cache or self._caching,
        )
        request.timings.prompt_tokens = len(tokens)
        with self._turn:
            if cache and self.scheduler.prefix is None:
                self._make_cache()
            self._queue(request)
            if not checked:
                self._finish(request, "stop", None)
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
                with self._turn:
                    self._line_up(lambda: bool(request.inbox) or request.error is not None)
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
        if request.due_s is None:
            return
        with self._turn:
            self._kept.append(request)
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
                self._keeper.start()

    def _keep(self) -> None:
        """Steps whenever nobody else does, until no kept request is left."""
        seen = -1  # steps that had been taken when nobody computed KEEPER_S ago
        while True:
            with self._turn:
                self._kept = [one for one in self._kept if one.finish_reason is None and not one.abandoned]
                if not self._kept:
                    self._keeper = None
                    return
                idle = not self._stepping and not self._line
                steps = idle and seen == self.counters.steps
                seen = self.counters.steps if idle else -1
                self._stepping = self._stepping or steps
            if steps:
                with suppress(Exception):  # its requests have it, for their readers
                    self._lead()
                steps, seen = seen != self.counters.steps, self.counters.steps  # the next one follows at once
            if not steps:
                time.sleep(KEEPER_S)

    def cancel(self, request: Request, reason: FinishReason = "cancelled", *, wait: bool = True) -> None:
        """Ends a request and frees its pages; does nothing to one that has ended.

        It waits for the step under way. wait=False: it does not, and then the request ends before the next step.
        """
        with self._turn:
            if not wait and self._stepping:
                request.abandoned, request.ending = True, reason
            elif self._line_up(lambda: request.finish_reason is not None):
                try:
                    self._finish(request, reason, None)
                finally:
                    self._give_way()

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

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def load(self) -> Load:
        """What is going on, and what was counted since the start."""
        with self._turn:
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
        with self._whole():
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
        return self._doubted and not self.has_work and self.clock() >= self._probed_s + PROBE_S

    def probe(self) -> bool:
        """Computes something for nobody, if a request was refused although nothing ran; whether it did.

        What steps take is learned from those that run: while all is refused, a busy moment would be believed for ever.
        Once in PROBE_S seconds at most, and it gives way to whoever comes.
        """
        with self._turn:
            if not self.wants_probe:
                return False
            self._doubted, self._probed_s = False, self.clock()
        rows = max(1, min(self.costs.chunk, self.room - PROBE_TOKENS))
        probe = self.submit([0] * rows, SamplingParams(max_tokens=PROBE_TOKENS, temperature=0, ignore_eos=True))
        probe.caches = False
        while probe.finish_reason is None:
            if len(self.scheduler.running) + len(self.scheduler.waiting) > 1:
                self.cancel(probe)
            else:
                self.step()
        return True

    def step(self) -> bool:
        """One forward over everything scheduled; false when there was nothing to compute.

        A failure ends the requests that were running and is raised.
        """
        with self._turn:
            self._line_up()
        return self._lead()

    def _lead(self) -> bool:
        """Runs a step as the leader. A failure ends its requests; an interrupt leaves them to be computed anew."""
        try:
            return self._step()
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
                self._give_way()

    def _line_up(self, served: Callable[[], bool] = bool) -> bool:
        """Under the lock: waits for the runner in the order of arrival; False: `served` came true, it is not needed."""
        if served():
            return False
        if self._stepping or self._line:
            place = object()
            self._line.append(place)
            try:
                while self._stepping or self._line[0] is not place:
                    self._turn.wait()
                    if served():
                        return False
            finally:
                self._line.remove(place)
                self._turn.notify_all()
        self._stepping = True
        return True

    def _give_way(self) -> None:
        self._stepping = False
        self._turn.notify_all()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """The runner and the bookkeeping for this thread alone."""
        with self._turn:
            self._line_up()
            try:
                yield
            finally:
                self._give_way()

    def _step(self) -> bool:
        with self._turn:
            self._drop_late()
            decoding = self.scheduler.decoding()
        if self.speculator is not None:
            self.speculator.propose(decoding)
        with self._turn:
            begin = self.clock()
            chunks = self.scheduler.schedule(begin)
            self._copy_pages()
            if not chunks:
                return False
            if any(chunk.request.adapter for chunk in chunks):  # those that share one pass over it together
                chunks.sort(key=lambda chunk: chunk.request.adapter.number if chunk.request.adapter else 0)
            predicted_ms = self.costs.ms(self.scheduler.work)
            self._free_s = begin + predicted_ms / 1000
            self._approach(chunks, begin, predicted_ms)
        for chunk in chunks:
            chunk.request.timings.steps += 1
            if chunk.request.first_step_s is None:
                chunk.request.first_step_s = begin
        if chunks[0].tree is not None:
            values, sampled = self.runner.score_tree(*tree_batch(chunks)), Sampled([], [])
        elif chunks[0].scores:
            values, sampled = self._score_part(chunks[0]), Sampled([], [])
        else:
            sampled = self.runner.step(batch_of(chunks), [c.request.sampler if c.last else None for c in chunks])
        now = self.clock()
        took_ms = 1000 * (now - begin)
        if self.speculator is not None and not chunks[0].scores:
            self.speculator.observe(chunks, sampled.tokens, took_ms)
        with self._turn:
            self.costs.observe(self.scheduler.work, predicted_ms, took_ms)
            self.counters.steps += 1
            if chunks[0].tree is not None:
                for chunk, some in zip(chunks, edges_of(chunks, values), strict=True):
                    self._take_tree(chunk, some, now)
            elif chunks[0].scores:
                self._take_scores(chunks[0], values, now)
            else:
                self._emit(chunks, sampled, now)
        return True

    def _refuse_overload(self) -> None:
        if len(self.scheduler.waiting) >= self._max_waiting:
            self.counters.refused_overload += 1
            retry_s = self.scheduler.backlog_ms() / 1000
            raise OverloadError(
                f"{len(self.scheduler.waiting)} requests wait already; try again in {retry_s:.1f} s",
                retry_after_s=max(0.1, retry_s),
            )

    def _refuse_hopeless(self, request: Request) -> None:
        """Refuses what would be late as things stand; what it would get is not yet promised to it."""
        if request.deadline_s is None or not self.costs.known:
            return
        self._aim(request, request.deadline_s)
        if self._consider(request, self.clock()).short_ms:
            self._promise(request, request.deadline_s)

    def _aim(self, request: Request, deadline_s: float) -> None:
        """Says when a request must be done, and how much of it need not be computed."""
        if self.scheduler.prefix is not None and request.caches:
            request.cached = self.scheduler.prefix.match_length(request.salt, request.tokens)
        request.due_s = deadline_s - self._delivery_ms / 1000
        request.latest_s = self.scheduler.promises.latest_s(request.due_s, request.owed)

    def _consider(self, request: Request, now: float) -> Verdict:
        """What would be if the request were admitted now."""
        start = max(now, self._free_s) if self._stepping else now
        return self.scheduler.promises.consider(request, start, self.scheduler.running)

    def _queue(self, request: Request) -> None:
        """Admits a request or refuses it, before any of it is computed."""
        self._refuse_overload()
        if request.deadline_s is not None:
            self._promise(request, request.deadline_s)
        if request.score is None and request.sampler is None:
            request.sampler = self.runner.sampler(request.params, request.tokens)
        self.scheduler.add(request)
        self.counters.admitted += 1
        if request.adapter is not None:
            request.adapter.users += 1

    def _promise(self, request: Request, deadline_s: float) -> None:
        """Refuses a deadline that cannot be kept."""
        now = self.clock()
        self._aim(request, deadline_s)
        assert request.due_s is not None
        left_ms = 1000 * (request.due_s - now)
        if left_ms > 0 and not self.costs.known:  # nothing to predict from: it is tried
            return
        verdict = self._consider(request, now)
        tenants, work_ms = self.scheduler.tenants, verdict.work_ms
        wanted_ms = 1000 * (deadline_s - request.arrival_s)
        never = verdict.alone_ms + self._delivery_ms > wanted_ms
        tenants.ask(request.tenant, work_ms, now)
        greedy = verdict.spare_ms < RESERVE * work_ms and tenants.over_share(request.tenant, now)
        crowded = not (verdict.short_ms or greedy) and not self.scheduler.has_pages_for(request, now)
        if left_ms > 0 and not (verdict.short_ms or greedy or crowded):
            tenants.grant(request.tenant, work_ms, now)
            return
        if not greedy and not never:
            tenants.refuse(request.tenant, now)
        self.counters.refused_deadline += 1
        if left_ms > 0 and not self.has_work:
            self._doubted = True
            self.scheduler.promises.caution.doubt()
        ms = 1000 * (now - request.arrival_s) + self._delivery_ms + max(verdict.ms, left_ms + verdict.short_ms)
        why = f"the shortest useful answer would take {ms:.0f} ms"
        if not verdict.short_ms:
            why = "others have not had their share" if greedy else "the KV cache is promised to others"
        raise DeadlineError(
            f"the deadline of {wanted_ms:.0f} ms cannot be met: {why}; allow more time, or ask for less",
            predicted_ms=ms,
            retry_after_s=NEVER_S if never else max(0.01, verdict.short_ms / 1000),
        )

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
        with self._whole():
            wanted = prefix.pinned_pages + prefix.unpinned(salt, tokens)
            if wanted > prefix.most_pinned:
                raise RequestError(
                    f"pinned prefixes would take {wanted} pages of {self.runner.page_tokens} tokens; "
                    f"{prefix.most_pinned} may be pinned: raise cache_tokens"
                )
            match = prefix.find(salt, tokens)
            pages = prefix.hold(match)
            try:
                count = -(-len(tokens) // self.runner.page_tokens) - len(pages)
                more = self.scheduler.allocator.take(count) if self.scheduler.reclaim(count) else None
                if more is None:
                    raise RequestError("the KV cache is in use; pin before requests come")
                pages += more
                if match.partial is not None:
                    self.scheduler.copies.append((match.partial.page, pages[len(match.nodes)]))
                self._copy_pages()
                for at in range(match.tokens, len(tokens), self.runner.max_tokens):
                    part = tokens[at : at + self.runner.max_tokens]
                    batch = Batch(_ints(part), _ints([at]), _ints([len(part)]), _ints([pages]))
                    self.runner.score(batch, _ints([-1] * len(part)))
                return prefix.pin(salt, tokens, pages)
            finally:
                self.scheduler.allocator.give(pages)

    def _copy_pages(self) -> None:
        copies = self.scheduler.copies
        while copies:  # an interrupt here repeats at most the copy it met
            self.runner.copy_page(*copies[0])
            copies.popleft()

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
            count = sum(-(-len(prompt) // self.runner.page_tokens) for prompt in group)
            with self._whole():
                pages = self.scheduler.allocator.take(count) if self.scheduler.reclaim(count) else None
                if pages is None:
                    raise RequestError("the KV cache is in use; try again, or raise cache_tokens")
                try:
                    means.append(mean_hidden(self.runner, group, pages))
                finally:
                    self.scheduler.allocator.give(pages)
        return np.concatenate(means)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self.runner.vocab:
            token = next(token for token in ids if not 0 <= token < self.runner.vocab)
            raise RequestError(f"token {token} is not in the vocabulary of {self.runner.vocab}")
        return ids

    def _score_part(self, chunk: Chunk) -> NDArray[np.float32]:
        request, score = chunk.request, chunk.request.score
        assert score is not None
        targets = score.continuations[len(score.values)]
        inputs = [request.tokens[-1], *targets[:-1]]
        part = slice(score.done, score.done + chunk.length)
        batch = Batch(_ints(inputs[part]), _ints([chunk.start]), _ints([chunk.length]), _ints([request.pages]))
        batch.adapters = natives([chunk.request.adapter])
        return self.runner.score(batch, _ints(targets[part]))

    def _take_scores(self, chunk: Chunk, values: NDArray[np.float32], now: float) -> None:
        request, score = chunk.request, chunk.request.score
        assert score is not None
        if np.isnan(values).any():
            return self._fail(request)
        request.first_token_s = now if request.first_token_s is None else request.first_token_s
        request.last_token_s = now
        score.part += float(values.sum(dtype=np.float64))
        score.done += chunk.length
        if score.done == len(score.continuations[len(score.values)]):
            score.values.append(score.part)
            score.part, score.done = 0.0, 0
            del score.parts[0]
        if len(score.values) == len(score.continuations):
            self._finish(request, "stop", None)

    def _take_tree(self, chunk: Chunk, values: NDArray[np.float32], now: float) -> None:
        request, score = chunk.request, chunk.request.score
        assert score is not None and chunk.tree is not None
        if np.isnan(values).any():
            return self._fail(request)
        request.first_token_s = now if request.first_token_s is None else request.first_token_s
        request.last_token_s = now
        request.computed = len(request.tokens) - 1  # the tree's own slots are written anew by the next one
        self.scheduler.publish(request)
        score.values += path_sums(chunk.tree, values, chunk.depth)
        if len(score.values) < len(score.continuations):
            del score.parts[0]
        elif chunk.depth < chunk.tree.depth:
            score.depth = chunk.depth
            self.counters.landed += 1
            self._finish(request, "deadline", None)
        else:
            self._finish(request, "stop", None)

    def _drop_late(self) -> None:
        """Ends the requests that nobody waits for and those whose next token would come after their deadline."""
        now = self.clock()
        least_ms = self.costs.decode_ms(1, 0)
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.abandoned:
                self._finish(request, request.ending, None)
            elif request.due_s is not None and 1000 * (request.due_s - now) < least_ms - EPSILON_MS:
                self._finish_late(request)

    def _approach(self, chunks: list[Chunk], now: float, step_ms: float) -> None:
        """Decides whose token of this step is the last that its deadline allows."""
        if all(chunk.request.due_s is None for chunk in chunks):
            return
        lasting = [chunk for chunk in chunks if chunk.last]
        context = sum(chunk.start for chunk in lasting) // max(1, len(lasting))
        next_ms = self.costs.decode_ms(len(lasting), context)
        for chunk in lasting:
            request = chunk.request
            if request.due_s is None:
                continue
            left_ms = 1000 * (request.due_s - now)
            margin_ms = self.scheduler.promises.caution.step_ms(
                1000 * (request.due_s - request.arrival_s), self.costs.margin_ms
            )
            request.stage = stage(left_ms, step_ms, next_ms, margin_ms)
            if request.stage is Stage.LAST:
                chunk.drafts.clear()
                self._force_end(request)

    def _force_end(self, request: Request) -> None:
        """Lets the sampler choose only among tokens that end a sentence, the answer with them."""
        if self.sentence_ends and request.constraint is None and len(request.tokens) > request.prompt_tokens:
            ends = self.sentence_ends if request.params.ignore_eos else self.sentence_ends | self.eos
            request.sampler = self.runner.restricted(request.params, request.tokens, ends)

    def _emit(self, chunks: list[Chunk], sampled: Sampled, now: float) -> None:
        for chunk, tokens, logprobs in zip(chunks, sampled.tokens, sampled.logprobs, strict=True):
            request = chunk.request
            if tokens and tokens[-1] < 0:
                self._fail(request, late=tokens[-1] == _native.MASK_LATE)
                continue
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

    def _fail(self, request: Request, *, late: bool = False) -> None:
        """Ends a request that alone cannot go on: no usable logit, or a late mask. Nothing of it is kept for others."""
        if late:
            request.error = GrammarError("what the grammar allows next takes too long to compute; make it simpler")
        else:
            request.error = ModelError("the model computed no usable number; its weights or the adapter may be damaged")
        request.caches = False
        self._finish(request, "cancelled", None)

    def _emit_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        ends = token in self.eos and not request.params.ignore_eos
        forced: list[int] = []
        if request.constraint is not None:
            try:
                request.constraint.check()
                forced = [] if ends else request.constraint.advance(token)
            except GrammarError as error:
                request.error = error
                self._finish(request, "cancelled", None)
                return
        if ends:
            self._finish(request, "stop", None)
            return
        self._append(request, token, logprob, whole=not forced)
        self._follow(request, forced)

    def _follow(self, request: Request, forced: Sequence[int]) -> None:
        """Emits what a grammar forces: tokens that the model need not choose, computed with the next step."""
        for i, token in enumerate(forced):
            if request.finish_reason is None:
                self._append(request, token, None, whole=i == len(forced) - 1)

    def _append(self, request: Request, token: int, logprob: TokenLogprob | None, *, whole: bool) -> None:
        """Emits one more token. `whole`: no forced ones follow, so that what a grammar calls for may end here."""
        request.tokens.append(token)
        if whole and request.constraint is not None and request.constraint.stopped:
            self._finish(request, "stop", token, logprob)
        elif len(request.tokens) >= request.limit:
            self._finish(request, "length", token, logprob)
        elif not whole:
            request.inbox.append(Event(token, logprob))
        elif request.stage and token in self.sentence_ends and not request.owed and request.constraint is None:
            self.counters.landed += 1
            self._finish(request, "deadline", token, logprob)
        elif request.stage is Stage.LAST:
            if request.constraint is None:
                self._finish(request, "deadline", token, logprob)
            else:
                request.inbox.append(Event(token, logprob))
                self._finish_late(request)
        else:
            request.inbox.append(Event(token, logprob))

    def _finish_late(self, request: Request) -> None:
        """Ends a request whose time is up; what a grammar still calls for needs no model."""
        closing = None if request.constraint is None else request.constraint.closing()
        for token in closing or ():
            request.tokens.append(token)
            request.inbox.append(Event(token))
        self.counters.landed += closing is not None
        self._finish(request, "deadline", None)

    def _finish(
        self, request: Request, reason: FinishReason, token: int | None, logprob: TokenLogprob | None = None
    ) -> None:
        self.scheduler.remove(request)
        if self.speculator is not None:
            self.speculator.forget(request)
        if request.adapter is not None:
            request.adapter.users -= 1
            request.adapter = None
        now = self.clock()
        request.finish(reason, now)
        request.inbox.append(Event(token, logprob, reason))
        if request.due_s is not None and reason != "cancelled":
            met = now <= request.due_s + EPSILON_MS / 1000 and request.answered
            self.counters.met += met
            self.counters.missed += not met
            self.scheduler.promises.caution.learn(met)


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
        adapters=natives([chunk.request.adapter for chunk in chunks]),
    )


def _ints(values: Sequence[int] | Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)
