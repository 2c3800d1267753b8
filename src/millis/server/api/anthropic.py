"""/v1/messages and its count_tokens: body → Job, in Anthropic's form. message_writer.py writes the answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from millis.server.api.body import Body, Request, Wire, read
from millis.server.api.conversation import bounded
from millis.server.api.errors import invalid
from millis.server.api.fields import Deadline, Named, Stop, asked, form_field, json_grammar, schedule, stop_texts
from millis.server.api.job import Conversation, Job, Limits, Tool, ToolChoice
from millis.server.api.tools import Name, call_grammar, check_tools, rule_fields, shown_tools
from millis.types import Grammar, SamplingParams


class CacheControl(Wire):
    """A hint where to cache; prefixes are cached by themselves."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Wire):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolUseBlock(Wire):
    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: None = None
    toolset_name: None = None


class ToolResultBlock(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class UserTurn(Wire):
    role: Literal["user"]
    content: str | list[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]]


class AssistantTurn(Wire):
    role: Literal["assistant"]
    content: str | list[Annotated[TextBlock | ToolUseBlock, Field(discriminator="type")]]


Turn = Annotated[UserTurn | AssistantTurn, Field(discriminator="role")]


class ToolDefinition(Wire):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None  # changes no answer: a call is sent when it is whole


class AutoChoice(Wire):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Wire):
    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Wire):
    type: Literal["none"]


class UserMetadata(Wire):
    user_id: str | None = None


class NoThinking(Wire):
    type: Literal["disabled"]


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    format: OutputFormat | None = None
    effort: None = None


class Turns(Request):
    """The fields of /v1/messages that are read."""

    refused: ClassVar[Mapping[str, str]] = {
        "thinking": "the models served here do not think apart from their answer",
        "container": "no code is run here",
        "mcp_servers": "tools are called by the client",
        "thread": "nothing is stored here; send the whole conversation as messages",
        "context_management": "the conversation is read as it is sent",
        "service_tier": "there is one tier; use priority: interactive, standard or batch",
        "inference_geo": "answers are computed on this machine",
        "speed": "there is one speed",
        "diagnostics": "timings are in every answer",
        "user_profile_id": "there are no profiles",
        "workspace_id": "there are no workspaces",
    }

    messages: list[Turn] = Field(fail_fast=True)
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Annotated[AutoChoice | NamedChoice | NoChoice, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None
    # What follows changes no answer.
    cache_control: CacheControl | None = None
    # What follows is refused with any other value.
    thinking: NoThinking | None = None
    speed: Literal["standard"] | None = None


class CountRequest(Turns):
    """The body of POST /v1/messages/count_tokens."""

    model: str


class MessagesRequest(Named, Turns, Deadline):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[Stop] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    metadata: UserMetadata | None = None  # changes no answer
    service_tier: Literal["auto", "standard_only"] | None = None  # refused with any other value


def parse_messages(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(MessagesRequest, body)
    conversation, tools, choice = _conversation(request, limits)
    answer = _grammar(request.output_config, limits)
    grammar = call_grammar(tools, choice, answer)
    return Job(
        endpoint="messages",
        kind="generate",
        **asked(request),
        prompts=(conversation,),
        params=SamplingParams(
            max_tokens=request.max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            stop=stop_texts(request.stop_sequences, limits, "stop_sequences"),
            grammar=grammar,
        ),
        form=form_field(grammar, answer, "output_config.format"),
        rules={} if grammar is answer else rule_fields(tools, "input_schema", "output_config.format"),
        stream=request.stream or False,
        tools=tools,
        tool_choice=choice,
        **schedule(request),
    )


def parse_count(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(CountRequest, body)
    conversation, _, _ = _conversation(request, limits)
    return Job(endpoint="count_tokens", kind="tokenize", model=request.model, prompts=(conversation,))


def _conversation(request: Turns, limits: Limits) -> tuple[Conversation, tuple[Tool, ...], ToolChoice]:
    """What the model reads, the tools that it may call, and whether it must."""
    choice = _tool_choice(request)
    tools = check_tools(
        (Tool(t.name, t.description, t.input_schema, t.strict or False) for t in request.tools or ()), choice, limits
    )
    return Conversation(_messages(request, limits), shown_tools(tools, choice)), tools, choice


def _tool_choice(request: Turns) -> ToolChoice:
    given = request.tool_choice
    if given is None:
        return ToolChoice("auto" if request.tools else "none")
    if isinstance(given, NoChoice):
        return ToolChoice("none")
    parallel = not given.disable_parallel_tool_use
    if isinstance(given, NamedChoice):
        return ToolChoice("required", given.name, parallel)
    return ToolChoice("required" if given.type == "any" else "auto", None, parallel)


def _grammar(config: OutputConfig | None, limits: Limits) -> Grammar | None:
    if config is None or config.format is None:
        return None
    return json_grammar(config.format.schema_, limits, "output_config.format.schema")


def _messages(request: Turns, limits: Limits) -> tuple[dict[str, Any], ...]:
    """The conversation as chat templates read it: a tool's result is a message of its own."""
    if not request.messages or request.messages[-1].role != "user":
        raise invalid("messages must end with one of the user: an answer is begun, not continued", "messages")
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
    for i, turn in enumerate(request.messages):
        if turn.role == "user" and turn.content == []:
            raise invalid(f"messages[{i}].content is empty; give at least one block", f"messages[{i}].content")
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif isinstance(turn, AssistantTurn):
            messages.append(_assistant(turn.content))
        else:
            messages += _user(turn.content)
    return bounded(messages, limits)


def _assistant(blocks: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _text(b for b in blocks if isinstance(b, TextBlock))}
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
        for b in blocks
        if isinstance(b, ToolUseBlock)
    ]
    return message | {"tool_calls": calls} if calls else message


def _user(blocks: list[Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            text = ("Error: " if block.is_error else "") + _text(block.content or "")
            messages.append({"role": "tool", "content": text, "tool_call_id": block.tool_use_id})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += block.text
        else:
            messages.append({"role": "user", "content": block.text})
    return messages


def _text(content: str | Iterable[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
