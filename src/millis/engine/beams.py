"""Beam search: several beginnings of an answer kept side by side, the likeliest ones. Pure: token ids and numbers only.

It chooses as transformers' generate does, whose settings checkpoints come with: 1 + (tokens that end) times as many
continuations as beams are looked at in every step, those that end among the first `beams` are finished, the first
`beams` that do not end go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millis.models.generation import Generation

Best = Sequence[tuple[int, float]]  # tokens and their log-probabilities, in nats


@dataclass(frozen=True, slots=True)
class Beam:
    """An answer under way or finished: its tokens, and what it is compared by."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """The search for one answer of at most `max_tokens` tokens; the decoder's first one is not among them."""

    def __init__(self, generation: Generation, beams: int, max_tokens: int) -> None:
        self.running = [Beam((), 0.0)]
        self.finished: list[Beam] = []  # at most `beams`, best first
        self.done = False
        self.looked_at = max(2, 1 + len(generation.ends)) * beams
        """How many continuations of a beam may matter."""
        self._generation, self._beams, self._most = generation, beams, max_tokens

    @property
    def best(self) -> Beam:
        """What the answer would be now."""
        return self.finished[0] if self.finished else self.running[0]

    def advance(self, best: Sequence[Best]) -> list[tuple[int, int]]:
        """One token more. best: the likeliest tokens behind each running beam, the forbidden ones left out.

        Returns, for each beam that runs on, the place of the one it continues and the token; none once it is done.
        """
        length = len(self.running[0].tokens) + 1
        found = [
            (beam.score + logprob, place, token)
            for place, (beam, tokens) in enumerate(zip(self.running, best, strict=True))
            for token, logprob in tokens
        ]
        found.sort(key=lambda one: -one[0])  # stable: ties as they stand
        found = found[: self.looked_at]
        ended = [length == self._most or token in self._generation.ends for _, _, token in found]
        self._finish(found, ended, length)
        going = [one for one, end in zip(found, ended, strict=True) if not end][: self._beams]
        if not going:
            self.done = True
            return []
        self.running = [Beam((*self.running[place].tokens, token), score) for score, place, token in going]
        self.done = self._is_full() and (self._generation.early_stopping is True or not self._can_improve(length))
        return [] if self.done else [(place, token) for _, place, token in going]

    def _finish(self, found: Sequence[tuple[float, int, int]], ended: Sequence[bool], length: int) -> None:
        """Keeps what ends among the first `beams` continuations, if it is better than what is finished."""
        new = [
            Beam((*self.running[place].tokens, token), score / length**self._generation.length_penalty)
            for (score, place, token), end in list(zip(found, ended, strict=True))[: self._beams]
            if end
        ]
        self.finished = sorted([*self.finished, *new], key=lambda beam: -beam.score)[: self._beams]

    def _is_full(self) -> bool:
        return len(self.finished) == self._beams

    def _can_improve(self, length: int) -> bool:
        """Whether the best running beam could, at its present or its greatest length, beat the worst finished one."""
        penalty = self._generation.length_penalty
        longest = self._most if self._generation.early_stopping == "never" and penalty > 0 else length
        return bool(self.running[0].score / longest**penalty > self.finished[-1].score)
