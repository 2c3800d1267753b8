"""Who holds which pages of the KV cache. Pure bookkeeping: the memory itself belongs to the runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


class PageAllocator:
    """Hands out page ids in [0, pages); counts the holders of each.

    A page may be kept for the time nobody else needs it: then it is idle, and `evict` is asked to let go of it where
    free pages do not suffice.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.evict: Callable[[int], None] | None = None  # lets go of so many idle pages; set by the prefix cache
        self._free = list(range(pages - 1, -1, -1))  # a stack, so that warm pages are used again first
        self._holders = [0] * pages
        self._kept = bytearray(pages)
        self._idle = 0

    @property
    def free(self) -> int:
        """Pages to be had: those that nobody holds and those that are merely kept."""
        return len(self._free) + self._idle

    def take(self, count: int) -> list[int] | None:
        """`count` pages for the caller to own, or None, and nothing taken, when so many are not free."""
        if count > self.free:
            return None
        if count > len(self._free) and self.evict is not None:
            self.evict(count - len(self._free))
        split = len(self._free) - count
        taken = self._free[split:]
        del self._free[split:]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """The caller becomes a further holder of pages that are held or kept; it may read them only."""
        for page in pages:
            self._idle -= self.is_idle(page)
            self._holders[page] += 1

    def give(self, pages: list[int]) -> None:
        """The caller holds `pages` no longer; empties the list."""
        for page in pages:
            self._let_go(page)
        pages.clear()

    def keep(self, page: int) -> None:
        """A held page stays when all others have given it back, until `drop`."""
        self._holders[page] += 1
        self._kept[page] = 1

    def pin(self, page: int) -> None:
        """A page that is kept is never idle from now on."""
        self._idle -= self.is_idle(page)
        self._kept[page] = 0

    def drop(self, page: int) -> None:
        """Undoes `keep`."""
        self._idle -= self.is_idle(page)
        self._kept[page] = 0
        self._let_go(page)

    def is_idle(self, page: int) -> bool:
        """Whether a page is kept, and nobody holds it beside."""
        return self._kept[page] == 1 and self._holders[page] == 1

    def _let_go(self, page: int) -> None:
        assert self._holders[page] > 0, "a page is given back that nobody holds"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)
        self._idle += self.is_idle(page)

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Asserts that every page is free, or in as many of `held`, those kept among them, as it has holders."""
        holders = [0] * self.pages
        for pages in held:
            for page in pages:
                holders[page] += 1
        assert holders == self._holders, "KV pages leaked or held twice"
        assert sorted(self._free) == [page for page, count in enumerate(holders) if count == 0], "free pages are not"
        assert self._idle == sum(self.is_idle(page) for page in range(self.pages)), "idle pages are miscounted"


def pool_tokens(context: int, sequences: int, position_bytes: int, memory_bytes: int | None) -> int:
    """Positions of a KV cache that many requests share, and what is cached of earlier ones.

    A full context for each sequence, within a quarter of the memory that is available (None: unknown); one context at
    the least. Memory comes when pages are first used.
    """
    affordable = 0 if memory_bytes is None else memory_bytes // 4 // position_bytes
    return max(context, min(context * sequences, affordable))
