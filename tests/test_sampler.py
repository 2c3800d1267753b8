"""The native sampler against closed forms and against frequencies of many draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest

from millis._native import MASK_LATE, Sampler

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


def bits(allowed: Iterable[int], vocab: int) -> np.ndarray:
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 1.0}, {"temperature": 3.0, "top_k": 5}, {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2}, {"repetition": 3.0, "temperature": 1.0},
        {"presence": 2.0, "frequency": 2.0, "temperature": 0.7}, {"bias": [(t, 50.0) for t in range(0, 70, 2)]},
        {"bias": [(3, 1e4), (64, float("inf"))], "temperature": 1.0}, {"logprobs": 3, "temperature": 1.0},
    ],
)  # fmt: skip
def test_only_what_the_mask_allows_is_chosen(params: dict[str, Any]) -> None:
    random = np.random.default_rng(7)
    sampler = Sampler(70, seed=3, **params)
    for _ in range(300):
        allowed = set(random.choice(70, random.integers(1, 12), replace=False).tolist())
        sampler.set_mask(bits(allowed, 70))
        assert sampler.sample(random.normal(0, 4, 70).astype(np.float32))[0] in allowed


def test_a_masked_draw_follows_the_allowed_tokens_alone() -> None:
    sampler = Sampler(6, temperature=1.3, seed=5)
    sampler.set_mask(bits([0, 2, 3], 6))
    counts = Counter(sampler.sample(LOGITS)[0] for _ in range(DRAWS))
    kept = np.where([True, False, True, True, False, False], LOGITS / 1.3, -np.inf).astype(np.float32)
    close(np.array([counts[i] for i in range(6)]) / DRAWS, softmax(kept))


def test_a_mask_leaves_reported_log_probabilities_alone_and_can_be_taken_away() -> None:
    sampler = Sampler(6, logprobs=2)
    sampler.set_mask(bits([3], 6))
    token, logprob, top = sampler.sample(LOGITS)
    assert token == 3 and logprob == pytest.approx(np.log(softmax(LOGITS))[3], abs=1e-5)
    assert [t for t, _ in top] == [1, 4]
    sampler.set_mask(None)
    assert sampler.sample(LOGITS)[0] == 1


def test_where_a_bias_forbids_all_that_is_allowed_the_mask_decides() -> None:
    for temperature in (0.0, 1.0):
        sampler = Sampler(6, temperature=temperature, bias=[(3, float("-inf")), (5, float("-inf")), (1, 9.0)])
        sampler.set_mask(bits([3, 5], 6))
        assert {sampler.sample(LOGITS)[0] for _ in range(20)} <= {3, 5}
    sampler.set_mask(bits([0], 6))
    assert sampler.sample(np.full(6, np.nan, np.float32))[0] == -1


def test_bad_masks_are_refused_and_the_last_good_one_stays() -> None:
    sampler = Sampler(70)
    sampler.set_mask(bits([69], 70))
    for wrong in (np.zeros(3, np.uint32), np.ones(2, np.uint32), np.ones(4, np.uint32), np.zeros(0, np.uint32)):
        with pytest.raises(ValueError, match="mask"):
            sampler.set_mask(wrong)
    with pytest.raises(ValueError, match="no token"):
        sampler.set_mask(np.array([0, 0, 1 << 6], np.uint32))  # bit 70 is beyond the vocabulary
    with pytest.raises(TypeError):
        sampler.set_mask(np.ones(3, np.int64))
    assert sampler.sample(np.arange(70, 0, -1).astype(np.float32))[0] == 69


def test_a_choice_waits_for_the_mask_that_is_announced() -> None:
    sampler = Sampler(6)
    sampler.expect_mask()
    with ThreadPoolExecutor(1) as pool:
        choice = pool.submit(sampler.sample, LOGITS)
        assert not wait([choice], 0.05).done
        sampler.set_mask(bits([5], 6))
        assert choice.result()[0] == 5


def test_a_mask_that_does_not_come_chooses_nothing() -> None:
    sampler = Sampler(6)
    sampler.expect_mask()
    assert sampler.sample(LOGITS)[0] == MASK_LATE
    sampler.set_mask(bits([5], 6))
    assert sampler.sample(LOGITS)[0] == 5


def test_biases_that_forbid_everything_do_not_count() -> None:
    sampler = Sampler(6, bias=[(i, -np.inf) for i in range(6)])
    assert sampler.sample(LOGITS)[0] == Sampler(6).sample(LOGITS)[0]


def test_committed_tokens_count_as_drawn() -> None:
    drawn = Sampler(6, temperature=1.0, seed=3, frequency=0.5)
    first = [drawn.sample(LOGITS)[0] for _ in range(10)]
    told = Sampler(6, temperature=1.0, seed=3, frequency=0.5)
    told.commit(np.array(first[:6], np.int32))
    assert [told.sample(LOGITS)[0] for _ in range(4)] == first[6:]
