"""Beginnings of prompts to come, computed ahead and kept in the prefix cache for ever."""

from __future__ import annotations

from collections.abc import Sequence

from millis.engine.batches import ints
from millis.engine.prefix import RadixCache, Salt
from millis.engine.runner import Batch, Runner
from millis.engine.scheduler import Scheduler
from millis.types import RequestError


def pin(runner: Runner, scheduler: Scheduler, prefix: RadixCache, tokens: Sequence[int], salt: Salt) -> int:
    """Computes what is not cached of `tokens` and pins all; returns how many of them. The runner is this call's alone.

    RequestError: no room: pinned pages may take half of the KV cache, and must leave room for the longest request.
    """
    wanted = prefix.pinned_pages + prefix.unpinned(salt, tokens)
    if wanted > prefix.most_pinned:
        raise RequestError(
            f"pinned prefixes would take {wanted} pages of {runner.page_tokens} tokens; "
            f"{prefix.most_pinned} may be pinned: raise cache_tokens"
        )
    match = prefix.find(salt, tokens)
    pages = prefix.hold(match)
    try:
        count = -(-len(tokens) // runner.page_tokens) - len(pages)
        more = scheduler.allocator.take(count) if scheduler.reclaim(count) else None
        if more is None:
            raise RequestError("the KV cache is in use; pin before requests come")
        pages += more
        if match.partial is not None:
            scheduler.copies.append((match.partial.page, pages[len(match.nodes)]))
        copy_pages(runner, scheduler)
        for at in range(match.tokens, len(tokens), runner.max_tokens):
            part = tokens[at : at + runner.max_tokens]
            runner.score(Batch(ints(part), ints([at]), ints([len(part)]), ints([pages])), ints([-1] * len(part)))
        return prefix.pin(salt, tokens, pages)
    finally:
        scheduler.allocator.give(pages)


def copy_pages(runner: Runner, scheduler: Scheduler) -> None:
    """Copies the pages that a sequence shares with others up to some token in their midst."""
    while scheduler.copies:  # an interrupt here repeats at most the copy it met
        runner.copy_page(*scheduler.copies[0])
        scheduler.copies.popleft()
