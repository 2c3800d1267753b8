"""Decides what the next step computes. Pure: no tensor, no clock, no weight.

Requests are ranked: those with a deadline by the time they must have been computed, the others by class, by how much
their tenant has had, and by arrival. Decodes come first, one token each, with their drafts where there is room; what
is left goes to prefill chunks, as long as the step does not become too long for any of the decodes. Who finds no place
in a step keeps its pages. Only when the KV cache is full, the least urgent loses them and waits to be computed anew.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millis.engine.kvcache import PageAllocator
from millis.engine.predict import LEAST_CHUNK, StepModel, Work
from millis.engine.prefix import Match, RadixCache
from millis.engine.promises import Promises
from millis.engine.request import Request
from millis.engine.scoring import plan_tree
from millis.engine.tenants import Tenants
from millis.engine.tree import TokenTree
from millis.types import Priority

CLASSES: dict[Priority, int] = {"interactive": 0, "standard": 1, "batch": 2}
GAPS: dict[Priority, float] = {"interactive": 1.0, "standard": 4.0, "batch": math.inf}  # in max_gap_ms
AGE_S = 10.0  # waiting so long is worth a class
NEGLECT_S = 0.25  # after so long without a token for any request that has no deadline, one comes first
FORGET = 256  # requests between two looks at tenants that have gone


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a request; `last` when they reach its end, so that a token is sampled.

    `drafts` then run behind them, in the request's pages, too. `scores`: a continuation is scored instead, behind
    `start` tokens; such a chunk is a step of its own. `tree`: the rest of the prompt, then a tree of continuations that
    is cut at `depth`; such chunks share their steps with each other only.
    """

    request: Request
    start: int
    length: int
    last: bool
    drafts: list[int] = field(default_factory=list)
    scores: bool = False
    tree: TokenTree | None = None
    depth: int = 0


@dataclass(slots=True)
class Limits:
    """How long a step may take, in milliseconds."""

    hard_ms: float  # beyond, an answer misses its deadline
    soft_ms: float  # beyond, gaps between tokens become longer than wished
    rows: int  # of prompts; beyond, answers with a deadline become shorter for nothing


class Scheduler:
    """Owns the queue and the pages of every request in it. Requests that hold pages are `running`."""

    def __init__(
        self,
        *,
        pages: int,
        page_tokens: int,
        max_tokens: int,
        max_sequences: int,
        costs: StepModel | None = None,
        max_gap_ms: float = math.inf,
        max_step_ms: float = math.inf,
    ) -> None:
        self.allocator = PageAllocator(pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefix: RadixCache | None = None
        self.copies: deque[tuple[int, int]] = deque()  # (source, target) pages, to be copied in order before the step
        self.costs = costs or StepModel()
        self.tenants = Tenants()
        self.promises = Promises(self.costs, slots=max_sequences, max_tokens=max_tokens)
        self.work = Work()  # of the step scheduled last
        self._page_tokens = page_tokens
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._max_gap_ms, self._max_step_ms = max_gap_ms, max_step_ms
        self.lent = 0  # pages of texts that are being read between steps
        self.preemptions = 0
        self._count = 0
        self._scored = False  # the latest step scored continuations
        self._unhurried_s: float | None = None  # when a request without a deadline last had a token computed

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queues a request."""
        self._count += 1
        request.number = self._count
        active = {other.tenant for other in (*self.running, *self.waiting)}
        self.tenants.arrive(request.tenant, active)
        if self._count % FORGET == 0:
            self.tenants.forget_idle({request.tenant, *active}, request.arrival_s)
        self.waiting.append(request)
        self.promises.add(request)

    def remove(self, request: Request) -> None:
        """Forgets a request and frees its pages, wherever it stands."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.promises.settle(request)
        self._release(request)

    def schedule(self, now_s: float = 0.0) -> list[Chunk]:
        """The next step's chunks; moves requests from waiting to running and takes their pages."""
        ranked = self._ranked(now_s)
        spare_ms = self.promises.spare_ms(now_s, self.running)
        limits = self._limits(now_s)
        first = next((r for r in ranked if not r.decoding), None)
        turn = not self._scored or not self.decoding()  # decodes get every other step at least
        if first is not None and self._can_score(first) and turn:
            chunks = self._score_step(first, ranked, limits, now_s) or self._step(ranked, limits, spare_ms)
        else:
            chunks = self._step(ranked, limits, spare_ms)
        if not chunks:
            scorable = next((r for r in ranked if self._can_score(r)), None)
            chunks = [] if scorable is None else self._score_step(scorable, ranked, limits, now_s)
        self._account(chunks, now_s)
        return chunks

    def _step(self, ranked: list[Request], limits: Limits, spare_ms: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        self.work = Work()
        before, left = len(self.running), self._max_tokens
        chosen = ranked[: self._max_sequences]
        decodes = [r for r in chosen if r.decoding and r.pages and (r.due_s is not None or spare_ms >= 0)]
        if spare_ms < 0 and not decodes:  # nobody is helped by waiting
            decodes = [r for r in chosen if r.decoding and r.pages]
        behind = len(decodes)
        for request in decodes:
            behind -= 1
            if left and request in self.running:  # it may have lost its pages
                left -= self._place(request, left, chunks, may_preempt=True, drafts=left - 1 - behind)
        short = len(self.running) < before  # of pages: no admission then
        for request in ranked:
            if not left or len(chunks) >= self._max_sequences:
                break
            running = request in self.running
            if request.pending < 1 or (running and request.decoding) or (short and not running):
                continue
            match = None if running else self._reuse(request)
            prompts = sum(chunk.length for chunk in chunks if not chunk.request.decoding)
            room = self._room(request, min(left, limits.rows - prompts), limits, spare_ms, first=not prompts)
            if running:
                if not room:
                    break
                left -= self._place(request, room, chunks, may_preempt=True)
                continue
            placed = self._admit(request, room, chunks) if room else 0
            self._reused(request, match, bool(placed))
            if not room:
                break
            left -= placed
            short = short or not placed
        for request in ranked[self._max_sequences :]:  # decodes that take the place of prompts which found none
            if not left or len(chunks) >= self._max_sequences:
                break
            if request.decoding and request.pages and spare_ms >= 0:
                left -= self._place(request, left, chunks, may_preempt=True)
        return [chunk for chunk in chunks if chunk.request in self.running]

    def _admit(self, request: Request, room: int, chunks: list[Chunk]) -> int:
        """Places a waiting request, which is running from then on; pages are taken only from lower classes."""
        while not (placed := self._place(request, room, chunks, may_preempt=False)):
            victim = self._victim(request)
            if victim is None or _class(victim) <= _class(request):
                return 0
            self.preempt(victim)
        self.waiting.remove(request)
        self.running.append(request)
        return placed

    def reclaim(self, pages: int) -> bool:
        """Frees at least `pages` pages, taking them from the latest arrivals; False if all together are too few."""
        while self.allocator.free < pages and self.running:
            self.preempt(max(self.running, key=_stake))
        return self.allocator.free >= pages

    def check_integrity(self) -> None:
        """Asserts that no page is lost and that waiting requests hold none."""
        cached = [] if self.prefix is None else self.prefix.held()
        self.allocator.check_integrity([cached, *(request.pages for request in self.running)])
        if self.prefix is not None:
            self.prefix.check_integrity()
        assert all(not request.pages and request.computed == 0 for request in self.waiting)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages; it waits in front, to be computed anew."""
        self.preemptions += 1
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.drafts = []
        if request.score is not None:
            request.score.part, request.score.done = 0.0, 0
            request.score.ranked.clear()
        self.waiting.appendleft(request)

    def decoding(self) -> list[Request]:
        """The running requests of which one token is to be computed."""
        return [request for request in self.running if request.decoding]

    def has_pages_for(self, request: Request, now_s: float) -> bool:
        """Whether the KV cache holds what all requests with a deadline may grow to by then, and this one beside."""
        token_ms = self.costs.decode_ms(1, 0)

        def need(one: Request) -> int:
            most = one.limit
            if one.score is None and one.due_s is not None and token_ms > 0:
                most = min(most, len(one.tokens) + 1 + max(0, int(1000 * (one.due_s - now_s) / token_ms)))
            return -(-most // self._page_tokens)

        pinned = 0 if self.prefix is None else self.prefix.pinned_pages
        others = (one for one in (*self.running, *self.waiting) if one.due_s is not None)
        return need(request) + sum(map(need, others)) <= self.allocator.pages - pinned

    def rows_between(self, now_s: float, start: int = 0) -> int:
        """Tokens from `start` on that may be read between two steps, as many as those that decode have time for.

        0: not even LEAST_CHUNK, or a promise is broken.
        """
        limits = self._limits(now_s)
        hard_ms = min(limits.hard_ms, self.promises.spare_ms(now_s, self.running) / 2)
        rows = limits.rows
        while rows > LEAST_CHUNK and self.costs.ms(Work().add(start, rows, 0)) > min(hard_ms, limits.soft_ms):
            rows = max(LEAST_CHUNK, rows // 2)
        return rows if self.costs.ms(Work().add(start, rows, 0)) <= hard_ms else 0

    def backlog_ms(self) -> float:
        """What computing the prompts of all that wait is thought to take."""
        return self.costs.prefill_ms(sum(request.pending for request in self.waiting), self._max_tokens)

    def publish(self, request: Request) -> None:
        """Caches the full pages of a request that goes on, for those that begin like it."""
        if self.prefix is not None and request.caches:
            full = min(request.computed, len(request.tokens)) // self._page_tokens * self._page_tokens
            self.prefix.insert(request.salt, request.tokens[:full], request.pages)

    def keep(self, request: Request, tokens: Sequence[int]) -> None:
        """Caches `tokens`, which the pages of a request that is about to end hold, for those that begin so."""
        if self.prefix is not None and request.caches:
            self.prefix.insert(request.salt, tokens, request.pages)

    def _release(self, request: Request) -> None:
        """Gives a request's pages back, or to the cache: [0, computed) are its own tokens, as far as it has so many."""
        if self.prefix is not None and request.caches:
            self.prefix.insert(request.salt, request.tokens[: request.computed], request.pages)
        self.allocator.give(request.pages)

    def _reuse(self, request: Request) -> Match | None:
        """Starts a request behind what is cached of it; `_reused` must follow."""
        if self.prefix is None or not request.caches:
            return None
        prompt = request.tokens if request.score is None else request.tokens[:-1]  # its last token is scored anew
        match = self.prefix.find(request.salt, prompt)
        request.pages, request.computed = self.prefix.hold(match), match.tokens
        return match

    def _reused(self, request: Request, match: Match | None, placed: bool) -> None:
        """Completes `_reuse` when the request has its pages, or undoes it."""
        if self.prefix is None or match is None:
            return
        if not placed:
            self.allocator.give(request.pages)
            request.computed = 0
            return
        if match.partial is not None:
            self.copies.append((match.partial.page, request.pages[len(match.nodes)]))
        if request.timings.steps == 0:  # not the return of a preempted one
            request.timings.cached_tokens = min(match.tokens, request.prompt_tokens)  # forced ones may be, too
            self.prefix.record(match, len(request.tokens))

    def _ranked(self, now_s: float) -> list[Request]:
        """All requests, the most urgent first."""
        unhurried = any(r.due_s is None for r in self.running) or any(r.due_s is None for r in self.waiting)
        if not unhurried:
            self._unhurried_s = None
        elif self._unhurried_s is None:
            self._unhurried_s = now_s
        ranked = sorted((*self.running, *self.waiting), key=self._rank(now_s))
        if unhurried and self._unhurried_s is not None and now_s - self._unhurried_s > NEGLECT_S:
            neglected = next(r for r in ranked if r.due_s is None)
            ranked.remove(neglected)
            ranked.insert(0, neglected)
        return ranked

    def _rank(self, now_s: float) -> Callable[[Request], tuple[float, float, int]]:
        served = self.tenants.served

        def rank(request: Request) -> tuple[float, float, int]:
            if request.due_s is not None:
                urgent = request.owed > 0 or request.score is not None or request.stage > 0
                return (-2, request.latest_s, request.number) if urgent else (-1, request.due_s, request.number)
            level = CLASSES[request.priority] - int((now_s - request.arrival_s) / AGE_S)
            return max(0, level), served(request.tenant), request.number

        return rank

    def _limits(self, now_s: float) -> Limits:
        """What the running decodes allow: all that is left to them but for the tokens that are owed."""
        limits = Limits(math.inf, self._max_step_ms, self._max_tokens)
        if not self.costs.known:
            return limits
        margin_ms, decoding = self.costs.margin_ms, self.decoding()
        context = sum(len(request.tokens) for request in decoding) // max(1, len(decoding))
        token_ms = self.costs.decode_ms(min(self._max_sequences, len(decoding)), context)
        for request in decoding:
            limits.soft_ms = min(limits.soft_ms, self._max_gap_ms * GAPS[request.priority])
            if request.due_s is not None:
                left = 1000 * (request.due_s - now_s)
                left -= self.promises.caution.hand_ms(max(0.0, left), margin_ms)
                limits.hard_ms = min(limits.hard_ms, left - token_ms * max(0, request.owed - 1))
                limits.rows = self.costs.chunk
        return limits

    def _room(self, request: Request, left: int, limits: Limits, spare_ms: float, *, first: bool) -> int:
        """Rows of a request's prompt that this step may take, 0 for none; `first` of those that take any."""
        most = min(request.pending, max(0, left))
        if not most:
            return 0
        if not self.costs.known or (math.isinf(limits.hard_ms) and math.isinf(limits.soft_ms) and math.isinf(spare_ms)):
            return most
        hard_ms = limits.hard_ms
        if request.due_s is None and math.isfinite(spare_ms):
            hard_ms = min(hard_ms, self.costs.ms(self.work) + spare_ms / 2)
        wished = self._fit(request, most, min(hard_ms, limits.soft_ms))
        if wished < most and first and limits.soft_ms < hard_ms:
            wished = max(wished, self._fit(request, min(most, LEAST_CHUNK), hard_ms))
        if not wished and not self.work.rows:  # nothing else runs: idling helps nobody
            wished = min(most, LEAST_CHUNK)
        return wished

    def _fit(self, request: Request, most: int, limit_ms: float) -> int:
        """The longest chunk with which the step takes `limit_ms` at most."""
        low, high = 0, most
        if self._with(request, most) <= limit_ms:
            return most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._with(request, middle) <= limit_ms else (low, middle)
        return low

    def _with(self, request: Request, length: int) -> float:
        samples = int(request.score is None and length == request.pending)
        return self.costs.ms(self.work.add(request.computed, length, samples))

    def _place(self, request: Request, room: int, chunks: list[Chunk], *, may_preempt: bool, drafts: int = 0) -> int:
        """Adds the request's next chunk of at most `room` tokens, the last `drafts` of them drafts at most.

        Returns the chunk's tokens, 0 when no page is to be had for it. Drafts take only pages that are free.
        """
        length = min(request.pending, room)
        if not self._take(request, request.computed + length, may_preempt=may_preempt):
            return 0
        kept = self._fitting(request, drafts) if request.decoding and request.stage == 0 else []
        request.drafts = []
        last = length == request.pending and request.score is None
        chunks.append(Chunk(request, request.computed, length, last, kept))
        self.work = self.work.add(request.computed, length + len(kept), (1 + len(kept)) * last)
        return length + len(kept)

    def _take(self, request: Request, positions: int, *, may_preempt: bool) -> bool:
        """Gives the request pages for so many positions, taken from less urgent ones if need be, or takes its own."""
        need = max(0, -(-positions // self._page_tokens) - len(request.pages))
        pages = self.allocator.take(need)
        while pages is None and may_preempt and (victim := self._victim(request)) is not None:
            self.preempt(victim)
            pages = self.allocator.take(need)
        if pages is None:
            if may_preempt:
                self.preempt(request)
            return False
        request.pages.extend(pages)
        return True

    def _victim(self, request: Request) -> Request | None:
        """Who loses its pages to `request`: the latest of the lowest class, if that is less than itself."""
        victim = max((r for r in self.running if r is not request), key=_stake, default=None)
        return victim if victim is not None and _stake(victim) > _stake(request) else None

    def _fitting(self, request: Request, most: int) -> list[int]:
        """The request's drafts that find room, with their pages taken."""
        drafts = request.drafts[: max(0, most)]
        end = request.computed + 1
        need = -(-(end + len(drafts)) // self._page_tokens) - len(request.pages)
        request.pages.extend(self.allocator.take(min(max(0, need), self.allocator.free)) or [])
        return drafts[: len(request.pages) * self._page_tokens - end]

    def _can_score(self, request: Request) -> bool:
        """Whether continuations are next. A prompt of one token has nothing to compute before them."""
        score = request.score
        if score is None or not score.parts or request.pending == 0:
            return score is not None
        tree, pending = score.parts[0][1], request.pending
        if tree is None:
            return False
        if not request.pages and self.prefix is not None and request.caches:
            pending -= self.prefix.match_length(request.salt, request.tokens[:-1])
        return pending + 1 + len(tree.tokens) <= self._max_tokens

    def _score_step(self, first: Request, ranked: list[Request], limits: Limits, now_s: float) -> list[Chunk]:
        """A step that scores continuations: trees of several requests, or a piece of the first one's next."""
        assert first.score is not None
        self.work = Work()
        if first.score.parts[0][1] is None:
            return self._score_piece(first, limits)
        chunks: list[Chunk] = []
        left = self._max_tokens
        for request in (first, *(r for r in ranked if r is not first)):
            if len(chunks) == self._max_sequences or not self._can_score(request):
                continue
            chunk = self._score_tree(request, left, limits, now_s, urgent=not chunks)
            if chunk is not None:
                chunks.append(chunk)
                left -= chunk.length
        return [chunk for chunk in chunks if chunk.request in self.running]

    def _score_tree(self, request: Request, left: int, limits: Limits, now_s: float, *, urgent: bool) -> Chunk | None:
        """The rest of a request's prompt and its next tree, with pages for them; None where there is no room.

        urgent: a request that runs already takes pages from whoever is less urgent, or loses its own.
        """
        assert request.score is not None
        running = request in self.running
        match = None if running else self._reuse(request)
        begin = request.pending + 1  # rows before the tree
        left_ms = math.inf
        if request.due_s is not None:
            left_ms = 1000 * (request.due_s - now_s)
            left_ms -= self.promises.caution.hand_ms(max(0.0, left_ms), self.costs.margin_ms)
        limit_ms = min(limits.hard_ms, limits.soft_ms, left_ms if self.work.rows else math.inf)
        plan = plan_tree(
            request.score, request.computed, begin, self._max_tokens, self.work, self.costs, left_ms, limit_ms
        )
        placed = False
        if plan is not None and plan.length <= left:
            end = request.computed + plan.length
            placed = self._has_room(request, end) or (running and urgent and self._take(request, end, may_preempt=True))
        if not running:
            self._reused(request, match, placed)
        if plan is None or not placed:
            return None
        if not running:
            self.waiting.remove(request)
            self.running.append(request)
        self.work = plan.work
        return Chunk(request, request.computed, plan.length, False, scores=True, tree=plan.tree, depth=plan.depth)

    def _has_room(self, request: Request, positions: int) -> bool:
        """Gives the request pages for so many positions; they are taken only from lower classes."""
        while not self._take(request, positions, may_preempt=False):
            victim = self._victim(request)
            if victim is None or _class(victim) <= _class(request):
                return False
            self.preempt(victim)
        return True

    def _score_piece(self, request: Request, limits: Limits) -> list[Chunk]:
        """A step that scores a piece of the request's next continuation."""
        assert request.score is not None
        continuation = request.score.continuations[len(request.score.values)]
        start = request.computed + request.score.done
        most = min(len(continuation) - request.score.done, self._max_tokens)
        limit_ms = min(limits.hard_ms, limits.soft_ms)
        length = most
        while length > 1 and self.costs.ms(Work(length, length, 0, length * start)) > limit_ms:
            length = (length + 1) // 2
        if not self._take(request, start + length, may_preempt=request in self.running):
            return []
        if request in self.waiting:
            self.waiting.remove(request)
            self.running.append(request)
        self.work = Work(length, length, 0, length * start)
        return [Chunk(request, start, length, False, scores=True)]

    def _account(self, chunks: list[Chunk], now_s: float) -> None:
        self._scored = any(chunk.scores for chunk in chunks)
        for chunk in chunks:
            self.tenants.charge(chunk.request.tenant, chunk.length + len(chunk.drafts))
            if chunk.request.due_s is None:
                self._unhurried_s = now_s


def _class(request: Request) -> int:
    return -1 if request.due_s is not None else CLASSES[request.priority]


def _stake(request: Request) -> tuple[int, int]:
    """The higher, the sooner a request loses its pages. It does not change, so that no two take from each other."""
    return _class(request), request.number
