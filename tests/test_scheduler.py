"""The scheduler alone: order, budgets, pages. No runner, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millis.engine.kvcache import PageAllocator
from millis.engine.request import Request
from millis.engine.scheduler import Chunk, Scheduler
from millis.types import SamplingParams


def request(prompt: int, limit: int = 1000) -> Request:
    return Request(
        prompt_tokens=prompt, tokens=[0] * prompt, params=SamplingParams(), sampler=None, limit=limit, arrival_s=0
    )


def scheduler(pages: int = 100, max_tokens: int = 8, max_sequences: int = 3) -> Scheduler:
    return Scheduler(pages=pages, page_tokens=4, max_tokens=max_tokens, max_sequences=max_sequences)


def shape(chunks: list[Chunk]) -> list[tuple[int, int, bool]]:
    return [(c.start, c.length, c.last) for c in chunks]


def run(chunks: list[Chunk]) -> None:
    for c in chunks:
        c.request.computed = c.start + c.length
        if c.last:
            c.request.tokens.append(0)


def test_allocator_takes_all_or_nothing() -> None:
    allocator = PageAllocator(3)
    first = allocator.take(2)
    assert first is not None and len(set(first)) == 2
    assert allocator.take(2) is None
    assert allocator.free == 1
    allocator.give(first)
    assert first == [] and allocator.free == 3
    assert allocator.take(0) == []
    allocator.check_integrity([])


def test_integrity_check_finds_a_leak_and_a_double() -> None:
    allocator = PageAllocator(3)
    page = allocator.take(1)
    assert page is not None
    with pytest.raises(AssertionError, match="leaked"):
        allocator.check_integrity([])
    with pytest.raises(AssertionError, match="twice"):
        allocator.check_integrity([page, page])


def test_a_long_prompt_is_cut_and_only_its_last_chunk_samples() -> None:
    s = scheduler()
    s.add(request(19))
    seen = []
    for _ in range(4):
        chunks = s.schedule()
        seen += shape(chunks)
        run(chunks)
    assert seen == [(0, 8, False), (8, 8, False), (16, 3, True), (19, 1, True)]


def test_decodes_come_before_prefill() -> None:
    s = scheduler()
    s.add(request(3))
    run(s.schedule())
    s.add(request(20))
    assert shape(s.schedule()) == [(3, 1, True), (0, 7, False)]


def test_arrival_order_and_sequence_limit() -> None:
    s = scheduler()
    requests = [request(2) for _ in range(5)]
    for r in requests:
        s.add(r)
    assert [c.request for c in s.schedule()] == requests[:3]
    s.remove(requests[0])
    assert requests[3] not in s.running
    run(s.schedule())
    assert s.running == [requests[1], requests[2], requests[3]]


def test_the_latest_arrival_pays_for_missing_pages() -> None:
    s = scheduler(pages=3)
    first, second = request(4), request(4)
    s.add(first)
    s.add(second)
    run(s.schedule())  # a page each
    run(s.schedule())  # first takes the third page, second has none to grow into
    assert s.running == [first]
    assert list(s.waiting) == [second]
    assert second.pages == [] and second.computed == 0
    s.check_integrity()


def test_remove_forgets_waiting_and_running_alike() -> None:
    s = scheduler()
    a, b = request(3), request(3)
    s.add(a)
    run(s.schedule())
    s.add(b)
    s.remove(b)
    s.remove(a)
    s.remove(a)
    assert not s.running and not s.waiting and s.allocator.free == 100


def test_reclaim_takes_from_the_latest_and_says_when_it_cannot() -> None:
    s = scheduler(pages=4)
    a, b = request(8), request(4)
    s.add(a)
    s.add(b)
    run(s.schedule())
    run(s.schedule())
    assert s.reclaim(1)
    assert a in s.running
    assert s.reclaim(4)
    assert not s.running
    assert not s.reclaim(5)


def drafted(chunks: list[Chunk]) -> list[int]:
    return [len(c.drafts) for c in chunks]


def test_drafts_run_behind_a_decode_and_are_used_once() -> None:
    s = scheduler(max_tokens=16)
    r = request(3)
    s.add(r)
    r.drafts = [7, 8]
    assert drafted(s.schedule()) == [0]  # not behind a prompt
    r.computed = 3
    r.tokens.append(0)
    r.drafts = [7, 8]
    (chunk,) = s.schedule()
    assert (chunk.start, chunk.length, chunk.drafts) == (3, 1, [7, 8])
    assert len(r.pages) * 4 >= 6
    assert r.drafts == []
    s.check_integrity()


def test_drafts_leave_every_decode_its_token() -> None:
    s = scheduler(max_tokens=5)
    requests = [request(1) for _ in range(3)]
    for r in requests:
        s.add(r)
    run(s.schedule())
    assert s.decoding() == requests
    for r in requests:
        r.drafts = [1, 2, 3]
    chunks = s.schedule()
    assert [c.request for c in chunks] == requests
    assert drafted(chunks) == [2, 0, 0]


def test_drafts_take_no_page_from_anybody() -> None:
    s = scheduler(pages=3, max_tokens=20)
    a, b = request(4), request(4)
    for r in (a, b):
        s.add(r)
    run(s.schedule())
    b.drafts, a.drafts = [1] * 3, [1] * 6
    chunks = s.schedule()  # one page is left for two that need one each: the latest waits, as without drafts
    assert [(c.request, len(c.drafts)) for c in chunks] == [(a, 3)]
    assert b in s.waiting and b.drafts == []
    s.check_integrity()


@given(st.data())
def test_any_traffic_finishes_without_leak(data: st.DataObject) -> None:
    s = scheduler(pages=data.draw(st.integers(6, 12)), max_tokens=data.draw(st.integers(1, 9)))
    open_requests: list[Request] = []
    arrivals = data.draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 11)), min_size=1, max_size=8))
    for _ in range(800):
        if arrivals:
            prompt, output = arrivals.pop()
            open_requests.append(request(prompt, prompt + output))
            s.add(open_requests[-1])
        chunks = s.schedule()
        assert len({id(c.request) for c in chunks}) == len(chunks)
        for c in chunks:
            assert c.request.computed == c.start and len(c.request.pages) * 4 >= c.start + c.length
        run(chunks)
        for r in [r for r in open_requests if len(r.tokens) >= r.limit]:
            s.remove(r)
            open_requests.remove(r)
        s.check_integrity()
        if not open_requests and not arrivals:
            break
    assert not open_requests, "traffic never finished"
    assert s.allocator.free == s.allocator.pages
