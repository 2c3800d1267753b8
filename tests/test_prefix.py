"""The prefix cache's tree alone: against a list of all that was ever inserted, and by itself under any traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millis.engine.kvcache import PageAllocator, pool_tokens
from millis.engine.prefix import LEAST_COPIED, Node, RadixCache

PAGE = 8
TENANTS = ("", "a", "b")

# Few tokens and few beginnings, so that texts agree for a while and then part.
texts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3).map(lambda t: t * 4), min_size=1, max_size=5).map(
    lambda parts: [token for part in parts for token in part]
)


def cache(pages: int = 100, most_pinned: int = 10) -> RadixCache:
    return RadixCache(PageAllocator(pages), PAGE, most_pinned)


def put(c: RadixCache, tenant: str, tokens: Sequence[int]) -> None:
    """A request that computed `tokens` and ended."""
    pages = c.allocator.take(-(-len(tokens) // PAGE))
    assert pages is not None
    c.insert(tenant, tokens, pages)
    c.allocator.give(pages)
    check(c)


def check(c: RadixCache, *held: list[int]) -> None:
    c.check_integrity()
    c.allocator.check_integrity([c.held(), *held])


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def useful(length: int) -> int:
    """Of so many agreeing tokens, those that whole pages and a page worth its copying hold."""
    return length if length % PAGE >= LEAST_COPIED else length // PAGE * PAGE


def longest(known: Sequence[tuple[str | None, Sequence[int]]], tenant: str, tokens: Sequence[int]) -> int:
    """What the cache should find, by looking at everything."""
    seen = [text[: useful(len(text))] for owner, text in known if owner in (None, tenant)]
    return max((useful(agreeing(text, tokens[:-1])) for text in seen), default=0)


@settings(deadline=None)
@given(
    st.lists(texts, max_size=2),
    st.lists(st.tuples(st.sampled_from(TENANTS), texts), max_size=12),
    st.sampled_from(TENANTS),
    texts,
)
def test_it_finds_what_a_search_of_everything_finds(
    pinned: list[list[int]], inserted: list[tuple[str, list[int]]], tenant: str, prompt: list[int]
) -> None:
    c = cache(pages=200, most_pinned=100)
    for text in pinned:
        pages = c.allocator.take(-(-len(text) // PAGE)) or []
        assert c.pin(None, text, pages) == useful(len(text))
        c.allocator.give(pages)
        assert c.unpinned(None, text) == 0
        check(c)
    for owner, text in inserted:
        put(c, owner, text)
    known = [*((None, text) for text in pinned), *inserted]
    assert c.match_length(tenant, prompt) == longest(known, tenant, prompt)
    assert c.match_length("c", prompt) == longest([(None, text) for text in pinned], "c", prompt)


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    c = cache()
    text = [i % 5 for i in range(4 * PAGE)]
    put(c, "", text)
    for length in range(1, len(text) + 1):
        match = c.find("", text[:length])
        assert match.tokens == useful(length - 1)
        assert len(match.nodes) == (length - 1) // PAGE


def test_looking_changes_nothing() -> None:
    c = cache()
    put(c, "a", [1] * 20)
    before = [(node.worth, node.uses) for node in c._walk()]
    assert c.match_length("a", [1] * 20) == 16
    assert (c.queries, c.queried_tokens, c.hit_tokens) == (0, 0, 0)
    assert [(node.worth, node.uses) for node in c._walk()] == before


def test_a_longer_page_takes_the_place_of_its_beginning() -> None:
    c = cache()
    put(c, "", [1] * PAGE + [2] * 4)
    put(c, "", [1] * PAGE + [2] * 6)
    assert c.cached_pages == 2
    put(c, "", [1] * PAGE + [2] * 5)  # known already
    assert c.cached_pages == 2
    put(c, "", [1] * PAGE + [2] * 7 + [3])
    put(c, "", [1] * PAGE + [2] * 7 + [4])
    assert c.cached_pages == 3
    assert c.allocator.free == c.allocator.pages


def test_of_equal_pages_the_least_recently_used_goes() -> None:
    c = cache(pages=3)
    for token in (1, 2, 3):
        put(c, "", [token] * PAGE)
    pages = c.hold(c.find("", [1] * (PAGE + 1)))
    c.insert("", [1] * PAGE, pages)  # seen again
    c.allocator.give(pages)
    put(c, "", [4] * PAGE)
    assert [c.match_length("", [token] * (PAGE + 1)) for token in (1, 2, 3, 4)] == [PAGE, 0, PAGE, PAGE]
    assert c.evictions == 1


def test_what_spares_less_goes_first_and_what_is_used_often_stays() -> None:
    c = cache(pages=3)
    put(c, "", [1] * PAGE)
    for _ in range(3):
        c.record(c.find("", [1] * (PAGE + 1)), PAGE + 1)
    put(c, "", [2] * PAGE)
    put(c, "", [3] * LEAST_COPIED)  # the latest, but half a page
    put(c, "", [4] * PAGE)
    assert [c.match_length("", [token] * (PAGE + 1)) for token in (1, 2, 3, 4)] == [PAGE, PAGE, 0, PAGE]
    put(c, "", [5] * PAGE)
    assert [c.match_length("", [token] * (PAGE + 1)) for token in (1, 2, 4, 5)] == [PAGE, 0, PAGE, PAGE]
    for token in range(6, 20):
        put(c, "", [token] * PAGE)
    assert c.match_length("", [1] * (PAGE + 1)) == 0, "what was popular once never leaves"


def test_leaves_go_before_what_they_stand_on() -> None:
    c = cache(pages=4)
    put(c, "", [1] * 4 * PAGE)
    for left in (3, 2, 1, 0):
        c.evict(1)
        check(c)
        assert c.match_length("", [1] * 5 * PAGE) == left * PAGE


def test_a_page_that_is_held_stays() -> None:
    c = cache(pages=4)
    put(c, "", [1] * 2 * PAGE)
    put(c, "", [2] * 2 * PAGE)
    pages = c.hold(c.find("", [1] * 3 * PAGE))
    assert c.allocator.free == 2
    assert c.allocator.take(3) is None
    taken = c.allocator.take(2)
    assert taken is not None and not set(taken) & set(pages)
    check(c, pages, taken)
    c.evict(4)
    assert c.match_length("", [1] * 3 * PAGE) == 2 * PAGE
    c.allocator.give(pages)
    c.allocator.give(taken)
    assert c.allocator.free == 4


def test_two_that_computed_the_same_come_to_hold_the_same_pages() -> None:
    c = cache()
    text = [1] * 2 * PAGE
    first, second = c.allocator.take(2), c.allocator.take(2)
    assert first is not None and second is not None
    c.insert("", text, first)
    c.insert("", text, second)
    assert first == second
    assert c.allocator.free == 98
    check(c, first, second)


def test_pins_stay_and_are_everybodys_or_one_tenants() -> None:
    c = cache(pages=6)
    for tenant, token in ((None, 1), ("a", 2)):
        pages = c.allocator.take(2) or []
        c.pin(tenant, [token] * (PAGE + 4), pages)
        c.allocator.give(pages)
        check(c)
    assert c.pinned_pages == 4 and c.allocator.free == 2
    c.evict(6)
    assert [c.match_length(tenant, [1] * 20) for tenant in TENANTS] == [PAGE + 4] * 3
    assert [c.match_length(tenant, [2] * 20) for tenant in TENANTS] == [0, PAGE + 4, 0]
    put(c, "b", [1] * PAGE + [3] * PAGE)  # behind everybody's beginning, still b's own
    assert [c.match_length(t, [1] * PAGE + [3] * PAGE + [0]) for t in TENANTS] == [PAGE, PAGE, 2 * PAGE]


def test_counters() -> None:
    c = cache()
    put(c, "", [1] * 3 * PAGE)
    c.record(c.find("", [1] * 20), 20)
    c.record(c.find("", [2] * 5), 5)
    assert (c.queries, c.queried_tokens, c.hit_tokens, c.cached_pages) == (2, 25, 16, 3)
    assert c.find("", [1] * 21).tokens == 20


@dataclass
class Live:
    tenant: str
    tokens: list[int]
    pages: list[int]
    computed: int


class Traffic(RuleBasedStateMachine):
    """Requests come, run, publish and end; pages carry the tokens written to them, so that a wrong one is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache(pages=14, most_pinned=4)
        self.allocator = self.cache.allocator
        self.memory = [[-1] * PAGE for _ in range(14)]
        self.live: list[Live] = []

    def write(self, pages: list[int], tokens: list[int], first: int, end: int) -> None:
        for at in range(first, end):
            self.memory[pages[at // PAGE]][at % PAGE] = tokens[at]

    def read(self, pages: list[int], end: int) -> list[int]:
        return [self.memory[pages[at // PAGE]][at % PAGE] for at in range(end)]

    @initialize(tokens=texts, tenant=st.sampled_from((None, "a")))
    def pin(self, tokens: list[int], tenant: str | None) -> None:
        tokens = tokens[: 4 * PAGE]
        pages = self.allocator.take(-(-len(tokens) // PAGE)) or []
        self.write(pages, tokens, 0, len(tokens))
        self.cache.pin(tenant, tokens, pages)
        self.allocator.give(pages)

    @rule(tenant=st.sampled_from(TENANTS), tokens=texts, part=st.floats(0, 1))
    def start(self, tenant: str, tokens: list[int], part: float) -> None:
        match = self.cache.find(tenant, tokens)
        assert match.tokens == longest(self.paths(), tenant, tokens) == self.cache.match_length(tenant, tokens)
        assert match.tokens < len(tokens)
        pages = self.cache.hold(match)
        more = self.allocator.take(-(-len(tokens) // PAGE) - len(pages))
        if more is None:
            self.allocator.give(pages)
            return
        pages += more
        if match.partial is not None:
            self.memory[pages[len(match.nodes)]] = list(self.memory[match.partial.page])
        assert self.read(pages, match.tokens) == tokens[: match.tokens]
        self.cache.record(match, len(tokens))
        computed = match.tokens + round(part * (len(tokens) - match.tokens))
        self.write(pages, tokens, match.tokens, computed)
        self.live.append(Live(tenant, tokens, pages, computed))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.live))
        self.cache.insert(one.tenant, one.tokens[: one.computed // PAGE * PAGE], one.pages)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        one = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.cache.insert(one.tenant, one.tokens[: one.computed], one.pages)
        self.allocator.give(one.pages)

    @rule()
    def evict(self) -> None:
        before = list(self.cache._walk())
        held = {page for one in self.live for page in one.pages}
        may_go = [n for n in before if not n.pinned and not n.children and n.page not in held]
        self.cache.evict(1)
        gone = set(map(id, before)) - set(map(id, self.cache._walk()))
        assert len(gone) == min(1, len(may_go))
        for node in before:
            assert id(node) not in gone or (node.worth, node.used) == min((n.worth, n.used) for n in may_go)

    @rule()
    def take_everything(self) -> None:
        """What is said to be free is free."""
        taken = self.allocator.take(self.allocator.free)
        assert taken is not None and self.allocator.free == 0
        held = {page for one in self.live for page in one.pages}
        assert not held & set(taken)
        self.allocator.give(taken)

    def paths(self) -> list[tuple[str | None, list[int]]]:
        return [(node.tenant, tokens_to(node)) for node in self.cache._walk()]

    @invariant()
    def all_is_well(self) -> None:
        check(self.cache, *(one.pages for one in self.live))
        for node in self.cache._walk():
            assert tuple(self.memory[node.page][: len(node.tokens)]) == node.tokens
        for one in self.live:
            assert self.read(one.pages, one.computed) == one.tokens[: one.computed]


def tokens_to(node: Node) -> list[int]:
    return [*(tokens_to(node.parent) if node.parent is not None else []), *node.tokens]


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_integrity_checks_find_what_is_wrong() -> None:
    c = cache()
    put(c, "", [1] * PAGE)
    (node,) = c._walk()
    node.worth += 1
    with pytest.raises(AssertionError, match="never evicted"):
        c.check_integrity()
    node.worth -= 1
    with pytest.raises(AssertionError, match="leaked"):
        c.allocator.check_integrity([])
    with pytest.raises(AssertionError, match="nobody holds"):
        c.allocator.give([node.page, node.page])


@pytest.mark.parametrize(
    ("memory", "expected"), [(None, 1000), (0, 1000), (40 * 2500, 2500), (1 << 40, 8000), (40 * 999, 1000)]
)
def test_the_pool_serves_all_sequences_within_a_quarter_of_memory(memory: int | None, expected: int) -> None:
    assert pool_tokens(1000, 8, 10, memory) == expected
