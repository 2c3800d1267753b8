"""Speculation: guesses several tokens so that one forward computes all of them, where that is faster.

Guesses come from the text so far (ngram.py) or from a draft model (draft.py). The sampler keeps those that it chooses
anyway, so they change how fast an answer comes and never what it says (Leviathan et al., 2023; Chen et al., 2023, with
the coupling of native/sampler.h). How many are worth it follows from how often they were right and from how long steps
of so many rows were measured to take; none is an answer, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millis.engine.cost import StepCosts
from millis.engine.draft import DraftModel
from millis.engine.ngram import NgramIndex
from millis.engine.request import Request
from millis.engine.scheduler import Chunk

MOST_ROWS = 8  # rows of a step with drafts: up to here a row's sums do not depend on how many there are
WORTH = 1.02  # a guess must promise this much more than none
MOST_SPENT = 6.0  # steps that a round counts as at most: pauses of the machine are not its own
LENGTHS = (3, 6, 10)  # matches of the text are told apart by these lengths
PRIORS = (0.2, 0.35, 0.5, 0.7)  # how often their first token is right, before anything is known
MODEL_RIGHT = 0.8  # how often a token of the draft model is right, before anything is known
MODEL_HOPE = 0.65  # and how often it is thought to be on the next text at least, however wrong it was on the latest
MODEL_COST = 0.3  # what it takes, in plain steps, likewise
MODEL_PRIOR = 1.15  # what a round with the draft model is worth in rounds without, before anything is known
MODEL_RETRY = 1.05  # likewise when it is tried again after a pause
MODEL_VAIN = 0.85  # rounds worth less show a model that is no use, rather than a text that it does not know
MODEL_REST = 512  # steps before a new request tries such a model
PATIENCE = 0.5  # of the longest answer is thought to come: what the draft model catches up with must pay by then
MODEL_PAUSE = 16  # steps of the first pause; each further one is twice as long


@dataclass(slots=True)
class Rate:
    """How often guesses were right, the latest counting most."""

    right: float
    tried: float = 1.0

    def add(self, right: int, tried: int) -> None:
        fade = 0.9**tried
        self.right = self.right * fade + right
        self.tried = self.tried * fade + tried

    @property
    def value(self) -> float:
        return min(0.98, self.right / self.tried)


@dataclass(slots=True)
class Guesses:
    """What is known of one request."""

    index: NgramIndex = field(default_factory=NgramIndex)
    rates: list[Rate] = field(default_factory=lambda: [Rate(prior) for prior in PRIORS])
    bucket: int = 0  # of the match behind `first`
    first: int | None = None  # what the text proposed last, whether it was tried or not
    from_model: bool = False  # where the drafts under way come from
    worth: float = MODEL_PRIOR  # tokens a round with the model gives, over those in the same time without
    pause: int = 0  # steps before the model is tried again
    next_pause: int = MODEL_PAUSE


class Speculator:
    """Proposes drafts before a step and learns from what became of them. Not thread-safe: part of a step."""

    def __init__(self, clock: Callable[[], float], draft: DraftModel | None = None) -> None:
        self.costs = StepCosts()
        self.model = draft
        self.enabled = True
        self._clock = clock
        self._model_costs = StepCosts()
        self._prefill_ms: float | None = None  # of a token that the draft model catches up with
        self._drafting_ms = 0.0  # spent by the draft model on the step under way, catching up apart
        self._right = Rate(4 * MODEL_RIGHT, 4.0)  # of the draft model
        self._worth = MODEL_PRIOR  # of rounds with the draft model, over all requests
        self._rest = 0  # steps before a new request may try a draft model that is no use

    def propose(self, decoding: Sequence[Request]) -> None:
        """Sets the drafts of requests that are about to decode."""
        base, self._drafting_ms, self._rest = len(decoding), 0.0, max(0, self._rest - 1)
        spare = MOST_ROWS - base
        if not self.enabled or spare <= 0 or not self.costs.known(base):
            return
        modelled = []
        for request in decoding:
            share = max(1, (min(MOST_ROWS, self.costs.reach) - base) // base)
            most = min(spare, share, request.limit - len(request.tokens) - 1)
            if most <= 0 or request.constraint is not None:  # a mask speaks of one token only
                continue
            guesses = self._guesses(request)
            rate = self._from_text(request, guesses, base, most)
            if self._model_pays(request, guesses, rate, base, most):
                request.drafts = []
                modelled.append((request, most))
            spare -= most if guesses.from_model else len(request.drafts)
        if modelled:
            self._from_model(modelled, base)

    def _from_text(self, request: Request, guesses: Guesses, base: int, most: int) -> float:
        """Drafts by the latest match, as many as promise the most; returns the promised speed over plain decoding."""
        draft, matched = guesses.index.lookup(request.tokens, most)
        guesses.first, guesses.from_model = draft[0] if draft else None, False
        guesses.bucket = sum(matched > length for length in LENGTHS)
        if not draft:
            return 1.0
        value = guesses.rates[guesses.bucket].value
        plain, best, length, tokens = base / self.costs.ms(base), WORTH, 0, float(base)
        for count in range(1, len(draft) + 1):
            tokens += value**count
            speed = tokens / self.costs.ms(base + count) / plain
            if speed > best:
                best, length = speed, count
        if length and self._in_time(request, self.costs.ms(base + length)):
            request.drafts = draft[:length]
        return best if request.drafts else 1.0

    def _model_pays(self, request: Request, guesses: Guesses, rate: float, base: int, most: int) -> bool:
        """Whether to ask the draft model: it beats the text's guesses, and what it has to catch up with is worth it."""
        if self.model is None:
            return False
        if guesses.pause > 0:
            guesses.pause -= 1
            return False
        promise = self._model_promises(base, most)
        if promise < WORTH or rate >= min(promise, guesses.worth):
            return False
        step_ms = self.costs.ms(1)
        behind = max(0, self.model.behind(request) - MOST_ROWS)
        catch_up_ms = behind * (step_ms / 6 if self._prefill_ms is None else self._prefill_ms)
        round_ms = catch_up_ms + most * self._model_costs.ms(1) + self.costs.ms(MOST_ROWS)
        gain_ms = (1 - 1 / promise) * step_ms * PATIENCE * (request.limit - len(request.tokens))
        if catch_up_ms > gain_ms or not self._in_time(request, round_ms):
            return False
        guesses.from_model = self.model.reserve(request, len(request.tokens) + most)
        return guesses.from_model

    def _model_promises(self, base: int, most: int) -> float:
        """The best speed over plain decoding by what is known of the draft model's accuracy and of all times.

        How often it is right depends on the text: what its rounds were worth there says when it is not.
        """
        right = max(MODEL_HOPE, self._right.value)
        plain_ms = self.costs.ms(base)
        token_ms = self._model_costs.ms(1) or MODEL_COST * self.costs.ms(1)
        best, tokens = 0.0, float(base)
        for count in range(1, most + 1):
            tokens += right**count
            best = max(best, tokens / base * plain_ms / (self.costs.ms(base + count) + count * token_ms))
        return best

    def _from_model(self, modelled: Sequence[tuple[Request, int]], base: int) -> None:
        """Drafts while a token more promises more than the time it takes gives otherwise."""
        assert self.model is not None
        ahead: dict[int, list[int]] = {id(request): [] for request, _ in modelled}
        chance = {id(request): 1.0 for request, _ in modelled}
        going = [(request, most) for request, most in modelled]
        rows = base
        while going:
            behind = sum(self.model.behind(r) for r, _ in going) if rows == base else 0
            begin = self._clock()
            chosen = self.model.draft([r for r, _ in going], [ahead[id(r)] for r, _ in going])
            took = 1000 * (self._clock() - begin)
            if behind > MOST_ROWS * len(going):
                self._prefill_ms = took / behind
            else:
                self._model_costs.add(len(going), took)
                self._drafting_ms += took
            still = []
            for (request, most), (token, probability) in zip(going, chosen, strict=True):
                key = id(request)
                if token < 0:  # the model computed no usable number
                    continue
                chance[key] *= probability
                row_ms = self.costs.ms(rows + 1) - self.costs.ms(rows)
                per_ms = max(1.0, self._guesses(request).worth) * base / self.costs.ms(base)
                if chance[key] <= row_ms * per_ms:  # not even worth its row
                    continue
                ahead[key].append(token)
                rows += 1
                more_ms = (self._model_costs.ms(len(going)) + row_ms) * per_ms
                if len(ahead[key]) < most and chance[key] * 0.9 > more_ms:
                    still.append((request, most))
            going = still
        for request, _ in modelled:
            request.drafts = ahead[id(request)]

    def observe(self, chunks: Sequence[Chunk], tokens: Sequence[Sequence[int]], took_ms: float) -> None:
        """Learns from a step: its time, and per chunk what came out of it."""
        decodes = all(chunk.last and chunk.length == 1 for chunk in chunks)
        if decodes:
            self.costs.add(len(chunks) + sum(len(chunk.drafts) for chunk in chunks), took_ms)
        for chunk, found in zip(chunks, tokens, strict=True):
            guesses: Guesses | None = chunk.request.guesses
            if guesses is not None and found:
                self._learn(guesses, chunk.drafts, found)
                if guesses.from_model and decodes and self.costs.known(len(chunks)):
                    if chunk.drafts:
                        self._right.add(len(found) - 1, min(len(found), len(chunk.drafts)))
                    self._weigh(guesses, len(found), took_ms, self.costs.ms(len(chunks)))
                guesses.first, guesses.from_model = None, False

    @staticmethod
    def _learn(guesses: Guesses, drafts: Sequence[int], tokens: Sequence[int]) -> None:
        if drafts and not guesses.from_model:
            guesses.rates[guesses.bucket].add(len(tokens) - 1, min(len(tokens), len(drafts)))
        elif guesses.first is not None:
            guesses.rates[guesses.bucket].add(int(tokens[0] == guesses.first), 1)

    def _weigh(self, guesses: Guesses, tokens: int, took_ms: float, plain_ms: float) -> None:
        """Compares a round with the draft model to steps without, and pauses it when it has lost."""
        spent = min(took_ms + self._drafting_ms, MOST_SPENT * plain_ms)
        worth = tokens * plain_ms / spent
        guesses.worth += 0.15 * (worth - guesses.worth)
        self._worth += 0.15 * (worth - self._worth)
        if self._worth < MODEL_VAIN:
            self._rest = self._rest or MODEL_REST
        if guesses.worth < 1.0:
            guesses.pause, guesses.next_pause = guesses.next_pause, min(512, 2 * guesses.next_pause)
            guesses.worth = MODEL_RETRY
        elif guesses.worth > MODEL_PRIOR:
            guesses.next_pause = MODEL_PAUSE

    def forget(self, request: Request) -> None:
        """The request has ended."""
        request.guesses = None
        if self.model is not None:
            self.model.forget(request)

    def _in_time(self, request: Request, step_ms: float) -> bool:
        return request.deadline_s is None or self._clock() + step_ms / 1000 <= request.deadline_s

    def _guesses(self, request: Request) -> Guesses:
        if request.guesses is None:
            worth, pause = max(self._worth, MODEL_RETRY), 0
            if self._worth < MODEL_VAIN:
                pause = self._rest
                self._rest = self._rest or MODEL_REST
            request.guesses = Guesses(worth=worth, pause=pause)
        found: Guesses = request.guesses
        return found
