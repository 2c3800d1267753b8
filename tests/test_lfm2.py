"""LFM2 through the whole engine: prefixes shared from any token on, sequences side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import millis
from millis.tasks.model import LanguageModel
from reference import folder_model, greedy, tiny_model
from test_export import save, tiny_tokenizer

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("lfm2")
    tiny_model("lfm2_wide").save_pretrained(path)
    return save(path, tiny_tokenizer())


@pytest.fixture
def load(folder: Path) -> Iterator[Any]:
    loaded: list[LanguageModel] = []

    def make(**options: Any) -> LanguageModel:
        loaded.append(millis.load(folder, threads=2, precision="exact", **options))
        return loaded[-1]

    yield make
    for model in loaded:
        model.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 90, length).tolist()


def test_greedy_tokens_are_those_of_transformers(folder: Path, load: Any) -> None:
    ids = prompt(50)
    want, _ = greedy(folder_model(folder), ids, COUNT)
    assert load(speculation="off").generate(ids, max_tokens=COUNT, ignore_eos=True).tokens == want


@pytest.mark.parametrize("shared", [64, 75, 95])
def test_a_beginning_seen_before_is_not_computed_again(shared: int, load: Any) -> None:
    """The tokens before the place where texts part are still there for the convolutions behind it."""
    cached, plain = load(prefix_cache=True, speculation="off"), load(speculation="off")
    for seed in (1, 2, 3):
        ids = prompt(shared) + [90 + seed] + prompt(5, seed)
        mine, other = (lm.generate(ids, max_tokens=COUNT, ignore_eos=True) for lm in (cached, plain))
        assert mine.tokens == other.tokens
        assert mine.timings.cached_tokens == (shared if seed > 1 else 0)


def test_sequences_side_by_side_are_those_alone(load: Any) -> None:
    lm = load(speculation="off", prefix_cache=True)
    prompts = [prompt(length, length) for length in (1, 2, 31, 40, 70)]
    alone = [lm.generate(ids, max_tokens=COUNT, ignore_eos=True).tokens for ids in prompts]
    streams = [lm.stream(ids, max_tokens=COUNT, ignore_eos=True) for ids in prompts]
    for stream in streams:
        for _ in stream:
            pass
    assert [stream.completion.tokens for stream in streams] == alone
