"""Messages of /v1/chat/completions: their wire form, and as chat templates read them. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence, Sized
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from millis.server.api.body import Wire
from millis.server.api.errors import invalid
from millis.server.api.job import Limits
from millis.server.api.tools import Name


class TextPart(Wire):
    type: Literal["text"]
    text: str


class RefusalPart(Wire):
    """Part of an earlier answer, of a model that may refuse to give one."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What was said."""
        return self.refusal


Content = str | list[TextPart]
Said = str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Wire):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Wire):
    name: Name
    arguments: str
    parsed_arguments: Any = None  # the same, added by OpenAI's client


class ToolCall(Wire):
    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # left by clients that joined the parts of a stream


class AssistantMessage(Wire):
    """The fields that are null stand in every answer, and clients send answers back; `parsed` is what theirs added."""

    role: Literal["assistant"]
    content: Said | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Wire):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def conversation(messages: Sequence[Message], limits: Limits) -> tuple[dict[str, Any], ...]:
    """The messages as chat templates read them. ApiError: too many or too long, arguments that are no JSON object."""
    if not messages:
        raise invalid("messages is empty; give at least one message", "messages")
    return bounded([_plain(i, message) for i, message in enumerate(messages)], limits)


def bounded(messages: Sequence[dict[str, Any]], limits: Limits, param: str = "messages") -> tuple[dict[str, Any], ...]:
    """The messages, if there are not too many and they are not too long."""
    if len(messages) > limits.messages:
        raise invalid(f"{param} has {len(messages)} entries; {limits.messages} can be used", param)
    check_length(sum(_length(message) for message in messages), limits, param)
    return tuple(messages)


def check_filled(texts: Sequence[Sized], param: str) -> None:
    """ApiError where there are no texts, or one is empty."""
    if not texts:
        raise invalid(f"{param} is empty", param)
    for i, text in enumerate(texts):
        if len(text) == 0:
            where = f"{param}[{i}]" if len(texts) > 1 else param
            raise invalid(f"{where} is empty", where)


def check_length(characters: int, limits: Limits, param: str) -> None:
    if characters > limits.prompt_chars:
        raise invalid(
            f"{param} has {characters} characters; {limits.prompt_chars} can be used", param, "string_above_max_length"
        )


class Part(Protocol):
    """Of a message's content."""

    @property
    def text(self) -> str: ...


def text_of(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def called(name: str, arguments: str, call_id: str, where: str) -> dict[str, Any]:
    """A tool call of an earlier turn. Templates write arguments as JSON themselves, so they get the object."""
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(f"{where} must be a JSON object, as text", where)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": found}}


def _plain(i: int, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(message, AssistantMessage) and content is None:
        content = message.refusal
        if content is None and not message.tool_calls:
            raise invalid(f"messages[{i}] has neither content nor tool_calls", f"messages[{i}].content")
    plain: dict[str, Any] = {"role": role, "content": "" if content is None else text_of(content)}
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            called(
                call.function.name,
                call.function.arguments,
                call.id,
                f"messages[{i}].tool_calls[{j}].function.arguments",
            )
            for j, call in enumerate(message.tool_calls)
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _length(message: dict[str, Any]) -> int:
    calls = message.get("tool_calls", ())
    return len(message["content"]) + sum(len(json.dumps(call, ensure_ascii=False)) for call in calls)
