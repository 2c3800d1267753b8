"""Beam search alone: against all answers there are, where the beams hold them all, and by hand where they do not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from millis.engine.beams import Beam, BeamSearch
from millis.engine.seq2seq import forbids
from millis.models.generation import Early, Generation

END = 0


def settings(penalty: float = 1.0, early: Early = False) -> Generation:
    return Generation(start=9, ends=frozenset({END}), length_penalty=penalty, early_stopping=early)


def law(tokens: tuple[int, ...], vocab: int) -> np.ndarray:
    """[vocab] log-probabilities behind `tokens`: some law that depends on all of them."""
    logits = np.random.default_rng([len(tokens), *tokens]).standard_normal(vocab) * 2
    return logits - math.log(np.exp(logits).sum())


def searched(generation: Generation, beams: int, most: int, vocab: int) -> Beam:
    search = BeamSearch(generation, beams, most)
    while not search.done:
        best = []
        for beam in search.running:
            scores = law(beam.tokens, vocab)
            order = np.argsort(-scores)[: search.looked_at]
            best.append([(int(token), float(scores[token])) for token in order])
        kept = search.advance(best)
        assert len(kept) <= beams and (
            search.done or [beam.tokens[-1] for beam in search.running] == [t for _, t in kept]
        )
    return search.best


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
def test_beams_that_hold_everything_find_the_best_answer(penalty: float) -> None:
    vocab, most = 3, 4
    answers = []
    for length in range(1, most + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            if END in tokens[:-1] or (length < most and tokens[-1] != END):
                continue
            total = sum(law(tokens[:i], vocab)[token] for i, token in enumerate(tokens))
            answers.append((total / length**penalty, tokens))
    # "never" gives up only what cannot win; of the other rules that is not so.
    found = searched(settings(penalty, "never"), 16 if penalty >= 0 else 40, most, vocab)
    if penalty >= 0:
        assert found.tokens == max(answers)[1] and found.score == pytest.approx(max(answers)[0])
    else:
        assert found.tokens in {tokens for _, tokens in answers}


def test_one_beam_is_greedy() -> None:
    found = searched(settings(), 1, 6, 20).tokens
    for i, token in enumerate(found):
        scores = law(found[:i], 20)
        assert token == scores.argmax() or (scores.argmax() == END and token != END)


def test_what_ends_below_the_beams_is_not_finished() -> None:
    """The third best continuation ends; with two beams it is passed over, and two others go on."""
    search = BeamSearch(settings(), 2, 9)
    kept = search.advance([[(3, -0.1), (4, -0.2), (END, -0.3), (5, -0.4)]])
    assert kept == [(0, 3), (0, 4)] and search.finished == [] and not search.done
    kept = search.advance(
        [[(END, -0.1), (6, -0.5), (7, -0.6), (8, -0.7)], [(5, -3.0), (6, -3.1), (7, -3.2), (8, -3.3)]]
    )
    assert kept == [(0, 6), (0, 7)]
    assert search.finished == [Beam((3, END), pytest.approx(-0.2 / 2))]


@pytest.mark.parametrize(("early", "done"), [(True, True), (False, True), ("never", False)])
def test_when_to_stop(early: Early, done: bool) -> None:
    """One beam is finished and full; the one that runs could win only if it were to grow much longer."""
    search = BeamSearch(settings(2.0, early), 1, 50)
    search.advance([[(END, -1.0), (3, -1.1)]])
    assert search.finished[0].score == -1.0
    assert search.done == (early is True or -1.1 / (50 if early == "never" else 1) ** 2 <= -1.0) == done


def test_the_longest_answer_ends_all_beams() -> None:
    search = BeamSearch(settings(), 2, 1)
    assert search.advance([[(3, -0.5), (4, -0.7), (5, -0.9), (6, -1.0)]]) == []
    assert search.done and search.best.tokens == (3,) and len(search.finished) == 2


@pytest.mark.parametrize(
    ("tokens", "changes", "wanted"),
    [
        ([9, 1, 2, 1], {"no_repeat": 2}, {2}),
        ([9, 1, 2, 1, 2], {"no_repeat": 3}, {1}),
        ([9, 1, 2], {"no_repeat": 3}, set()),
        ([9, 1, 2, 1], {"no_repeat": 1}, {9, 1, 2}),
        ([9, 1], {"min_length": 3}, {END}),
        ([9, 1, 2], {"min_length": 3}, set()),
        ([9], {"banned": (4, 5), "min_length": 2}, {4, 5, END}),
    ],
)
def test_what_may_not_follow(tokens: list[int], changes: dict[str, int], wanted: set[int]) -> None:
    assert forbids(Generation(start=9, ends=frozenset({END}), **changes), tokens) == wanted  # type: ignore[arg-type]
