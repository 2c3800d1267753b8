"""The prefix cache: a radix tree of what the KV cache's pages hold. Pure: no tensor, no clock.

A node is a page: the tokens in it, behind those of its ancestors (Kwon et al., 2023; Zheng et al., 2024). Full pages
are shared, read-only, by all requests that begin so. A page that agrees only in part, or is only partly filled, is
copied for a request that may then overwrite what differs: of a prompt seen before, at most a few tokens are computed
again, and always the last one, for its logits.

Tenants never share pages: a node is found only by the tenant whose tokens it holds, so that no tenant can tell by
timing what another has asked. What the operator pins for the empty tenant is found by all; it is no secret.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from operator import attrgetter

from millis.engine.kvcache import PageAllocator

LEAST_COPIED = 4  # tokens; fewer are computed faster than their page is copied
MOST_USES = 8  # that count, so that what was popular once leaves in the end

Salt = str | tuple[str, int] | None  # a tenant, with the number of an adapter where there is one; None: everybody

_tokens_of = attrgetter("tokens")


@dataclass(slots=True, eq=False)
class Node:
    """A cached page. `children` of each tenant are sorted by tokens; of two, neither begins with all of the other."""

    tenant: Salt  # None: everybody's
    tokens: tuple[int, ...]
    page: int
    parent: Node | None  # None: no longer in the tree
    children: dict[Salt, list[Node]] = field(default_factory=dict)
    uses: int = 1
    worth: float = 0.0
    used: int = 0  # number of its latest use
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """The cached beginning of a prompt: whole pages to share, then the first tokens of a page to copy, if any."""

    nodes: tuple[Node, ...] = ()
    partial: Node | None = None
    tokens: int = 0


class RadixCache:
    """Keeps pages that requests have computed, until the memory is needed.

    Which page goes first: the leaf of the least worth that no request holds. A page's worth is set when it is used:
    `floor` + its share of filled positions × its uses, and `floor` is the worth of what was evicted last. So of equal
    pages the least recently used one goes; one that spares fewer tokens goes earlier, one that was used more often
    later, and each in the end (GreedyDual-Size-Frequency: Cherkasova, 1998, for pages of one size). Leaves first: an
    ancestor is used whenever a descendant is.

    pinned pages never go; there are at most `most_pinned` of them.
    """

    def __init__(self, allocator: PageAllocator, page_tokens: int, most_pinned: int) -> None:
        self.allocator = allocator
        self.page_tokens = page_tokens
        self.most_pinned = most_pinned
        self.pinned_pages = 0
        self.queries = 0  # prompts looked up to be run
        self.queried_tokens = 0  # all of their tokens
        self.hit_tokens = 0  # of these, those that were cached
        self.evictions = 0  # pages
        self._root = Node(None, (), -1, None, pinned=True)
        self._floor = 0.0
        self._uses = 0
        self._nodes: dict[int, Node] = {}  # by number of their latest use
        self._heap: list[tuple[float, int]] = []  # leaves: worth, number of the use; it may have been used since
        allocator.evict = self.evict

    @property
    def cached_pages(self) -> int:
        """Pages in the tree, those pinned among them."""
        return len(self._nodes)

    def match_length(self, tenant: Salt, tokens: Sequence[int]) -> int:
        """How many of a prompt's tokens are cached. Changes nothing."""
        return self.find(tenant, tokens).tokens

    def find(self, tenant: Salt, tokens: Sequence[int]) -> Match:
        """The longest cached beginning of tokens[:-1] that `tenant` may see. Changes nothing, holds nothing."""
        node, most = self._root, len(tokens) - 1
        nodes: list[Node] = []
        while True:
            at = len(nodes) * self.page_tokens
            part = tuple(tokens[at : min(at + self.page_tokens, most)])
            child = _child(node, tenant, part) if len(part) == self.page_tokens else None
            if child is None:
                break
            nodes.append(child)
            node = child
        partial, length = _nearest(node, tenant, part)
        if length < LEAST_COPIED:
            partial, length = None, 0
        return Match(tuple(nodes), partial, at + length)

    def hold(self, match: Match) -> list[int]:
        """The pages to share, held for the caller to give back."""
        pages = [node.page for node in match.nodes]
        self.allocator.share(pages)
        return pages

    def record(self, match: Match, asked: int) -> None:
        """Counts a prompt of `asked` tokens that runs with `match`, whose pages are worth more now."""
        self.queries += 1
        self.queried_tokens += asked
        self.hit_tokens += match.tokens
        for node in (*match.nodes, *([match.partial] if match.partial else [])):
            if node.parent is not None:  # taking pages for the very prompt may have cost the page it is copied from
                node.uses = min(node.uses + 1, MOST_USES)
                self._touch(node)

    def insert(self, tenant: Salt, tokens: Sequence[int], pages: list[int]) -> None:
        """Keeps the pages that hold `tokens`, where they are not cached yet; the caller still holds them, too.

        Where other pages hold the same already, it gives its own back and holds those: whoever holds a page holds all
        before it, so that every idle page can be evicted.
        """
        node = self._root
        for at in range(0, len(tokens), self.page_tokens):
            part = tuple(tokens[at : at + self.page_tokens])
            child = _child(node, tenant, part)
            if child is not None:
                self._touch(child)
                own = pages[at // self.page_tokens]
                if len(part) == self.page_tokens and child.page != own:
                    self.allocator.share([child.page])
                    pages[at // self.page_tokens] = child.page
                    self.allocator.give([own])
            elif len(part) < LEAST_COPIED or _nearest(node, tenant, part)[1] == len(part):
                return
            else:
                child = self._add(node, tenant, part, pages[at // self.page_tokens])
            node = child

    def pin(self, tenant: Salt, tokens: Sequence[int], pages: Sequence[int]) -> int:
        """Keeps the pages that hold `tokens` for ever, for one tenant or, with None, for all; returns how many tokens.

        What would be too few tokens to be copied out of a page is left out.
        """
        tokens = tokens[: self._worthwhile(len(tokens))]
        node = self._root
        for at in range(0, len(tokens), self.page_tokens):
            part = tuple(tokens[at : at + self.page_tokens])
            child = _child(node, tenant, part)
            if child is None and len(part) < self.page_tokens:
                nearest, length = _nearest(node, tenant, part)
                child = nearest if length == len(part) else None
            if child is None:
                child = self._add(node, tenant, part, pages[at // self.page_tokens])
            if not child.pinned:
                child.pinned = True
                self.allocator.pin(child.page)
                self.pinned_pages += 1
            node = child
        return len(tokens)

    def unpinned(self, tenant: Salt, tokens: Sequence[int]) -> int:
        """How many pages pinning `tokens` would pin beside those that are."""
        length = self._worthwhile(len(tokens))
        match = self.find(tenant, [*tokens[:length], 0])
        pinned = sum(node.pinned for node in match.nodes)
        pinned += match.tokens == length and match.partial is not None and match.partial.pinned
        return -(-length // self.page_tokens) - pinned

    def evict(self, pages: int) -> None:
        """Lets go of `pages` pages, or of all that may go, the least worthy first."""
        held = []
        while pages > 0 and self._heap:
            entry = heappop(self._heap)
            node = self._nodes.get(entry[1])
            if node is None or node.pinned or node.children:
                continue
            if not self.allocator.is_idle(node.page):
                held.append(entry)
                continue
            self._floor = max(self._floor, node.worth)
            self._remove(node)
            self.evictions += 1
            pages -= 1
        for entry in held:
            heappush(self._heap, entry)

    def held(self) -> list[int]:
        """The pages that the tree holds, for PageAllocator.check_integrity."""
        return [node.page for node in self._nodes.values()]

    def check_integrity(self) -> None:
        """Asserts that the tree is what its nodes say, and that all that may be evicted can be found for it."""
        nodes = list(self._walk())
        assert {id(node) for node in nodes} == {id(node) for node in self._nodes.values()}
        assert sum(node.pinned for node in nodes) == self.pinned_pages
        listed = set(self._heap)
        for node in nodes:
            parent = node.parent
            assert parent is not None and parent.tenant in (None, node.tenant), "a tenant's page below another's"
            assert 1 <= len(node.tokens) <= self.page_tokens
            assert not node.children or len(node.tokens) == self.page_tokens, "a page that is not full has children"
            assert parent.pinned or not node.pinned, "a pinned page may lose its beginning"
            assert node.tenant is not None or node.pinned, "a page for all is not pinned"
            assert node.pinned or node.children or (node.worth, node.used) in listed, "a leaf that is never evicted"
            idle = self.allocator.is_idle(node.page)
            assert parent.pinned or idle or not self.allocator.is_idle(parent.page), "a page is held, its parent not"
            for siblings in node.children.values():
                assert siblings and siblings == sorted(siblings, key=_tokens_of)

    def _worthwhile(self, length: int) -> int:
        """Of a prefix of so many tokens, those that can be matched: no page is copied for a few."""
        rest = length % self.page_tokens
        return length if rest >= LEAST_COPIED else length - rest

    def _add(self, parent: Node, tenant: Salt, tokens: tuple[int, ...], page: int) -> Node:
        """A new leaf; it replaces one that holds but the beginning of it."""
        siblings = parent.children.setdefault(tenant, [])
        at = bisect_left(siblings, tokens, key=_tokens_of)
        before = siblings[at - 1] if at > 0 else None
        if before and not before.pinned and before.tokens == tokens[: len(before.tokens)]:
            del siblings[at - 1]
            self._forget(before)
            at -= 1
        node = Node(tenant, tokens, page, parent)
        siblings.insert(at, node)
        self.allocator.keep(page)
        self._touch(node)
        return node

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        siblings = parent.children[node.tenant]
        del siblings[bisect_left(siblings, node.tokens, key=_tokens_of)]
        if not siblings:
            del parent.children[node.tenant]
        self._forget(node)
        if not parent.children:
            self._list(parent)

    def _forget(self, node: Node) -> None:
        node.parent = None
        del self._nodes[node.used]
        self.allocator.drop(node.page)

    def _touch(self, node: Node) -> None:
        self._nodes.pop(node.used, None)
        self._uses += 1
        node.used = self._uses
        self._nodes[node.used] = node
        node.worth = self._floor + node.uses * len(node.tokens) / self.page_tokens
        if not node.children:
            self._list(node)

    def _list(self, leaf: Node) -> None:
        if leaf.pinned:
            return
        heappush(self._heap, (leaf.worth, leaf.used))
        if len(self._heap) > 4 * len(self._nodes) + 64:
            self._heap = [entry for entry in set(self._heap) if entry[1] in self._nodes]
            heapify(self._heap)

    def _walk(self) -> Iterator[Node]:
        todo = [self._root]
        while todo:
            below = [child for siblings in todo.pop().children.values() for child in siblings]
            yield from below
            todo += below


def _salts(tenant: Salt) -> tuple[Salt, ...]:
    """Whose pages one may see: what is everybody's first, but it was computed without an adapter."""
    return (None, tenant) if isinstance(tenant, str) else (tenant,)


def _child(node: Node, tenant: Salt, tokens: tuple[int, ...]) -> Node | None:
    """The child that holds exactly `tokens`."""
    for salt in _salts(tenant):
        siblings = node.children.get(salt, [])
        at = bisect_left(siblings, tokens, key=_tokens_of)
        if at < len(siblings) and siblings[at].tokens == tokens:
            return siblings[at]
    return None


def _nearest(node: Node, tenant: Salt, tokens: tuple[int, ...]) -> tuple[Node | None, int]:
    """The child that begins with the most of `tokens`, and how many: a neighbour of where they belong in the order."""
    best: Node | None = None
    longest = 0
    for salt in _salts(tenant):
        siblings = node.children.get(salt, [])
        at = bisect_left(siblings, tokens, key=_tokens_of)
        for sibling in siblings[max(0, at - 1) : at + 1]:
            length = 0
            for mine, other in zip(tokens, sibling.tokens, strict=False):
                if mine != other:
                    break
                length += 1
            if length > longest:
                best, longest = sibling, length
    return best, longest
