"""Which pages of the KV cache are free. Pure bookkeeping: the memory itself belongs to the runner."""

from __future__ import annotations


class PageAllocator:
    """Hands out page ids in [0, pages)."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # a stack, so that warm pages are used again first

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages for the caller to own, or None, and nothing taken, when so many are not free."""
        if count > len(self._free):
            return None
        split = len(self._free) - count
        taken = self._free[split:]
        del self._free[split:]
        return taken

    def give(self, pages: list[int]) -> None:
        """Takes `pages` back and empties the list."""
        self._free.extend(pages)
        pages.clear()

    def check_integrity(self, held: list[list[int]]) -> None:
        """Asserts that every page is either free or in exactly one of `held`."""
        seen = sorted([*self._free, *(page for pages in held for page in pages)])
        assert seen == list(range(self.pages)), "KV pages leaked or held twice"
