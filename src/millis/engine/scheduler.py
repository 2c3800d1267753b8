"""Decides what the next step computes. Pure: no tensor, no clock, no weight.

Running requests come first, one token each while they decode, with their drafts where there is room; what is left of
the tokens of a step goes to prefill chunks in order of arrival. When the KV cache is full, the latest arrival loses
its pages and waits to be computed anew, but for what the prefix cache has kept of it meanwhile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from millis.engine.kvcache import PageAllocator
from millis.engine.prefix import Match, RadixCache
from millis.engine.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a request; `last` when they reach its end, so that a token is sampled.

    `drafts` then run behind them, in the request's pages, too.
    """

    request: Request
    start: int
    length: int
    last: bool
    drafts: list[int] = field(default_factory=list)


class Scheduler:
    """Owns the queue and the pages of every request in it."""

    def __init__(self, *, pages: int, page_tokens: int, max_tokens: int, max_sequences: int) -> None:
        self.allocator = PageAllocator(pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefix: RadixCache | None = None
        self.copies: deque[tuple[int, int]] = deque()  # (source, target) pages, to be copied in order before the step
        self._page_tokens = page_tokens
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences

    def add(self, request: Request) -> None:
        """Queues a request behind all others."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forgets a request and frees its pages, wherever it stands."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; moves requests from waiting to running and takes their pages."""
        chunks: list[Chunk] = []
        left, running = self._max_tokens, len(self.running)
        behind = sum(request.pending == 1 for request in self.running)  # decodes to place yet
        for request in sorted(self.running, key=lambda r: r.pending > 1):  # stable: decodes before prefills
            behind -= 1
            if left and request in self.running:  # it may have lost its pages to an earlier one
                left -= self._place(request, left, chunks, may_preempt=True, drafts=left - 1 - max(behind, 0))
        if len(self.running) < running:  # no admission while pages are short
            return [chunk for chunk in chunks if chunk.request in self.running]
        while left and self.waiting and len(self.running) < self._max_sequences:
            match = self._reuse(self.waiting[0])
            placed = self._place(self.waiting[0], left, chunks, may_preempt=False)
            self._reused(self.waiting[0], match, bool(placed))
            if not placed:
                break
            self.running.append(self.waiting.popleft())
            left -= placed
        return chunks

    def reclaim(self, pages: int) -> bool:
        """Frees at least `pages` pages, taking them from the latest arrivals; False if all together are too few."""
        while self.allocator.free < pages and self.running:
            self.preempt(self.running[-1])
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
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.drafts = []
        self.waiting.appendleft(request)

    def publish(self, request: Request) -> None:
        """Caches the full pages of a request that goes on, for those that begin like it."""
        if self.prefix is not None:
            full = min(request.computed, len(request.tokens)) // self._page_tokens * self._page_tokens
            self.prefix.insert(request.tenant, request.tokens[:full], request.pages)

    def _release(self, request: Request) -> None:
        """Gives a request's pages back, or to the cache: [0, computed) are its own tokens, as far as it has so many."""
        if self.prefix is not None:
            self.prefix.insert(request.tenant, request.tokens[: request.computed], request.pages)
        self.allocator.give(request.pages)

    def _reuse(self, request: Request) -> Match | None:
        """Starts a request behind what is cached of it; `_reused` must follow."""
        if self.prefix is None:
            return None
        match = self.prefix.find(request.tenant, request.tokens)
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
            request.timings.cached_tokens = match.tokens
            self.prefix.record(match, len(request.tokens))

    def decoding(self) -> list[Request]:
        """The running requests of which one token is to be computed."""
        return [request for request in self.running if request.pending == 1]

    def _place(self, request: Request, room: int, chunks: list[Chunk], *, may_preempt: bool, drafts: int = 0) -> int:
        """Adds the request's next chunk of at most `room` tokens, the last `drafts` of them drafts at most.

        Returns the chunk's tokens, 0 when no page is to be had for it. Drafts take only pages that are free.
        """
        length = min(request.pending, room)
        need = -(-(request.computed + length) // self._page_tokens) - len(request.pages)
        pages = self.allocator.take(max(0, need))
        while pages is None and may_preempt and self.running[-1] is not request:
            self.preempt(self.running[-1])
            pages = self.allocator.take(need)
        if pages is None:
            if may_preempt:
                self.preempt(request)
            return 0
        request.pages.extend(pages)
        kept = self._fitting(request, drafts) if request.pending == 1 else []
        request.drafts = []
        chunks.append(Chunk(request, request.computed, length, length == request.pending, kept))
        return length + len(kept)

    def _fitting(self, request: Request, most: int) -> list[int]:
        """The request's drafts that find room, with their pages taken."""
        drafts = request.drafts[: max(0, most)]
        end = request.computed + 1
        need = -(-(end + len(drafts)) // self._page_tokens) - len(request.pages)
        request.pages.extend(self.allocator.take(min(max(0, need), self.allocator.free)) or [])
        return drafts[: len(request.pages) * self._page_tokens - end]
