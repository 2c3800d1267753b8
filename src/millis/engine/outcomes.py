"""What a step's results mean for its requests: their answers grow, land, or end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.engine.landing import EPSILON_MS, Stage, stage
from millis.engine.load import Counters
from millis.engine.request import Event, Request
from millis.engine.runner import Ranked, Runner, Sampled
from millis.engine.scheduler import Chunk, Scheduler
from millis.engine.scoring import path_sums
from millis.engine.speculate import Speculator
from millis.types import FinishReason, GrammarError, ModelError, TokenLogprob


class Outcomes:
    """Emits the events of requests. Its methods are called under the lock of the engine's bookkeeping.

    sentence_ends: tokens after which a text may end when its time is up.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        counters: Counters,
        clock: Callable[[], float],
        speculator: Speculator | None,
        eos: frozenset[int],
        sentence_ends: frozenset[int],
    ) -> None:
        self.sentence_ends = sentence_ends
        self._runner = runner
        self._scheduler = scheduler
        self._counters = counters
        self._clock = clock
        self._speculator = speculator
        self._eos = eos

    def drop_late(self) -> None:
        """Ends the requests that nobody waits for and those whose next token would come after their deadline."""
        now = self._clock()
        least_ms = self._scheduler.costs.decode_ms(1, 0)
        for request in [*self._scheduler.running, *self._scheduler.waiting]:
            if request.abandoned:
                self.finish(request, request.ending)
            elif request.due_s is not None and 1000 * (request.due_s - now) < least_ms - EPSILON_MS:
                self._finish_late(request)

    def approach(self, chunks: list[Chunk], now: float, step_ms: float) -> None:
        """Decides whose token of this step is the last that its deadline allows."""
        if all(chunk.request.due_s is None for chunk in chunks):
            return
        lasting = [chunk for chunk in chunks if chunk.last]
        context = sum(chunk.start for chunk in lasting) // max(1, len(lasting))
        next_ms = self._scheduler.costs.decode_ms(len(lasting), context)
        for chunk in lasting:
            request = chunk.request
            if request.due_s is None:
                continue
            left_ms = 1000 * (request.due_s - now)
            margin_ms = self._scheduler.promises.caution.step_ms(
                1000 * (request.due_s - request.arrival_s), self._scheduler.costs.margin_ms
            )
            request.stage = stage(left_ms, step_ms, next_ms, margin_ms)
            if request.stage is Stage.LAST:
                chunk.drafts.clear()
                self._force_end(request)

    def _force_end(self, request: Request) -> None:
        """Lets the sampler choose only among tokens that end a sentence, the answer with them."""
        if self.sentence_ends and request.constraint is None and len(request.tokens) > request.prompt_tokens:
            ends = self.sentence_ends if request.params.ignore_eos else self.sentence_ends | self._eos
            request.sampler = self._runner.restricted(request.params, request.tokens, ends)

    def emit(self, chunks: list[Chunk], sampled: Sampled, now: float) -> None:
        """Takes in the tokens that a step chose, and what each decides."""
        for chunk, tokens, logprobs in zip(chunks, sampled.tokens, sampled.logprobs, strict=True):
            request = chunk.request
            if tokens and tokens[-1] < 0:
                self._fail(request, late=tokens[-1] == _native.MASK_LATE)
                continue
            # [0, computed) hold the keys of the request's own tokens; behind them lie those of wrong drafts.
            request.computed = chunk.start + chunk.length + max(0, len(tokens) - 1)
            if not chunk.last:
                continue
            if request.first_token_s is None:
                self._scheduler.publish(request)
                request.first_token_s = now
            request.last_token_s = now
            request.timings.drafted_tokens += len(chunk.drafts)
            request.timings.accepted_tokens += len(tokens) - 1
            for token, logprob in zip(tokens, logprobs, strict=True):
                self._emit_token(request, token, logprob)
                if request.finish_reason is not None:
                    break

    def _emit_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        ends = token in self._eos and not request.params.ignore_eos
        forced: list[int] = []
        if request.constraint is not None:
            try:
                request.constraint.check()
                forced = [] if ends else request.constraint.advance(token)
            except GrammarError as error:
                request.error = error
                self.finish(request, "cancelled")
                return
        if ends:
            self.finish(request, "stop", logprob=logprob)
            return
        self._append(request, token, logprob, whole=not forced)
        self.follow(request, forced)

    def follow(self, request: Request, forced: Sequence[int]) -> None:
        """Emits what a grammar forces: tokens that the model need not choose, computed with the next step."""
        for i, token in enumerate(forced):
            if request.finish_reason is None:
                self._append(request, token, None, whole=i == len(forced) - 1)

    def _append(self, request: Request, token: int, logprob: TokenLogprob | None, *, whole: bool) -> None:
        """Emits one more token. `whole`: no forced ones follow, so that what a grammar calls for may end here."""
        request.tokens.append(token)
        if whole and request.constraint is not None and request.constraint.stopped:
            self.finish(request, "stop", token, logprob)
        elif len(request.tokens) >= request.limit:
            self.finish(request, "length", token, logprob)
        elif whole and request.stage and request.lands and token in self.sentence_ends:
            self._counters.landed += 1
            self.finish(request, "deadline", token, logprob)
        elif whole and request.stage is Stage.LAST and request.constraint is None:
            self.finish(request, "deadline", token, logprob)
        else:
            request.inbox.append(Event(token, logprob))
            if whole and request.stage is Stage.LAST:
                self._finish_late(request)

    def take_scores(self, chunk: Chunk, found: NDArray[np.float32] | Ranked, now: float) -> None:
        """Takes in the log-probabilities (nats) of a part of the continuation that is scored now."""
        request, score = chunk.request, chunk.request.score
        assert score is not None
        values = found.logprobs if isinstance(found, Ranked) else found
        if np.isnan(values).any():
            return self._fail(request)
        request.first_token_s = now if request.first_token_s is None else request.first_token_s
        request.last_token_s = now
        score.part += float(values.sum(dtype=np.float64))
        score.done += chunk.length
        if isinstance(found, Ranked):
            score.ranked.append(found)
        continuation = score.continuations[len(score.values)]
        if score.done == len(continuation):
            score.values.append(score.part)
            score.part, score.done = 0.0, 0
            del score.parts[0]
        if len(score.values) == len(score.continuations):
            if score.best is not None:  # a whole text, which may be gone on with
                self._scheduler.keep(request, [*request.tokens, *continuation[:-1]])
            self.finish(request, "stop")

    def take_tree(self, chunk: Chunk, values: NDArray[np.float32], now: float) -> None:
        """Takes in the log-probabilities (nats) of the edges of a tree of continuations."""
        request, score = chunk.request, chunk.request.score
        assert score is not None and chunk.tree is not None
        if np.isnan(values).any():
            return self._fail(request)
        request.first_token_s = now if request.first_token_s is None else request.first_token_s
        request.last_token_s = now
        request.computed = len(request.tokens) - 1  # the tree's own slots are written anew by the next one
        self._scheduler.publish(request)
        score.values += path_sums(chunk.tree, values, chunk.depth)
        if len(score.values) < len(score.continuations):
            del score.parts[0]
        elif chunk.depth < chunk.tree.depth:
            score.depth = chunk.depth
            self._counters.landed += 1
            self.finish(request, "deadline")
        else:
            self.finish(request, "stop")

    def _fail(self, request: Request, *, late: bool = False) -> None:
        """Ends a request that alone cannot go on: no usable logit, or a late mask. Nothing of it is kept for others."""
        if late:
            request.error = GrammarError("what the grammar allows next takes too long to compute; make it simpler")
        else:
            request.error = ModelError("the model computed no usable number; its weights or the adapter may be damaged")
        request.caches = False
        self.finish(request, "cancelled")

    def _finish_late(self, request: Request) -> None:
        """Ends a request whose time is up; what a grammar still calls for needs no model."""
        closing = None if request.constraint is None else request.constraint.closing()
        for token in closing or ():
            request.tokens.append(token)
            request.inbox.append(Event(token))
        self._counters.landed += closing is not None
        self.finish(request, "deadline")

    def finish(
        self, request: Request, reason: FinishReason, token: int | None = None, logprob: TokenLogprob | None = None
    ) -> None:
        """Ends a request, perhaps with a last token, and frees what it holds."""
        self._scheduler.remove(request)
        if self._speculator is not None:
            self._speculator.forget(request)
        if request.adapter is not None:
            request.adapter.users -= 1
            request.adapter = None
        now = self._clock()
        request.finish(reason, now)
        request.inbox.append(Event(token, logprob, reason))
        if request.due_s is not None and reason != "cancelled":
            met = now <= request.due_s + EPSILON_MS / 1000 and request.answered
            self._counters.met += met
            self._counters.missed += not met
            self._scheduler.promises.caution.learn(met)
