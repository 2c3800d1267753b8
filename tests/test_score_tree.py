"""Steps over trees of tokens on tiny models: every path alone gives the same logits, on every ISA; hostile arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from millis import _native
from millis.config import EngineConfig
from millis.engine.native_runner import NativeRunner
from millis.engine.runner import Batch
from millis.models.load import Model, load_model
from millis.models.oracle import Oracle
from reference import TINY, tiny_model
from test_runtime import ints

PREFIX, TRUNK, NODES = 37, 5, 40
ROWS = TRUNK + NODES


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(folder)
            made[name] = load_model(folder)
        return made[name]

    return load


class Tree:
    """A prefix, a chain of tokens, and branches that grow out of it at random; some rows are asked several targets."""

    def __init__(self, vocab: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.prefix = random.integers(0, vocab, PREFIX).tolist()
        self.tokens = random.integers(0, vocab, ROWS).tolist()
        self.parents = [i - 1 for i in range(TRUNK)] + [int(random.integers(TRUNK - 1, i)) for i in range(TRUNK, ROWS)]
        self.rows = sorted([*range(ROWS), *random.integers(0, ROWS, 10).tolist()])
        self.targets = random.integers(0, vocab, len(self.rows)).tolist()

    def text(self, row: int) -> list[int]:
        path = []
        while row >= 0:
            path.append(self.tokens[row])
            row = self.parents[row]
        return [*self.prefix, *reversed(path)]

    def batch(self, pages: list[int]) -> Batch:
        table = ints([pages])
        return Batch(ints(self.tokens), ints([PREFIX]), ints([ROWS]), table, parents=ints(self.parents))


def run(runner: NativeRunner, tree: Tree) -> np.ndarray:
    pages = [2, 0, 1]
    head = Batch(ints(tree.prefix), ints([0]), ints([PREFIX]), ints([pages]))
    runner.score(head, ints([-1] * PREFIX))
    return runner.score_tree(tree.batch(pages), ints(tree.rows), ints(tree.targets))


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_tree_is_scored_as_its_paths_are_by_the_oracle(name: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(name)
    tree = Tree(model.plan.vocab, 1)
    oracle = Oracle(model.plan, model.checkpoint.tensors)
    logs: dict[tuple[int, ...], np.ndarray] = {}
    for leaf in set(range(ROWS)) - set(tree.parents):
        logits = np.asarray(oracle.logits(tree.text(leaf)), np.float64)
        logits -= logits.max(-1, keepdims=True)
        for end in range(PREFIX, len(logits)):
            logs[tuple(tree.text(leaf)[: end + 1])] = logits[end] - np.log(np.exp(logits[end]).sum())
    want = [logs[tuple(tree.text(row))][target] for row, target in zip(tree.rows, tree.targets, strict=True)]
    for threads in (1, 3):
        config = EngineConfig(precision="exact", threads=threads, max_batch_tokens=64, cache_tokens=128)
        np.testing.assert_allclose(run(NativeRunner(model, config), tree), want, atol=3e-4)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_every_isa_masks_alike(isa: str, tiny: Callable[[str], Model]) -> None:
    model = tiny("gemma3")  # windows beside whole attention
    tree = Tree(model.plan.vocab, 2)
    config = EngineConfig(threads=2, max_batch_tokens=64, cache_tokens=128)
    want = run(NativeRunner(model, replace(config, precision="exact")), tree)
    np.testing.assert_allclose(run(NativeRunner(model, replace(config, isa=isa)), tree), want, atol=0.05)


@pytest.mark.parametrize(
    ("parents", "rows", "targets", "message"),
    [
        ([-1, 1], [0], [1], "parent comes before"),
        ([-1, -2], [0], [1], "parent comes before"),
        ([-1], [0], [1], "one parent for each token"),
        ([], [0], [1], "one parent for each token"),
        ([-1, 0], [1, 0], [1, 1], "rows ascend"),
        ([-1, 0], [2], [1], "rows ascend"),
        ([-1, 0], [-1], [1], "rows ascend"),
        ([-1, 0], [0], [10**6], "target out of the vocabulary"),
        ([-1, 0], [0], [-1], "target out of the vocabulary"),
        ([-1, 0], [0, 1], [1], "one row for each target"),
    ],
)
def test_arrays_that_are_no_tree_are_refused(
    parents: list[int], rows: list[int], targets: list[int], message: str, tiny: Callable[[str], Model]
) -> None:
    runner = NativeRunner(tiny("llama"), EngineConfig(threads=1, max_batch_tokens=64, cache_tokens=64))
    given = Batch(ints([1, 2]), ints([0]), ints([2]), ints([[0]]), parents=ints(parents))
    with pytest.raises(ValueError, match=message):
        runner.score_tree(given, ints(rows), ints(targets))


def test_a_tree_may_take_more_slots_than_the_context_has_positions(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    runner = NativeRunner(model, EngineConfig(threads=1, max_batch_tokens=256, cache_tokens=4 * model.plan.context))
    context = runner.context
    wide = [-1, *[0] * 99]
    start = context - 2
    pages = list(range(-(-(start + 100) // 32)))
    given = Batch(ints([1] * 100), ints([start]), ints([100]), ints([pages]), parents=ints(wide))
    assert len(runner.score_tree(given, ints([99]), ints([3]))) == 1
    deep = replace(given, parents=ints([-1, *range(99)]))
    with pytest.raises(ValueError, match="positions out of the context"):
        runner.score_tree(deep, ints([99]), ints([3]))
