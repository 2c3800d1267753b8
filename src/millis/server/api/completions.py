"""/v1/completions: body → Job, and events → text_completion. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from millis.engine.runner import Ranked
from millis.server.api.body import Body, Yes, read
from millis.server.api.chat import ResponseFormat, answer_grammar, choices, include_usage
from millis.server.api.conversation import check_filled, check_length
from millis.server.api.echo import Echo, echo_logprobs, prompt_logprobs
from millis.server.api.errors import invalid, unsupported
from millis.server.api.fields import COMMON_REFUSED, Asked, StreamOptions, asked, form_field, sampling, schedule
from millis.server.api.job import Job, Limits, Prompt
from millis.server.api.logprobs import Offsets, completion_logprobs
from millis.server.api.tool_parser import Piece
from millis.server.api.writer import DONE, Choice, Head, Writer, sse, timings_json, usage
from millis.types import TokenLogprob

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MOST_LOGPROBS = 5  # OpenAI's
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
TextOrTokens = (
    str | Annotated[list[str], Field(fail_fast=True)] | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
)


class CompletionRequest(Asked):
    """The body of POST /v1/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in COMMON_REFUSED.items() if name != "prompt_logprobs"},
        "suffix": "text is continued, not inserted",
        "add_special_tokens": "a text begins as the model's tokenizer has it; send token ids to choose",
    }

    prompt: TextOrTokens
    max_tokens: Annotated[int, Field(ge=0, description="0: nothing, with echo only")] | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="whether the answer begins with its prompt; `logprobs` tell of both")
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    parse_special: bool | None = Field(
        None, description="whether a text may spell control tokens such as <|im_start|>; it may unless this is false"
    )
    # What follows is refused with any other value.
    suffix: Literal[""] | None = None
    add_special_tokens: Yes | None = None


def parse_completion(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(CompletionRequest, body)
    grammar = answer_grammar(request.response_format, limits)
    writes, echo = request.max_tokens != 0, request.echo or False
    if not (writes or echo):
        raise invalid(
            "max_tokens is 0, which asks for the prompt alone: send echo, too, or ask for a token", "max_tokens"
        )
    if request.prompt_logprobs is not None and request.stream:
        raise unsupported("prompt_logprobs", "a stream does not tell them; send echo and logprobs, or do not stream")
    prompts = inputs(request.prompt, limits, "prompt", limits.prompts)
    if request.models is not None and not (len(prompts) == 1 and isinstance(prompts[0], str)):
        raise invalid("prompt must be one text where models are named: each reads it as ids of its own", "prompt")
    return Job(
        endpoint="completions",
        kind="generate",
        **asked(request),
        prompts=prompts,
        params=sampling(
            request,
            limits,
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else max(1, request.max_tokens),
            grammar=grammar,
            logprobs=request.logprobs,
        ),
        form=form_field(grammar, grammar, "response_format", request),
        n=choices(request.n, limits),
        stream=request.stream or False,
        include_usage=include_usage(request.stream, request.stream_options),
        echo=echo,
        writes=writes,
        prompt_logprobs=request.prompt_logprobs,
        parse_special=request.parse_special is not False,
        **schedule(request),
    )


def inputs(given: TextOrTokens, limits: Limits, param: str, most: int) -> tuple[Prompt, ...]:
    """The prompts of a field that takes a text, texts, token ids, or lists of these."""
    several: list[Any] = [given] if isinstance(given, str) or _is_tokens(given) else list(given)
    check_filled(several, param)
    if len(several) > most:
        raise invalid(f"{param} has {len(several)} entries; {most} can be used", param)
    check_length(sum(map(len, several)), limits, param)
    return tuple(one if isinstance(one, str) else tuple(one) for one in several)


def _is_tokens(given: Sequence[Any]) -> bool:
    return bool(given) and isinstance(given[0], int)


class CompletionWriter(Writer):
    """text_completion, whole or in pieces."""

    def __init__(self, job: Job, head: Head) -> None:
        super().__init__(job, head)
        wanted = job.params.logprobs is not None
        self._offsets = [Offsets(head.detokenizer()) for _ in self.choices] if wanted else None
        self._prompts: dict[int, list[dict[str, Any] | None]] = {}  # prompt_logprobs of each choice

    def echo(self, indices: Sequence[int], echo: Echo, ranked: Ranked | None) -> bytes:
        """The prompt of choices, before anything else of them. ranked: of its tokens behind the first, if asked for."""
        job, token_bytes, sent = self.job, self.head.token_bytes, b""
        if job.prompt_logprobs is not None:
            self._prompts |= dict.fromkeys(indices, prompt_logprobs(echo, ranked, job.prompt_logprobs, token_bytes))
        if not job.echo:
            return sent
        told = None
        if job.params.logprobs is not None:
            told = echo_logprobs(echo, ranked, job.params.logprobs, token_bytes)
        for index in indices:
            choice = self.choices[index]
            choice.add(echo.text)
            choice.echo = told
            if self._offsets is not None:
                self._offsets[index] = Offsets(self.head.detokenizer(), len(echo.text))
            if job.stream:
                one = {"text": echo.text, "index": index, "logprobs": told, "finish_reason": None}
                sent += sse(self._head([one], None), long=told is not None)
        return sent

    def _delta(self, choice: Choice, piece: Piece, logprobs: Sequence[TokenLogprob]) -> bytes:
        assert isinstance(piece, str)
        return self._chunk(self._choice(choice, piece, logprobs, None))

    def _finish(self, choice: Choice) -> bytes:
        last = self._choice(choice, "", (), choice.finish_reason)
        return self._chunk(last, {"timings": timings_json([choice.timings])})

    def _end(self) -> bytes:
        if not self.job.include_usage:
            return DONE
        return sse(self._head([], usage(self.counts())) | {"timings": self.timings()}) + DONE

    def body(self) -> dict[str, Any]:
        whole = [self._whole(one) for one in self.choices]
        return self._head(whole, usage(self.counts())) | {"timings": self.timings()}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        found = self._choice(choice, choice.text, choice.logprobs, choice.finish_reason)
        if choice.echo is not None:
            found["logprobs"] = {name: values + found["logprobs"][name] for name, values in choice.echo.items()}
        if choice.index in self._prompts:
            found["prompt_logprobs"] = self._prompts[choice.index]
        return found

    def _choice(
        self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        shown = None
        if self._offsets is not None:
            shown = completion_logprobs(logprobs, self.head.token_bytes, self._offsets[choice.index])
        return {"text": text, "index": choice.index, "logprobs": shown, "finish_reason": reason}

    def _chunk(self, choice: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        return sse(self._head([choice], None) | (more or {}))

    def _head(self, choices: list[dict[str, Any]], used: dict[str, Any] | None) -> dict[str, Any]:
        return self._completion("cmpl", "text_completion", choices, used)
