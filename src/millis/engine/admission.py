"""Whether a deadline can be kept: all that is due by then must fit (earliest deadline first; Liu and Layland, 1973).

Work is a prompt to compute and tokens to decode. Prompts are computed one behind the other in order of their deadlines.
Decodes run beside each other: a step costs `base_ms` and `row_ms` for each of its sequences, and `chunk_ms` where it
computes a part of a prompt, too. Pure: no clock inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RELATIVE = 0.03  # of the time until a deadline is kept in hand
MISSED, MET = 1.5, 0.995  # what an answer that came late or in time makes of the caution
TRIED = 0.98  # likewise a refusal: where nothing is tried, nothing is learned
MOST_CAUTION = 4.0
MOST_MARGIN = 0.25  # of the time until a deadline: pauses of the machine are not to refuse everything,
MOST_HAND = 0.5  # nor are they with all caution


@dataclass(slots=True)
class Debt:
    """What is still owed to a request by its deadline."""

    due_s: float
    prefill_ms: float
    tokens: int
    most: int  # tokens that it may yet decode
    decoding: bool


@dataclass(frozen=True, slots=True)
class Pace:
    """What steps cost now."""

    base_ms: float
    row_ms: float
    chunk_ms: float  # what a prompt's chunk adds
    slots: int  # sequences in a step
    decoding: int  # sequences that decode, with or without a deadline
    most: int  # tokens that these may yet decode
    margin_ms: float  # by which all may be delayed: a step under way, or one that takes longer than predicted


class Caution:
    """How much is kept in hand, learned from answers that came late."""

    def __init__(self, most_margin: float = MOST_MARGIN) -> None:
        self.factor = 1.0
        self._most_margin = most_margin

    def learn(self, met: bool) -> None:
        """Takes in how an admitted request ended."""
        self.factor = min(MOST_CAUTION, self.factor * MISSED) if not met else max(1.0, self.factor * MET)

    def doubt(self) -> None:
        """Takes in a refusal that nothing may be learned from."""
        self.factor = max(1.0, self.factor * TRIED)

    def hand_ms(self, left_ms: float, margin_ms: float) -> float:
        """Of `left_ms` until a deadline, what may not be planned with."""
        hand_ms = self.factor * (RELATIVE * left_ms + min(margin_ms, self._most_margin * left_ms))
        return max(0.0, min(hand_ms, MOST_HAND * left_ms))

    def step_ms(self, whole_ms: float, margin_ms: float) -> float:
        """How much longer than predicted a step may take, where an answer has `whole_ms` in all."""
        return self.factor * min(margin_ms, self._most_margin * whole_ms)


def slacks(debts: Sequence[Debt], start_s: float, pace: Pace, caution: Caution) -> Iterator[tuple[float, float]]:
    """For each of the debts, in the order they are paid in: (milliseconds to spare, milliseconds until it is paid).

    By then all prompts before it and its own are computed. Behind its prompt its tokens take a step each, or more where
    the slots do not suffice; as long as other prompts are behind it, each of these steps takes a chunk of them along if
    its time allows that, and otherwise delays them. Whoever decodes takes a row of every step until its answer is as
    long as it may be.
    """
    later = sum(debt.prefill_ms for debt in debts)
    prefill = delay = owed = queued = 0.0
    behind = 0
    step_ms = pace.base_ms + pace.row_ms * pace.decoding
    for debt in debts:
        prefill += debt.prefill_ms
        later -= debt.prefill_ms
        owed += debt.tokens
        if not debt.decoding:
            behind += 1
            queued += debt.most
        steps = max(debt.tokens, owed / pace.slots)
        chunks = prefill / pace.chunk_ms
        rows = min(pace.most, pace.decoding * (steps + chunks)) + min(queued, behind * (steps + chunks / 2))
        ms = prefill + delay + steps * pace.base_ms + rows * pace.row_ms
        left = 1000 * (debt.due_s - start_s)
        slack = left - caution.hand_ms(left, pace.margin_ms) - ms
        wished = min(later, steps * pace.chunk_ms)
        along = max(0.0, min(slack, wished))
        without = (wished - along) / pace.chunk_ms * step_ms
        delay = max(delay, without) if debt.decoding else delay + without
        yield slack - along, ms + along
