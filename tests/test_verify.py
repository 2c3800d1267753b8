"""Drafts through the native step: seed by seed the tokens are those of plain sampling, and their law is the model's.

The model is a Markov chain: an embedding whose row t is the logits after token t.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from millis._native import Sampler
from tiny_runtime import PAGE, Tiny, ints

VOCAB = 16
TABLE = np.random.default_rng(3).normal(0, 1.5, (VOCAB, VOCAB)).astype(np.float32)
GUESSES = (TABLE + np.random.default_rng(4).normal(0, 0.8, TABLE.shape)).astype(np.float32)
PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.0, "repetition": 1.5, "presence": 0.7, "frequency": 0.4},
    {"temperature": 0.9, "bias": [(2, 2.0), (5, float("-inf"))], "top_p": 0.9, "top_k": 9, "logprobs": 3},
]


def chain(table: np.ndarray = TABLE) -> Tiny:
    return Tiny(table, VOCAB, threads=1).finish("x")


def answer(
    tiny: Tiny, sampler: Sampler, first: int, count: int, drafts: int, guess: Tiny | None = None, seed: int = 0
) -> list[Any]:
    """`count` (token, log-probability, best); `drafts` a step, from `guess` or, without one, at random."""
    random = np.random.default_rng(seed)
    tokens, found = [first], []
    while len(found) < count:
        start = len(tokens) - 1
        ahead: list[int] = []
        for _ in range(drafts):
            if guess is None:
                ahead.append(int(random.integers(0, VOCAB)))
            else:
                array = Tiny.arrays([[*tokens, *ahead][-1]], starts=[start + len(ahead)], pages=[range(9)])
                ahead.append(guess.native.propose(*array, [sampler], [ahead])[0][0])
        arrays = Tiny.arrays([tokens[-1], *ahead], starts=[start], pages=[range(9)])
        (got,) = tiny.native.step(*arrays, [sampler], ints([len(ahead)]))
        assert 1 <= len(got) <= drafts + 1
        assert [token for token, _, _ in got[:-1]] == ahead[: len(got) - 1]
        if len(got) <= drafts:
            assert got[-1][0] != ahead[len(got) - 1]
        found += got
        tokens += [token for token, _, _ in got]
    return found[:count]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("source", ["random", "model"])
def test_seed_by_seed_the_tokens_of_plain_sampling(params: dict[str, Any], source: str) -> None:
    tiny, guess = chain(), chain(GUESSES) if source == "model" else None
    for seed in range(20):
        plain = answer(tiny, Sampler(VOCAB, seed=seed, **params), seed % VOCAB, 12, 0)
        for drafts in (1, 3, 7):
            got = answer(tiny, Sampler(VOCAB, seed=seed, **params), seed % VOCAB, 12, drafts, guess, seed)
            assert got == plain


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x.astype(np.float64) - x.max())
    return np.asarray(weights / weights.sum())


def processed(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The distribution that the filters leave, from their definitions."""
    p = softmax(logits / temperature)
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    order = np.argsort(-p)
    keep = order[: int((np.cumsum(p[order]) / p.sum() < top_p).sum()) + 1]
    out = np.zeros_like(p)
    out[keep] = p[keep]
    return out / out.sum()


def chi_square(counts: np.ndarray, want: np.ndarray) -> float:
    """(χ² − degrees) / √(2 degrees): beyond 5 by chance less than once in ten thousand; cells of under 5 together."""
    expected = want * counts.sum()
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    cells = [(counts[large], expected[large])]
    if expected[~large].sum() >= 5:
        cells.append((counts[~large].sum(keepdims=True), expected[~large].sum(keepdims=True)))
    total = sum(float((((c - e) ** 2) / e).sum()) for c, e in cells)
    degrees = max(1, sum(len(c) for c, _ in cells) - 1)
    return float((total - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05}], ids=str
)
@pytest.mark.parametrize("source", ["random", "model"])
def test_the_law_is_the_models_own(params: dict[str, Any], source: str) -> None:
    """Every pair of neighbours in many answers, counted by its first token, against the closed form."""
    tiny, guess = chain(), chain(GUESSES) if source == "model" else None
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(1500):
        tokens = [token for token, _, _ in answer(tiny, Sampler(VOCAB, seed=seed, **params), 1, 9, 3, guess, seed)]
        for a, b in zip([1, *tokens], tokens, strict=False):
            counts[a, b] += 1
    assert max(chi_square(counts[t], processed(TABLE[t], **params)) for t in range(VOCAB) if counts[t].sum() >= 100) < 5


def test_penalties_see_the_accepted_drafts() -> None:
    """The third token's law after each pair before it, from the definition of the penalties."""
    tiny, guess = chain(), chain(GUESSES)
    params = {"temperature": 1.0, "repetition": 1.4, "presence": 0.6, "frequency": 0.5}
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(6000):
        sampler = Sampler(VOCAB, seed=seed, **params)
        sampler.seen(ints([7]))
        counts[tuple(token for token, _, _ in answer(tiny, sampler, 7, 3, 2, guess, seed))] += 1
    pairs = Counter(key[:2] for key in counts.elements())
    checked = 0
    for (a, b), times in pairs.most_common(6):
        logits = TABLE[b].astype(np.float64)
        for token in {7, a, b}:
            logits[token] *= 1 / 1.4 if logits[token] > 0 else 1.4
        for token in (a, b):
            logits[token] -= 0.5
        for token in {a, b}:
            logits[token] -= 0.6
        got = np.array([counts[a, b, c] for c in range(VOCAB)])
        assert chi_square(got, softmax(logits)) < 5
        checked += times
    assert checked > 500


def test_a_draft_model_is_right_as_often_as_the_coupling_says() -> None:
    """P(equal) = Σ_i 1 / Σ_j max(p_j / p_i, q_j / q_i) where both race with the same times (Daliri et al., 2024)."""
    tiny, guess = chain(), chain(GUESSES)
    p, q = softmax(TABLE[4]), softmax(GUESSES[4])
    want = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(VOCAB))
    arrays, draws = Tiny.arrays([4]), 4000
    same = 0
    for seed in range(draws):
        sampler = Sampler(VOCAB, temperature=1.0, seed=seed)
        ((token, probability),) = guess.native.propose(*arrays, [sampler], [[]])
        assert probability == pytest.approx(q[token], rel=1e-4)
        same += tiny.native.step(*arrays, [sampler], ints([0]))[0][0][0] == token
    assert abs(same / draws - want) < 5 * np.sqrt(want * (1 - want) / draws)
    assert want > 1 - np.abs(p - q).sum()  # (1 − TV) / (1 + TV) is the bound; this is a weaker one


def test_proposing_changes_nothing_and_knows_what_is_ahead() -> None:
    tiny = chain()
    sampler, other = (Sampler(VOCAB, temperature=1.0, seed=9, frequency=1.0) for _ in range(2))
    arrays = Tiny.arrays([3])
    first = [tiny.native.propose(*arrays, [sampler], [[]]) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    plain = [token for token, _, _ in answer(tiny, other, 3, 6, 0)]
    for count in range(5):
        at = Tiny.arrays([[3, *plain][count]], starts=[count], pages=[range(9)])
        assert tiny.native.propose(*at, [sampler], [plain[:count]])[0][0] == plain[count]


@pytest.mark.parametrize("words", [1, 16, 17, 31, 40, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_proposals_may_look_at_the_first_words_alone(words: int | None, temperature: float) -> None:
    """As if the others were all but impossible: what a token draws does not depend on how many there are."""
    table = np.random.default_rng(5).normal(0, 2, (40, 40)).astype(np.float32)
    few = np.where(np.arange(40) < (words or 40), table, -1e4).astype(np.float32)
    tiny, other = (Tiny(one, 40, threads=2).finish("x") for one in (table, few))
    for last in range(40):
        tiny.native.propose(*Tiny.arrays([39 - last]), [Sampler(40)], [[]])  # leaves its logits behind
        for seed in range(4):
            sampler = Sampler(40, temperature=temperature, seed=seed)
            ((token, probability),) = tiny.native.propose(*Tiny.arrays([last]), [sampler], [[]], words)
            ((wanted, likely),) = other.native.propose(*Tiny.arrays([last]), [sampler], [[]])
            assert token == wanted and probability == pytest.approx(likely, rel=1e-4)


def test_several_sequences_bring_their_own_drafts() -> None:
    tiny = chain()
    right = [int(TABLE[5].argmax())]
    right.append(int(TABLE[right[0]].argmax()))
    wrong = [(right[0] + 1) % VOCAB]
    sequences = [[2, 5, *right], [1, 2, 3], [5, *wrong], [4]]
    pages = [[s] for s in range(4)]
    samplers = [Sampler(VOCAB), None, Sampler(VOCAB), Sampler(VOCAB)]
    got = tiny.native.step(*Tiny.arrays(*sequences, pages=pages), samplers, ints([2, 0, 1, 0]))
    tokens = [[token for token, _, _ in row] for row in got]
    assert tokens == [[*right, int(TABLE[right[1]].argmax())], [], [right[0]], [int(TABLE[4].argmax())]]


def test_more_rows_than_logits_are_held_at_once() -> None:
    tiny = Tiny(TABLE, VOCAB, max_outputs=4).finish("x")
    tokens = [6]
    for _ in range(PAGE - 1):
        tokens.append(int(TABLE[tokens[-1]].argmax()))
    (got,) = tiny.native.step(*Tiny.arrays(tokens), [Sampler(VOCAB)], ints([len(tokens) - 1]))
    assert [token for token, _, _ in got] == [*tokens[1:], int(TABLE[tokens[-1]].argmax())]


@pytest.mark.parametrize("drafted", [[-1, 0], [2, 0], [0, 1], [0], [0, 0, 0]])
def test_bad_drafts_are_refused(drafted: list[int]) -> None:
    arrays = Tiny.arrays([1, 2], [3, 4])
    with pytest.raises(ValueError, match="draft"):
        chain().native.step(*arrays, [Sampler(VOCAB), None], ints(drafted))


def test_bad_proposals_are_refused() -> None:
    tiny, arrays = chain(), Tiny.arrays([1, 2])
    for samplers, ahead in (
        ([None], [[]]),
        ([Sampler(VOCAB)], []),
        ([Sampler(VOCAB)], [[VOCAB]]),
        ([Sampler(VOCAB)], [[-1]]),
    ):
        with pytest.raises(ValueError, match="batch"):
            tiny.native.propose(*arrays, samplers, ahead)
    with pytest.raises(TypeError):
        tiny.native.propose(*arrays, [Sampler(VOCAB)], [["x"]])
    for words in (0, -1, VOCAB + 1):
        with pytest.raises(ValueError, match="words"):
            tiny.native.propose(*arrays, [Sampler(VOCAB)], [[]], words)
