"""Job: what every endpoint's body becomes, and from there to token ids and sampling parameters. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from millis.server.api.errors import ApiError, from_error, invalid, unsupported
from millis.server.api.truncation import fitting
from millis.tasks.cascade import CONFIDENCE
from millis.types import MillisError, OnDeadline, Priority, SamplingParams

Endpoint = Literal[
    "chat",
    "completions",
    "responses",
    "messages",
    "count_tokens",
    "embeddings",
    "classify",
    "score",
    "rerank",
    "answer",
    "tokenize",
    "detokenize",
]
Kind = Literal["generate", "embed", "score", "tokenize", "detokenize"]
PROMPT_FIELDS: Mapping[Endpoint, str] = {  # that hold all prompts
    "chat": "messages",
    "completions": "prompt",
    "responses": "input",
    "messages": "messages",
    "count_tokens": "messages",
    "embeddings": "input",
    "classify": "input",
    "answer": "question",
    "tokenize": "messages",
}
MAX_DEADLINE_MS = 86_400_000.0  # a day


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for. Each is checked before anything is computed."""

    prompt_chars: int = 1 << 20  # of all messages, or of all prompts, together
    messages: int = 2048
    prompts: int = 128  # of a completion
    inputs: int = 2048  # of embeddings and comparisons, which take a list
    stop: int = 64
    stop_chars: int = 256
    logit_bias: int = 1024
    n: int = 8
    tools: int = 128
    schema_chars: int = 1 << 16  # of each JSON schema, pattern or grammar
    labels: int = 256  # of a classification
    told_tokens: int = 1 << 15  # of prompts whose log-probabilities are told, in all choices together


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates read them, and the tools the model may call, in OpenAI's form."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template, beside these


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: a user's message where the model has a chat template, plain text where it has none."""

    text: str


Prompt = str | tuple[int, ...] | Conversation | Instruction


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools may or must be called, which one if it is named, and whether several at once.

    allowed: of the tools, those that the model is told of; None: all.
    """

    mode: Literal["none", "auto", "required"] = "none"
    name: str | None = None
    parallel: bool = True
    allowed: frozenset[str] | None = None

    def offers(self, tool: Tool) -> bool:
        """Whether the model is told of a tool."""
        return self.mode != "none" and (self.allowed is None or tool.name in self.allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked request. Choice c of prompt p has the index p·n + c."""

    endpoint: Endpoint
    kind: Kind
    model: str | None  # None: whatever is served (only /tokenize and /detokenize)
    prompts: tuple[Prompt, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    form: str | None = None  # the field of the body that the answer's grammar comes from
    rules: Mapping[str, str] = field(default_factory=dict)  # of that grammar, whose schemas come from other fields
    left_open: frozenset[str] = frozenset()  # of the fields that a model's files may answer: those not given
    open_ended: bool = False  # no max_tokens was given: as many as the context holds
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    deadline_ms: float | None = None  # from the arrival of the request's first byte
    priority: Priority = "standard"
    on_deadline: OnDeadline = "partial"
    fallback: str = ""
    models: tuple[str, ...] = ()  # of a cascade, the smallest first; `model` is the first of them
    confidence: float = CONFIDENCE  # from which on an answer needs no larger one
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    continuations: tuple[str, ...] = ()  # kind "score": the labels
    truncate: int | None = None  # tokens that an encoder reads of a text; -1: as many as it can; None: it must fit
    echo: bool = False  # the answer begins with its prompt
    writes: bool = True  # false: and ends with it
    prompt_logprobs: int | None = None  # so many likely tokens are told of each place of a prompt, beside the choice
    add_special: bool = True
    parse_special: bool = False  # whether a text may spell control tokens; messages never do
    add_generation_prompt: bool = True
    drops_oldest: bool = False  # the oldest turns of a conversation that is too long
    keep: Callable[[Mapping[str, Any]], None] | None = None  # is handed the whole answer, where that is to be kept
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only the endpoint's own writer reads

    @property
    def best(self) -> int | None:
        """How many likely tokens are to be found of each place of a prompt; None: nothing is told of prompts."""
        asked = [self.params.logprobs if self.echo else None, self.prompt_logprobs]
        return max((one for one in asked if one is not None), default=None)


class ChatTokenizer(Protocol):
    """What of millis.tokenizer.Tokenizer prompts need."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def chat_variables(self) -> frozenset[str]: ...

    @property
    def around(self) -> tuple[list[int], list[int]]: ...

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]: ...


def prompt_ids(job: Job, tokenizer: ChatTokenizer, room: int | None = None) -> list[list[int]]:
    """The token ids of each prompt. ApiError: a template that refuses the messages, an empty prompt.

    room: tokens that a conversation may have whose oldest turns may be dropped.
    """
    found, param = [], PROMPT_FIELDS.get(job.endpoint)
    for i, prompt in enumerate(job.prompts):
        try:
            ids = _ids(prompt, job, tokenizer, room)
        except MillisError as error:
            raise from_error(error, param) from None
        if not ids and job.kind not in ("tokenize", "detokenize"):
            raise invalid(f"text {i} is empty: it gives the model no token to begin with", param)
        found.append(ids)
    return found


def _ids(prompt: Prompt, job: Job, tokenizer: ChatTokenizer, room: int | None) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special=job.add_special, parse_special=job.parse_special)
        before = tokenizer.around[0] if job.add_special and job.parse_special else []
        doubled = ids[len(before) : 2 * len(before)] == before  # the text spells what is put before every text
        return ids[len(before) :] if doubled else ids
    if isinstance(prompt, Instruction):
        if not tokenizer.has_chat_template:
            return tokenizer.encode(prompt.text)
        return tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
    if isinstance(prompt, Conversation):
        if job.drops_oldest and room is not None:
            return fitting(prompt.messages, lambda messages: _chat_ids(messages, prompt, job, tokenizer), room)
        return _chat_ids(prompt.messages, prompt, job, tokenizer)
    return list(prompt)


# Variables of templates that are no settings: what is said elsewhere, and what the template's language gives.
_OURS = frozenset(
    "messages tools documents add_generation_prompt continue_final_message bos_token eos_token pad_token unk_token "
    "raise_exception strftime_now".split()
)


def _chat_ids(
    messages: Sequence[Mapping[str, Any]], prompt: Conversation, job: Job, tokenizer: ChatTokenizer
) -> list[int]:
    """The ids of these of the prompt's messages."""
    from millis.server.api.tools import describe_tools

    known = tokenizer.chat_variables
    for name in prompt.variables:
        if name in _OURS or name not in known:
            raise unsupported("chat_template_kwargs", f"{name!r} is not a setting of the model's chat template")
    options = dict(prompt.variables)
    if "tools" not in known:
        messages = describe_tools(messages, prompt.tools)
    elif prompt.tools:
        options["tools"] = list(prompt.tools)
    if not job.add_generation_prompt:
        options["add_generation_prompt"] = False
    return tokenizer.encode_chat(messages, **options)


def check_ids(ids: Sequence[int], vocab_size: int, where: str = "prompt") -> None:
    """ApiError where a token id that a client sent is none of the model's."""
    wrong = next((i for i, token in enumerate(ids) if token >= vocab_size), None)
    if wrong is not None:
        raise invalid(f"{where}[{wrong}] is token {ids[wrong]}; the model has {vocab_size} tokens", where)


def choice_params(job: Job, choice: int, prompt_tokens: int, context: int) -> SamplingParams:
    """The sampling parameters of choice 0 … n − 1 for a prompt of so many tokens.

    ApiError context_length_exceeded where prompt and answer do not fit into `context` tokens.
    """
    params = job.params
    room = context - prompt_tokens
    if not job.writes:
        if room < 0:
            message = f"the model's context is {context} tokens; the prompt has {prompt_tokens}: shorten it"
            raise invalid(message, PROMPT_FIELDS[job.endpoint], "context_length_exceeded")
        return params
    if room < 1 or (not job.open_ended and params.max_tokens > room):
        asked = "" if job.open_ended else f" and max_tokens is {params.max_tokens}"
        message = f"the model's context is {context} tokens; the prompt has {prompt_tokens}{asked}: shorten one of them"
        raise invalid(message, PROMPT_FIELDS[job.endpoint], "context_length_exceeded")
    if job.open_ended:
        params = replace(params, max_tokens=room)
    if choice and params.seed is not None:
        params = replace(params, seed=(params.seed + choice) % 2**64)
    return params


def with_deadline(job: Job, headers: Mapping[str, str]) -> Job:
    """The job with the earliest of its deadline, `x-deadline-ms` and `x-request-timeout-seconds` (names in lower case).

    ApiError where a header is not a positive number.
    """
    found = [] if job.deadline_ms is None else [job.deadline_ms]
    for name, unit_ms in (("x-deadline-ms", 1.0), ("x-request-timeout-seconds", 1000.0)):
        if (text := headers.get(name)) is not None:
            found.append(_positive(name, text) * unit_ms)
    return replace(job, deadline_ms=min(*found, MAX_DEADLINE_MS)) if found else job


def _positive(name: str, text: str) -> float:
    try:
        value = float(text) if len(text) <= 32 else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ApiError(400, f"the header {name} must be a positive number", param=name, code="invalid_value")
    return value
