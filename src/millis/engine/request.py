"""One request on its way through the engine, and the events it emits. Token ids only: the engine knows no text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from millis.engine.landing import Stage
from millis.engine.tree import Part
from millis.types import FinishReason, OnDeadline, Priority, SamplingParams, Timings, TokenLogprob

if TYPE_CHECKING:
    from millis.engine.adapters import Adapter
    from millis.engine.constraint import Constraint
    from millis.engine.prefix import Salt
    from millis.engine.runner import Ranked


@dataclass(frozen=True, slots=True)
class Event:
    """A new token, or the end. The last event of a request has a finish_reason; it may carry a token, too.

    A log-probability without a token is that of the one which ended the answer, and is none of it.
    """

    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Score:
    """Log-probabilities to be computed of tokens behind a prompt, and those that are known."""

    continuations: tuple[tuple[int, ...], ...]
    parts: list[Part]  # those that are still to be scored: a forward for each tree, pieces where there is none
    values: list[float] = field(default_factory=list)  # of the first of the continuations, in nats
    part: float = 0.0  # of the next one where it is scored in pieces: what is summed up
    done: int = 0  # and how many of its tokens that are
    depth: int | None = None  # only so many tokens of each continuation count, for want of time
    best: int | None = None  # so many likely tokens are told of each place of the only continuation; None: nothing is
    ranked: list[Ranked] = field(default_factory=list)  # and what was found, a piece a step


@dataclass(slots=True, eq=False)
class Request:
    """tokens = prompt + output. [0, computed) have their keys and values in `pages`; the rest still has to run."""

    prompt_tokens: int
    tokens: list[int]
    params: SamplingParams
    sampler: Any
    limit: int  # tokens may not grow beyond this
    arrival_s: float
    deadline_s: float | None = None  # absolute, on the engine's clock
    asked_ms: float | None = None  # from arrival, as a refusal names it; None: the same
    priority: Priority = "standard"
    tenant: str = ""  # who asks: shares are fair among tenants, cached prefixes each one's own
    on_deadline: OnDeadline = "partial"
    minimum: int = 1  # tokens of the shortest useful answer
    due_s: float | None = None  # the deadline without what delivery takes
    latest_s: float = 0.0  # when its prompt must be computed for the shortest useful answer to be in time
    number: int = 0  # in order of submission
    adapter: Adapter | None = None  # None: the model as it is, or a request that has ended
    constraint: Constraint | None = None  # where only answers of a grammar are wanted
    stage: Stage = Stage.FLYING
    score: Score | None = None  # continuations to be scored instead of an answer to be written
    caches: bool = True  # whether it uses the prefix cache, if there is one
    cached: int = 0  # tokens of the prompt that the prefix cache held when it came
    plain_ms: tuple[int, float] = (-1, 0.0)  # (start, what the rest of the prompt costs by the tables)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    inbox: deque[Event] = field(default_factory=deque)
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    abandoned: bool = False  # its reader asks for the end; any thread may set it
    ending: FinishReason = "cancelled"  # why, when it is abandoned
    drafts: list[int] = field(default_factory=list)  # guesses of the tokens behind `tokens`, for the next step only
    guesses: Any = None  # what speculation remembers of this request
    timings: Timings = field(default_factory=Timings)
    first_step_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def salt(self) -> Salt:
        """Who may share cached pages with it: an adapter's keys and values are its own."""
        return self.tenant if self.adapter is None else (self.tenant, self.adapter.number)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding. 0: continuations can be scored."""
        return len(self.tokens) - self.computed - (self.score is not None)

    @property
    def start(self) -> int:
        """Where its computation goes on or, as far as one can tell while it waits, will begin."""
        return self.computed if self.pages else max(self.computed, self.cached)

    @property
    def decoding(self) -> bool:
        """Whether one more token of it gives the next one."""
        return self.score is None and len(self.tokens) - self.computed == 1

    @property
    def owed(self) -> int:
        """Tokens that the shortest useful answer still lacks."""
        return 0 if self.score is not None else max(0, self.minimum + self.prompt_tokens - len(self.tokens))

    @property
    def lands(self) -> bool:
        """Whether it may end at a sentence end before its time is up: nobody wants a part of it otherwise."""
        return self.on_deadline == "partial" and not self.owed and self.constraint is None

    @property
    def output(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.prompt_tokens :]

    @property
    def left(self) -> int:
        """Tokens that the answer may grow by."""
        return 0 if self.score is not None else self.limit - len(self.tokens)

    @property
    def answered(self) -> bool:
        """Whether there is anything to deliver: the end that the model chose, a token, or a score."""
        if self.score is not None:
            return self.finish_reason == "stop" or bool(self.score.values)
        return self.finish_reason == "stop" or len(self.tokens) > self.prompt_tokens

    def finish(self, reason: FinishReason, now_s: float) -> None:
        """Ends the request, once, and fills in what its timings still lack."""
        assert self.finish_reason is None
        self.finish_reason = reason
        t = self.timings
        t.completion_tokens = len(self.tokens) - self.prompt_tokens
        t.queue_ms = 1000 * ((now_s if self.first_step_s is None else self.first_step_s) - self.arrival_s)
        if self.first_step_s is not None and self.first_token_s is not None and self.last_token_s is not None:
            t.prefill_ms = 1000 * (self.first_token_s - self.first_step_s)
            t.first_token_ms = 1000 * (self.first_token_s - self.arrival_s)
            t.decode_ms = 1000 * (self.last_token_s - self.first_token_s)
        t.total_ms = 1000 * (now_s - self.arrival_s)
        if self.deadline_s is not None:
            t.deadline_ms = 1000 * (self.deadline_s - self.arrival_s)
            t.slack_ms = 1000 * (self.deadline_s - now_s)
