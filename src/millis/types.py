"""The nouns every layer shares: sampling parameters, timings, results and errors. Imports nothing of ours.

MillisError
├── ModelError        a model file, name or architecture we cannot use
│   ├── FormatError   malformed or unsupported bytes in a model file
│   └── PullError     a model could not be fetched
├── RequestError      a request that cannot be run as asked (also a ValueError)
│   └── GrammarError  a schema, pattern or grammar that is malformed or beyond the limits
├── DeadlineError     a deadline that cannot be met, refused before any work
├── OverloadError     too much work is waiting
├── DataError         a data set, file or row that cannot be used
└── TemplateError     a chat template that is missing, hostile or fails
"""

from __future__ import annotations

import copyreg
import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
Priority = Literal["interactive", "standard", "batch"]
OnDeadline = Literal["partial", "fallback", "error"]
GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


class MillisError(Exception):
    """Root of every error Millis raises on purpose; its text names the cause and the remedy in one line."""

    def __reduce__(self) -> tuple[Any, ...]:  # so that pickles and copies need not know what __init__ wants
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ModelError(MillisError):
    """A model that cannot be found, read or run."""


class FormatError(ModelError):
    """A model file whose bytes are malformed, or use a feature that Millis does not read."""


class PullError(ModelError):
    """A model that could not be fetched or stored."""


class RequestError(MillisError, ValueError):
    """A request whose parameters are invalid or do not fit the model."""


class GrammarError(RequestError):
    """A schema, pattern or grammar that is malformed or beyond the limits on size, depth or compile time."""

    rule: str | None = None  # of a Lark grammar, whose schema is at fault


class DeadlineError(MillisError):
    """A deadline that cannot be met; the request was refused before any work was spent on it."""

    def __init__(self, message: str, *, predicted_ms: float, retry_after_s: float) -> None:
        super().__init__(message)
        self.predicted_ms = predicted_ms  # from arrival to the last byte of the shortest useful answer
        self.retry_after_s = retry_after_s  # when the same request is thought to be in time


class OverloadError(MillisError):
    """Too much work is waiting for this request to be queued."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DataError(MillisError):
    """A data set, file or row that cannot be found, read or used."""


class TemplateError(MillisError):
    """A chat template that is missing, refuses its input, or breaks the sandbox's limits."""


def closed_error() -> RequestError:
    """What whoever uses a model is told that was closed."""
    return RequestError("the model was closed; load it again")


def no_thread(error: RuntimeError) -> MillisError:
    """What to tell the user where the system starts no more threads. Any other RuntimeError is raised again."""
    if str(error) != "can't start new thread":
        raise error
    return MillisError(
        "this system starts no more threads; raise its limit of processes (ulimit -u, or the container's pids limit)"
    )


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. `source`: a JSON schema, "" for any JSON object, a regular expression, a JSON list
    of texts to choose from, or a Lark grammar."""

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    The defaults are greedy. `repetition_penalty` counts the prompt and the output (Keskar et al., 2019, CTRL);
    `presence_penalty` and `frequency_penalty` count the output only, as in OpenAI's API.
    """

    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id → added to its logit
    seed: int | None = None  # None: a fresh seed for every request
    stop: Sequence[str] = ()  # the text ends before the first of these
    ignore_eos: bool = False  # go on past end-of-sequence tokens
    grammar: Grammar | None = None  # only answers of this form
    logprobs: int | None = None  # None: off; n: the chosen token's log-probability and the n best beside it

    def __post_init__(self) -> None:
        keep = partial(object.__setattr__, self)
        if isinstance(self.stop, str):
            keep("stop", (self.stop,))
        keep("max_tokens", whole("max_tokens", self.max_tokens, 1))
        keep("temperature", number("temperature", self.temperature, 0, 100))
        keep("top_k", whole("top_k", self.top_k, 0))
        keep("top_p", number("top_p", self.top_p, 0, 1))
        keep("min_p", number("min_p", self.min_p, 0, 1))
        keep("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0.01, 100))
        keep("presence_penalty", number("presence_penalty", self.presence_penalty, -2, 2))
        keep("frequency_penalty", number("frequency_penalty", self.frequency_penalty, -2, 2))
        if self.top_p == 0:
            raise RequestError("top_p must be above 0; use temperature=0 for the most likely token")
        if self.logprobs is not None:
            keep("logprobs", whole("logprobs", self.logprobs, 0, 64))
        if self.seed is not None:
            keep("seed", whole("seed", self.seed, 0, 2**64 - 1))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, not {brief(self.ignore_eos)}")
        if not isinstance(self.stop, Sequence) or any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop must hold non-empty strings")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar must be a Grammar, not {brief(self.grammar)}")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos and a grammar exclude each other: where a grammar ends, the answer ends")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, not be {brief(self.logit_bias)}")
        biases = {}
        for token, bias in self.logit_bias.items():
            token = whole("a token of logit_bias", token, 0, 2**31 - 1)
            biases[token] = number(f"logit_bias[{token}]", bias, -math.inf, 1e4)
        keep("logit_bias", biases)


def whole(name: str, value: Any, low: float, high: float = math.inf) -> int:
    """A whole number in [low, high], NumPy's among them, as an int. RequestError: anything else, True and 1.0 too."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not low <= found <= high:
        raise RequestError(f"{name} must be a whole number in [{low}, {high}], not {brief(value)}")
    return found


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high], NumPy's among them, as a float. RequestError: anything else, True and nan too."""
    found, real = None, isinstance(value, Real) and not isinstance(value, bool)
    if real and low <= value <= high:
        with suppress(OverflowError):  # a whole number beyond any float, where there is no other limit
            found = float(value)
    if found is None:
        raise RequestError(f"{name} must lie in [{low}, {high}], not {brief(value)}")
    return found


def brief(value: object) -> str:
    """The value as an error quotes it: in one line, and not at length."""
    try:
        shown = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        shown = type(value).__name__
    shown = " ".join(shown.split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


@dataclass(slots=True, kw_only=True)
class Timings:
    """Where a request's milliseconds went (monotonic clock) and what was counted on the way."""

    queue_ms: float = 0.0  # from arrival to the first step that held one of its tokens
    tokenize_ms: float = 0.0  # template and text → ids
    prefill_ms: float = 0.0  # steps up to the first token
    first_token_ms: float = 0.0  # arrival to first token
    decode_ms: float = 0.0  # first token to last token
    total_ms: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    deadline_ms: float | None = None
    slack_ms: float | None = None  # deadline minus total; negative when late

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first over the time they took; 0 with fewer than two tokens."""
        return 1000 * (self.completion_tokens - 1) / self.decode_ms if self.decode_ms > 0 else 0.0

    def asdict(self) -> dict[str, Any]:
        """The fields as a dictionary, without the deadline's where none was given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token's log-probability in nats, before temperature and truncation, and its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """What a text is. `scores` sum to 1, best first; where several labels may fit each lies in [0, 1] by itself.

    label: the best one; None where its score is below what was asked for. labels: those that fit, where several may.
    complete: False where the deadline left time for the labels' first tokens only, which is what was compared.
    """

    label: str | None
    scores: Mapping[str, float]
    timings: Timings
    labels: tuple[str, ...] = ()
    complete: bool = True

    def __str__(self) -> str:
        return self.label or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    timings: Timings
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text
