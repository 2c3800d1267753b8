"""/v1/chat/completions: body → Job, and events → chat.completion or its chunks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from millis.server.api.body import Body, No, Wire, Yes, read
from millis.server.api.conversation import Message, conversation
from millis.server.api.errors import invalid, unsupported
from millis.server.api.fields import (
    COMMON_REFUSED,
    Asked,
    StreamOptions,
    TemplateValues,
    asked,
    form_field,
    json_grammar,
    sampling,
    schedule,
)
from millis.server.api.job import Conversation, Job, Limits, Tool, ToolChoice
from millis.server.api.logprobs import chat_logprobs
from millis.server.api.tool_parser import Call, Piece
from millis.server.api.tools import (
    AllowedChoice,
    NamedTool,
    ToolChoiceWire,
    ToolWire,
    call_grammar,
    check_tools,
    parameters,
    rule_fields,
    shown_tools,
)
from millis.server.api.writer import DONE, Choice, Writer, call_id, sse, timings_json, usage
from millis.types import Grammar, TokenLogprob

NO_AUDIO = "answers are text"
_NO_REASONING = "the models served here do not reason apart from their answer"


class JsonSchema(Wire):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="answers always keep to the schema; true closes its objects")


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Asked):
    """The body of POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        **COMMON_REFUSED,
        "audio": NO_AUDIO,
        "modalities": NO_AUDIO,
        "functions": "write tools instead",
        "function_call": "write tool_choice instead",
        "prediction": "drafts are made by themselves",
        "reasoning_effort": _NO_REASONING,
        "verbosity": "say in the messages how long the answer should be",
        "web_search_options": "nothing is searched",
        "echo": "it belongs to /v1/completions",
        "chat_template": "the template is the model's",
        "documents": "write them into a message, or use /v1/answer",
        "add_special_tokens": "the chat template writes its own",
        "include_reasoning": _NO_REASONING,
        "mm_processor_kwargs": NO_AUDIO,
        "add_generation_prompt": "an answer is always begun",
        "continue_final_message": "an answer is always begun",
    }

    messages: list[Message] = Field(fail_fast=True)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolWire] | None = None
    tool_choice: ToolChoiceWire | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateValues | None = Field(
        None, description="variables that the model's chat template reads, such as enable_thinking"
    )
    # What follows is refused with any other value.
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    echo: No | None = None
    add_generation_prompt: Yes | None = None
    continue_final_message: No | None = None
    documents: Annotated[list[Any], Field(max_length=0)] | None = None
    add_special_tokens: No | None = None
    include_reasoning: Yes | None = None
    mm_processor_kwargs: Annotated[dict[str, Any], Field(max_length=0)] | None = None


def parse_chat(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(ChatRequest, body)
    choice = tool_choice(request)
    tools = check_tools(
        (
            Tool(f.name, f.description, parameters(f.parameters), f.strict or False)
            for f in (tool.function for tool in request.tools or ())
        ),
        choice,
        limits,
    )
    if request.structured_outputs is not None and tools and choice.mode != "none":
        raise unsupported("structured_outputs", "not together with tools; use response_format or tool_choice=none")
    answer = answer_grammar(request.response_format, limits)
    messages = conversation(request.messages, limits)
    grammar = call_grammar(tools, choice, answer)
    max_tokens = _max_tokens(request)
    return Job(
        endpoint="chat",
        kind="generate",
        **asked(request),
        prompts=(Conversation(messages, shown_tools(tools, choice), request.chat_template_kwargs or {}),),
        params=sampling(
            request,
            limits,
            max_tokens=max_tokens,
            grammar=grammar,
            logprobs=_logprobs(request),
        ),
        form=form_field(grammar, answer, "response_format", request),
        rules={} if grammar is answer else rule_fields(tools, "function.parameters", "response_format"),
        open_ended=max_tokens is None,
        n=choices(request.n, limits),
        stream=request.stream or False,
        include_usage=include_usage(request.stream, request.stream_options),
        tools=tools,
        tool_choice=choice,
        **schedule(request),
    )


def tool_choice(request: ChatRequest) -> ToolChoice:
    parallel = request.parallel_tool_calls is not False
    given = request.tool_choice
    if isinstance(given, NamedTool):
        return ToolChoice("required", given.function.name, parallel)
    if isinstance(given, AllowedChoice):
        allowed = frozenset(tool.function.name for tool in given.allowed_tools.tools)
        return ToolChoice(given.allowed_tools.mode, None, parallel, allowed)
    return ToolChoice(given or ("auto" if request.tools else "none"), None, parallel)


def answer_grammar(form: ResponseFormat | None, limits: Limits) -> Grammar | None:
    """The grammar of `response_format`."""
    if isinstance(form, JsonSchemaFormat):
        where = "response_format.json_schema.schema"
        if form.json_schema.schema_ is None:
            raise invalid(f"{where} is missing", where, "missing_required_parameter")
        return json_grammar(form.json_schema.schema_, limits, where, strict=form.json_schema.strict)
    return Grammar("json_object", "") if isinstance(form, JsonObjectFormat) else None


def choices(n: int | None, limits: Limits) -> int:
    if n is not None and n > limits.n:
        raise invalid(f"n is {n}; {limits.n} choices can be asked for", "n")
    return n or 1


def include_usage(stream: bool | None, options: StreamOptions | None) -> bool:
    if options is not None and not stream:
        raise invalid("stream_options needs stream=true", "stream_options")
    return options is not None and options.include_usage is True


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
    return new if old is None else old


def _logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


class ChatWriter(Writer):
    """chat.completion and chat.completion.chunk."""

    def _begin(self) -> bytes:
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(choice, role) for choice in self.choices)

    def _delta(self, choice: Choice, piece: Piece, logprobs: Sequence[TokenLogprob]) -> bytes:
        if not isinstance(piece, Call):
            return self._chunk(choice, {"content": piece}, logprobs)
        number = len(choice.calls)
        called = {"index": number, **self._call(choice, number, piece)}
        begun = {**called, "function": {"name": piece.name, "arguments": ""}}
        more = {"index": number, "function": {"arguments": piece.arguments}}
        return self._chunk(choice, {"tool_calls": [begun]}, logprobs) + self._chunk(choice, {"tool_calls": [more]})

    def _finish(self, choice: Choice) -> bytes:
        return self._chunk(choice, {}, (), choice.finish_reason)

    def _end(self) -> bytes:
        if not self.job.include_usage:
            return DONE
        return sse(self._head("chat.completion.chunk", [], usage(self.counts())) | {"timings": self.timings()}) + DONE

    def body(self) -> dict[str, Any]:
        whole = [self._choice(choice) for choice in self.choices]
        return self._head("chat.completion", whole, usage(self.counts())) | {"timings": self.timings()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if choice.calls and not choice.text else choice.text,
            "refusal": None,
        }
        if choice.calls:
            message["tool_calls"] = [self._call(choice, i, call) for i, call in enumerate(choice.calls)]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _call(self, choice: Choice, number: int, call: Call) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": call_id(self.head, choice.index, number), "type": "function", "function": function}

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> bytes:
        one = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = self._head("chat.completion.chunk", [one], None)
        if finish_reason is not None:
            chunk["timings"] = timings_json([choice.timings])
        return sse(chunk)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return None if self.job.params.logprobs is None else chat_logprobs(logprobs, self.head.token_bytes)

    def _head(self, kind: str, choices: list[dict[str, Any]], used: dict[str, Any] | None) -> dict[str, Any]:
        return self._completion("chatcmpl", kind, choices, used)
