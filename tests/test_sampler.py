"""The native sampler against closed forms and against frequencies of many draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from millis._native import Sampler

LOGITS = np.array([1.0, 3.0, 2.0, -1.0, 2.5, 0.0], np.float32)
DRAWS = 20_000


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


def frequencies(logits: np.ndarray, **params: Any) -> np.ndarray:
    sampler = Sampler(len(logits), seed=5, **params)
    counts = Counter(sampler.sample(logits)[0] for _ in range(DRAWS))
    return np.array([counts[i] for i in range(len(logits))]) / DRAWS


def close(got: np.ndarray, want: np.ndarray) -> None:
    """Within five standard deviations of the binomial."""
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / DRAWS) + 1e-12).all(), (got, want)


def test_greedy_takes_the_first_of_the_best() -> None:
    assert Sampler(6).sample(LOGITS)[0] == 1
    assert Sampler(3).sample(np.array([2, 7, 7], np.float32))[0] == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    close(frequencies(LOGITS, temperature=temperature), softmax(LOGITS / temperature))


def test_a_tiny_temperature_is_greedy() -> None:
    assert frequencies(LOGITS, temperature=1e-6)[1] == 1


@pytest.mark.parametrize("k", [1, 2, 4, 6, 100])
def test_top_k(k: int) -> None:
    keep = np.sort(LOGITS)[::-1][min(k, 6) - 1]
    close(frequencies(LOGITS, temperature=1.0, top_k=k), softmax(np.where(LOGITS >= keep, LOGITS, -np.inf)))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.8, 0.95, 1.0])
def test_top_p_keeps_the_smallest_set_of_that_mass(p: float) -> None:
    probabilities = softmax(LOGITS)
    order = np.argsort(-probabilities)
    keep = order[: int((np.cumsum(probabilities[order]) < p).sum()) + 1]
    want = np.zeros(6)
    want[keep] = probabilities[keep] / probabilities[keep].sum()
    close(frequencies(LOGITS, temperature=1.0, top_p=p), want)


@pytest.mark.parametrize("p", [0.05, 0.3, 1.0])
def test_min_p_is_relative_to_the_best(p: float) -> None:
    probabilities = softmax(LOGITS)
    kept = np.where(probabilities >= p * probabilities.max() - 1e-12, probabilities, 0)
    close(frequencies(LOGITS, temperature=1.0, min_p=p), kept / kept.sum())


def test_all_filters_together_stay_inside_each() -> None:
    got = frequencies(LOGITS, temperature=1.5, top_k=4, top_p=0.9, min_p=0.1)
    assert set(np.flatnonzero(got)) <= {0, 1, 2, 4}
    assert got.sum() == pytest.approx(1)


def test_logit_bias_adds_and_forbids() -> None:
    assert Sampler(6, bias=[(3, 10.0)]).sample(LOGITS)[0] == 3
    assert Sampler(6, bias=[(1, float("-inf"))]).sample(LOGITS)[0] == 4
    want = softmax(LOGITS + np.array([0, 0, 1.5, 0, 0, 0], np.float32))
    close(frequencies(LOGITS, temperature=1.0, bias=[(2, 1.5)]), want)


def test_repetition_penalty_counts_prompt_and_output() -> None:
    sampler = Sampler(6, repetition=2.0)
    sampler.seen(np.array([1, 3], np.int32))  # logit 3 → 1.5, logit −1 → −2
    assert sampler.sample(LOGITS)[0] == 4
    assert sampler.sample(LOGITS)[0] == 2  # 2.5 → 1.25 after its use


def test_presence_and_frequency_count_the_output_only() -> None:
    sampler = Sampler(3, presence=1.0)
    sampler.seen(np.array([0], np.int32))
    logits = np.array([2.0, 1.5, 0.9], np.float32)
    assert [sampler.sample(logits)[0] for _ in range(4)] == [0, 1, 0, 0]
    sampler = Sampler(3, frequency=0.3)
    assert [sampler.sample(logits)[0] for _ in range(5)] == [0, 0, 1, 0, 1]


def test_log_probabilities_are_the_models_own() -> None:
    sampler = Sampler(6, temperature=0.5, logprobs=3, bias=[(0, 50.0)], repetition=1.7)
    sampler.seen(np.array([0], np.int32))
    token, logprob, top = sampler.sample(LOGITS)
    want = np.log(softmax(LOGITS))
    assert token == 0
    assert logprob == pytest.approx(want[0], abs=1e-5)
    assert [t for t, _ in top] == [1, 4, 2]
    assert [p for _, p in top] == pytest.approx(want[[1, 4, 2]].tolist(), abs=1e-5)
    assert Sampler(6, logprobs=0).sample(LOGITS)[1:] == (pytest.approx(want[1], abs=1e-5), [])
    assert len(Sampler(6, logprobs=64).sample(LOGITS)[2]) == 6


def test_same_seed_same_draws() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(6, temperature=1.0, seed=seed)
        return [sampler.sample(LOGITS)[0] for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_unusable_logits_are_never_chosen() -> None:
    holed = np.array([np.nan, 1.0, -np.inf, np.nan, 0.5], np.float32)
    sampler = Sampler(5, temperature=1.0, top_p=0.99, logprobs=5)
    assert {sampler.sample(holed)[0] for _ in range(200)} == {1, 4}
    assert Sampler(5).sample(holed)[0] == 1
    assert Sampler(2, temperature=1.0).sample(np.full(2, np.nan, np.float32))[0] == -1
    assert Sampler(2).sample(np.full(2, -np.inf, np.float32))[0] == -1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5},
        {"repetition": 0.0}, {"presence": float("nan")}, {"bias": [(6, 1.0)]}, {"bias": [(-1, 1.0)]},
        {"bias": [(0, float("nan"))]},
    ],
)  # fmt: skip
def test_bad_parameters(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sampler"):
        Sampler(6, **params)


def test_bad_arrays() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Sampler(6).sample(LOGITS[:5])
    with pytest.raises(ValueError, match="vocabulary"):
        Sampler(6, repetition=2.0).seen(np.array([6], np.int32))
    with pytest.raises(TypeError):
        Sampler(6).sample(LOGITS.astype(np.float64).reshape(2, 3))
