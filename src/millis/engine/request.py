"""One request on its way through the engine, and the events it emits. Token ids only: the engine knows no text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from millis.types import FinishReason, SamplingParams, Timings, TokenLogprob

if TYPE_CHECKING:
    from millis.engine.constraint import Constraint


@dataclass(frozen=True, slots=True)
class Event:
    """A new token, or the end. The last event of a request has a finish_reason; it may carry a token, too."""

    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


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
    tenant: str = ""  # whose cached prefixes it may use
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    inbox: deque[Event] = field(default_factory=deque)
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    abandoned: bool = False  # its reader asks for the end; any thread may set it
    constraint: Constraint | None = None  # where only answers of a grammar are wanted
    drafts: list[int] = field(default_factory=list)  # guesses of the tokens behind `tokens`, for the next step only
    guesses: Any = None  # what speculation remembers of this request
    timings: Timings = field(default_factory=Timings)
    first_step_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def output(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.prompt_tokens :]

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
