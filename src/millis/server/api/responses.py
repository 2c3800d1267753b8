"""/v1/responses: body → Job. The answer is written by response_writer.py. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Discriminator, Field, Tag, TypeAdapter

from millis.server.api.body import Body, No, Wire, read
from millis.server.api.chat import NO_AUDIO, JsonObjectFormat, TextFormat
from millis.server.api.conversation import RefusalPart, bounded, called, text_of
from millis.server.api.errors import invalid, unsupported
from millis.server.api.fields import (
    COMMON_REFUSED,
    Account,
    Named,
    Sampling,
    asked,
    form_field,
    json_grammar,
    sampling,
    schedule,
)
from millis.server.api.job import Conversation, Job, Limits, Tool, ToolChoice
from millis.server.api.tools import Name, call_grammar, check_tools, parameters, rule_fields, shown_tools
from millis.types import Grammar

_FOREGROUND = "an answer is written while its client waits"
_UNKEPT = "this server keeps no responses; start it with --max-stored N, or send the whole conversation as input"
_LOGPROBS = "message.output_text.logprobs"


class InputText(Wire):
    type: Literal["input_text"]
    text: str


class OutputText(Wire):
    """Part of an earlier answer, as it was sent; `parsed` is the text as OpenAI's client understood it."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None


Part = Annotated[InputText | OutputText | RefusalPart, Field(discriminator="type")]


class InputMessage(Wire):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCall(Wire):
    """A call of an earlier answer, and what OpenAI's client adds to it."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = None
    caller: None = None
    namespace: None = None
    async_: None = None


class FunctionCallOutput(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class SummaryText(Wire):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Wire):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Wire):
    """What a model thought before an earlier answer; none here is shown it."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class ItemReference(Wire):
    """An item of a response that is kept."""

    type: Literal["item_reference"] | None = None
    id: str


def _kind(item: Any) -> str | None:
    if isinstance(item, dict) and item.get("type") is None and "id" in item and "role" not in item:
        return "item_reference"
    kind = item.get("type") or "message" if isinstance(item, dict) else None
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


class Past(Protocol):
    """The responses that are kept for whoever asks."""

    def conversation(self, response_id: str) -> list[dict[str, Any]]: ...

    def items(self, ids: Collection[str]) -> dict[str, dict[str, Any]]: ...

    def keep(self, items: Sequence[Mapping[str, Any]], previous: str | None, response: Mapping[str, Any]) -> None: ...


class FunctionTool(Wire):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Wire):
    type: Literal["function"]
    name: Name


class AllowedFunctions(Wire):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1)]


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Wire):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Wire):
    effort: Literal["none"] | None = None
    summary: None = None


class ObfuscationOptions(Wire):
    include_obfuscation: No | None = None


class ResponseRequest(Named, Sampling, Account):
    """The body of POST /v1/responses."""

    refused: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in COMMON_REFUSED.items() if name != "store"},
        "background": _FOREGROUND,
        "background_options": _FOREGROUND,
        "conversation": "there are no conversations here; send previous_response_id, or the whole of it as input",
        "prompt": "no prompts are stored here; send instructions and input",
        "context_management": "the conversation is read as it is sent",
        "include": f"only {_LOGPROBS} can be included",
        "max_tool_calls": "tools are called by the client",
        "reasoning": "the models served here do not reason apart from their answer",
        "image": NO_AUDIO,
        "access_programs": "there are none",
        "stop": "the endpoint has no stop; use /v1/chat/completions",
    }

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: ObfuscationOptions | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunctionTool | AllowedFunctions, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    store: bool | None = Field(None, description="true: the response is kept in memory for a while; nothing else is")
    previous_response_id: str | None = Field(None, description="of a kept response, which this one goes on from")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the oldest turns of a conversation that is too long are left out"
    )
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # What follows is refused with any other value.
    background: No | None = None
    reasoning: Reasoning | None = None
    stop: None = None


def parse_response(body: Body, limits: Limits, past: Past | None = None) -> Job:
    """ApiError 400 names the field at fault. past: the responses that are kept; None: none is."""
    request = read(ResponseRequest, body)
    before, own = _before(request, past), _own(request, limits, past)
    choice = _tool_choice(request)
    tools = check_tools(
        (Tool(t.name, t.description, parameters(t.parameters), t.strict or False) for t in request.tools or ()),
        choice,
        limits,
    )
    if request.structured_outputs is not None and tools and choice.mode != "none":
        raise unsupported("structured_outputs", "not together with tools; use text.format or tool_choice=none")
    told = _LOGPROBS in (request.include or ())
    if request.top_logprobs and not told:
        raise invalid(f"top_logprobs needs include=[{_LOGPROBS!r}]", "top_logprobs")
    answer = _grammar(request.text, limits)
    grammar = call_grammar(tools, choice, answer)
    return Job(
        endpoint="responses",
        kind="generate",
        **asked(request),
        prompts=(Conversation(_messages(request.instructions, before, own, limits), shown_tools(tools, choice)),),
        params=sampling(
            request,
            limits,
            max_tokens=request.max_output_tokens,
            grammar=grammar,
            logprobs=(request.top_logprobs or 0) if told else None,
        ),
        form=form_field(grammar, answer, "text.format", request),
        rules={} if grammar is answer else rule_fields(tools, "parameters", "text.format"),
        open_ended=request.max_output_tokens is None,
        stream=request.stream or False,
        tools=tools,
        tool_choice=choice,
        drops_oldest=request.truncation == "auto",
        keep=_keep(request, own, past),
        extra=_repeated(request),
        **schedule(request),
    )


def _tool_choice(request: ResponseRequest) -> ToolChoice:
    parallel = request.parallel_tool_calls is not False
    given = request.tool_choice
    if isinstance(given, NamedFunctionTool):
        return ToolChoice("required", given.name, parallel)
    if isinstance(given, AllowedFunctions):
        return ToolChoice(given.mode, None, parallel, frozenset(tool.name for tool in given.tools))
    return ToolChoice(given or ("auto" if request.tools else "none"), None, parallel)


def _grammar(text: TextConfig | None, limits: Limits) -> Grammar | None:
    form = text.format if text else None
    if isinstance(form, SchemaFormat):
        return json_grammar(form.schema_, limits, "text.format.schema", strict=form.strict)
    return Grammar("json_object", "") if isinstance(form, JsonObjectFormat) else None


def _before(request: ResponseRequest, past: Past | None) -> list[Item]:
    """The conversation that is gone on from."""
    given = request.previous_response_id
    if given is None:
        return []
    if past is None:
        raise unsupported("previous_response_id", _UNKEPT)
    try:
        return _ITEMS.validate_python(past.conversation(given))
    except KeyError as error:
        message = f"previous_response_id: no response {error.args[0]!r:.100} is kept for this key; have each kept with "
        message += "store: true, or send the whole conversation as input"
        raise invalid(message, "previous_response_id", "previous_response_not_found") from None


def _own(request: ResponseRequest, limits: Limits, past: Past | None) -> list[Item]:
    """The input, with the items that it refers to."""
    given = request.input
    if isinstance(given, str):
        return [InputMessage(type="message", role="user", content=given)]
    if len(given) > limits.messages:
        raise invalid(f"input has {len(given)} entries; {limits.messages} can be used", "input")
    if all(isinstance(item, ReasoningItem) for item in given):
        raise invalid("input has nothing to answer; give at least one message", "input")
    wanted = {item.id: i for i, item in enumerate(given) if isinstance(item, ItemReference)}
    if not wanted:
        return given
    if past is None:
        raise unsupported(f"input[{min(wanted.values())}]", _UNKEPT)
    found = past.items(wanted)
    for name, i in wanted.items():
        if name not in found:
            message = f"input[{i}].id: no item {name!r:.100} is kept for this key; have its response kept with "
            raise invalid(message + "store: true, or send the item itself", f"input[{i}].id", "item_not_found")
    whole = dict(zip(found, _ITEMS.validate_python([*found.values()]), strict=True))
    return [whole[item.id] if isinstance(item, ItemReference) else item for item in given]


def _keep(
    request: ResponseRequest, own: Sequence[Item], past: Past | None
) -> Callable[[Mapping[str, Any]], None] | None:
    """What keeps the answer, if that is asked for."""
    if not request.store:
        return None
    if past is None:
        raise unsupported("store", _UNKEPT)
    items = [{"type": "message", "status": "completed", **_plain(item)} for item in own]
    return partial(past.keep, items, request.previous_response_id)


def _plain(item: Item) -> dict[str, Any]:
    """An item as it is listed: what a message says is a list of parts."""
    found = item.model_dump(exclude_none=True)
    if isinstance(item, InputMessage) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        more: dict[str, Any] = {"annotations": []} if item.role == "assistant" else {}
        found["content"] = [{"type": kind, "text": item.content, **more}]
    return found


def _messages(
    instructions: str | None, before: Sequence[Item], own: Sequence[Item], limits: Limits
) -> tuple[dict[str, Any], ...]:
    """The conversation as chat templates read it: calls of one turn stand in one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for i, item in enumerate([*before, *own], -len(before)):
        if isinstance(item, InputMessage):
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
        elif isinstance(item, FunctionCallOutput):
            messages.append({"role": "tool", "content": text_of(item.output), "tool_call_id": item.call_id})
        elif isinstance(item, FunctionCall):
            call = called(item.name, item.arguments, item.call_id, f"input[{i}].arguments")
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
    return bounded(messages, limits, "input")


def _repeated(request: ResponseRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    choice = request.tool_choice
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    return {
        "instructions": request.instructions,
        "metadata": request.metadata or {},
        "max_output_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice.model_dump() if isinstance(choice, Wire) else choice or "auto",
        "tools": [
            {**tool.model_dump(exclude_none=True), "parameters": tool.parameters, "strict": tool.strict or False}
            for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": request.truncation or "disabled",
        "store": request.store is True,
        "previous_response_id": request.previous_response_id,
        "user": request.user,
    }
