"""Trees of continuations: their shape by brute force, forwards through the engine, deadlines, shared steps."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from fake import FakeRunner, continuation, next_token
from millis.engine.engine import Engine
from millis.engine.tree import parts, token_tree
from millis.types import DeadlineError, SamplingParams
from simulated import engine as simulated_engine
from simulated import in_time


def words(seed: int, count: int = 30, longest: int = 6, letters: int = 3) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(letters) for _ in range(source.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_spells_its_continuations_and_shares_their_beginnings(seed: int) -> None:
    given = words(seed)
    tree = token_tree(given)
    for tokens, path in zip(given, tree.paths, strict=True):
        assert [tree.targets[edge] for edge in path] == tokens
        assert tree.rows[path[0]] == -1
        for above, below in pairwise(path):  # the edge below is asked behind the node that the one above leads to
            node = tree.rows[below]
            assert (tree.parents[node], tree.tokens[node]) == (tree.rows[above], tree.targets[above])
    assert len(tree.tokens) == len({tuple(t[:n]) for t in given for n in range(1, len(t))})
    assert len(tree.targets) == len({tuple(t[:n]) for t in given for n in range(1, len(t) + 1)})
    assert tree.rows == sorted(tree.rows) and all(parent < node for node, parent in enumerate(tree.parents))
    for depth, level in enumerate(tree.levels, 1):
        cut = token_tree([tokens[:depth] for tokens in given])
        assert level == (len(cut.tokens), len(cut.targets), len(set(cut.rows)))


def test_continuations_are_divided_where_no_step_holds_them() -> None:
    given = tuple(map(tuple, [*words(1), [9] * 50, *words(2)]))
    found = parts(given, 12)
    assert sum(count for count, _ in found) == len(given)
    at = 0
    for count, tree in found:
        if tree is None:
            assert given[at : at + count] == ((9,) * 50,)
        else:
            assert len(tree.tokens) <= 12 and len(tree.paths) == count
        at += count
    assert parts((), 12) == ()


def engine(**sizes: int) -> Engine:
    return Engine(FakeRunner(**{"max_tokens": 64, "pages": 128, "context": 256, **sizes}), frozenset())


def plain(prompt: list[int], tokens: list[int]) -> int:
    return sum(-abs(token - next_token([*prompt, *tokens[:i]])) for i, token in enumerate(tokens))


@pytest.mark.parametrize("max_tokens", [16, 40, 200])
def test_scores_are_those_of_one_continuation_at_a_time(max_tokens: int) -> None:
    prompt = list(range(23))
    given = [*words(3), continuation(prompt, 12)]
    e = engine(max_tokens=max_tokens)
    assert e.score(prompt, given) == [plain(prompt, tokens) for tokens in given]
    if max_tokens == 200:
        assert len(e.runner.batches) == 1  # prompt and all
    assert e.scheduler.allocator.free == e.runner.pages


def test_a_cached_prompt_is_not_computed_again_though_the_engine_has_no_prefix_cache() -> None:
    e = engine()
    head, given = list(range(40)), words(4, count=8)
    for text in ([1, 2], [3, 4, 5]):
        request = e.submit_score(head + text, given, cache=True)
        e.wait(request)
        assert request.score is not None
        assert request.score.values == [plain(head + text, tokens) for tokens in given]
    assert request.timings.cached_tokens == 40 and request.timings.steps == 1
    out = e.submit(head, SamplingParams(max_tokens=4, ignore_eos=True))
    e.wait(out)
    assert out.timings.cached_tokens == 0 and out.output == continuation(head, 4)  # answers stay as they are
    e.scheduler.check_integrity()


def test_requests_share_steps() -> None:
    e = engine()
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    asked = [e.submit_score(prompt, [[1, 2], [1, 3]]) for prompt in prompts]
    for request in asked:
        e.wait(request)
    assert e.runner.batches == [[4] * 4]
    for prompt, request in zip(prompts, asked, strict=True):
        assert request.score is not None
        assert request.score.values == [plain(prompt, [1, 2]), plain(prompt, [1, 3])]


def test_scores_beside_an_answer_leave_it_as_it_is() -> None:
    e = engine(pages=12)
    request = e.submit([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
    given = words(5, count=12)
    asked = [e.submit_score([7] * n, given) for n in range(2, 9)]
    while e.has_work:
        e.step()
        e.scheduler.check_integrity()
    assert request.output == continuation([1, 2, 3], 20)
    for n, one in zip(range(2, 9), asked, strict=True):
        assert one.score is not None and one.score.values == [plain([7] * n, tokens) for tokens in given]
    assert e.scheduler.allocator.free == 12


def test_a_short_deadline_counts_first_tokens_only() -> None:
    e = simulated_engine(noise=0.0)
    given = [[i, *range(i, i + 12)] for i in range(60)]
    whole = e.submit_score([1] * 20, given, deadline_s=e.clock() + 5)
    while whole.finish_reason is None:
        e.step()
    assert whole.finish_reason == "stop" and whole.score is not None and whole.score.depth is None
    part = e.submit_score([1] * 20, given, deadline_s=e.clock() + 0.06)
    while part.finish_reason is None:
        e.step()
    assert part.finish_reason == "deadline" and part.score is not None and in_time(part)
    assert part.score.depth is not None and 1 <= part.score.depth < 13
    assert len(part.score.values) == 60
    with pytest.raises(DeadlineError):
        e.submit_score([1] * 2000, given, deadline_s=e.clock() + 0.02)
    e.scheduler.check_integrity()
