"""Tools: their wire form, the grammar that forces a call, and how a model whose template has none is told of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from millis.engine.schema import closed
from millis.server.api.body import Wire
from millis.server.api.errors import invalid
from millis.server.api.fields import compact
from millis.server.api.job import Limits, Tool, ToolChoice
from millis.types import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 8  # in one answer that must be a call; small models would go on
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_FREE = "TEXT: "  # what the grammar of an answer begins with that may be any text
# What a call begins with that lacks its tags, as tool_parser.py finds it: a name follows.
_BARE = r'\s*(```(json)?\s*)*\{\s*"name"\s*:\s*'

# As templates write calls: what is fixed need not be computed.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The words that Qwen 2.5 and Hermes models were trained on.
_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    f"{OPEN}{CLOSE} XML tags:\n{OPEN}\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    f"{CLOSE}"
)


class FunctionWire(Wire):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="true: arguments always keep to the schema, its objects closed")


class ToolWire(Wire):
    type: Literal["function"]
    function: FunctionWire


class NamedFunction(Wire):
    name: Name


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedChoice(Wire):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoiceWire = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedChoice, Field(discriminator="type")]


def check_tools(tools: Iterable[Tool], choice: ToolChoice, limits: Limits) -> tuple[Tool, ...]:
    """The tools of a request, checked against the limits, each other and the choice."""
    found = tuple(tools)
    if len(found) > limits.tools:
        raise invalid(f"tools has {len(found)} functions; {limits.tools} can be used", "tools")
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        raise invalid("tools has two functions of one name", "tools")
    for i, tool in enumerate(found):
        if len(compact(tool.parameters)) > limits.schema_chars:
            raise invalid(f"the parameters of tools[{i}] are longer than {limits.schema_chars} characters", "tools")
        if len(tool.description or "") > limits.schema_chars:
            raise invalid(f"the description of tools[{i}] is longer than {limits.schema_chars} characters", "tools")
        if tool.parameters.get("type", "object") != "object":
            raise invalid(f"the parameters of tools[{i}] must have the type object", "tools")
    if choice.mode == "required" and not found:
        raise invalid("tool_choice asks for a call, but there are no tools", "tool_choice")
    asked = {choice.name} if choice.name is not None else choice.allowed or set()
    for name in sorted(asked.difference(names)):
        raise invalid(f"tool_choice names {name!r}, which is not among tools", "tool_choice")
    length = sum(len(compact(openai_tool(tool))) for tool in found)
    if length > limits.prompt_chars:
        raise invalid(f"tools has {length} characters; {limits.prompt_chars} can be used", "tools")
    return found


def shown_tools(tools: Iterable[Tool], choice: ToolChoice) -> tuple[dict[str, Any], ...]:
    """The tools that the model is told of, as chat templates read them."""
    return tuple(openai_tool(tool) for tool in tools if choice.offers(tool))


def openai_tool(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates read it."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": tool.parameters}}


def parameters(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A function's schema; without one it takes no arguments."""
    return {"type": "object", "properties": {}, "additionalProperties": False} if schema is None else schema


def call_grammar(tools: Sequence[Tool], choice: ToolChoice, answer: Grammar | None) -> Grammar | None:
    """The grammar of an answer that must be a call, or may be one where calls or other answers must keep to a form.

    `answer` is the form of an answer that is no call. None: any text will do, and what looks like a call is one, with
    its tags or, where the answer begins, without.
    Objects in the arguments of a strict tool have the properties that are named and no others, as OpenAI has it.
    """
    allowed = [(i, tool) for i, tool in enumerate(tools) if choice.offers(tool) and choice.name in (None, tool.name)]
    if not allowed:
        return answer
    if choice.mode == "auto" and answer is None and not any(tool.strict for _, tool in allowed):
        return None
    more = MAX_CALLS - 1 if choice.parallel and choice.name is None else 0
    further = f' ("\\n{OPEN}" call){{0,{more}}}' if more else ""
    lines = [f'calls: "{OPEN}" call{further}', "call: " + " | ".join(f"tool_{i}" for i, _ in allowed)]
    for i, tool in allowed:
        begin = json.dumps(f'\n{{"name": "{tool.name}", "arguments": ')
        lines.append(f"tool_{i}: {begin} arguments_{i} {json.dumps('}' + chr(10) + CLOSE)}")
        schema = closed(tool.parameters) if tool.strict else tool.parameters
        lines.append(f"arguments_{i}: %json {compact({**schema, 'type': 'object', 'x-guidance': _SPACING})}")
    if choice.mode == "required":
        lines.insert(0, "start: calls")
    elif answer is None:
        names = "|".join(tool.name for _, tool in allowed)
        text = rf'{_FREE}/(.|\n)*/ & ~/{_BARE}"({names})"(.|\n)*/'
        start = f"start: bare{{0,{more}}} (TEXT | before call{further})" if more else "start: TEXT | before call | bare"
        lines = [text, start, f'before[suffix="{OPEN}"]: TEXT', *lines[1:]]
        lines.append("bare: (" + " | ".join(f"bare_{i}" for i, _ in allowed) + r") /\s*\}/")
        lines += [rf'bare_{i}: /{_BARE}"{tool.name}"\s*,\s*"arguments"\s*:\s*/ arguments_{i}' for i, tool in allowed]
    else:
        lines.insert(0, "start: answer | calls")
        lines.append(f"answer: %json {answer.source or compact({'type': 'object'})}")
    return Grammar("lark", "\n".join(lines) + "\n")


def free_text(grammar: Grammar | None) -> bool:
    """Whether an answer with tools may be any text, and a call in it may lack its tags."""
    return grammar is None or grammar.source.startswith(_FREE)


def rule_fields(tools: Sequence[Tool], parameters: str, answer: str) -> dict[str, str]:
    """The fields of the body that the schemas in the rules of `call_grammar` are from.

    parameters: the field of a tool's schema; answer: that of the form of an answer that is no call.
    """
    return {"answer": answer} | {f"arguments_{i}": f"tools[{i}].{parameters}" for i in range(len(tools))}


def describe_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The messages for a template that knows no tools: these in the system message, calls and results as plain text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    about = _HEAD + "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools) + _TAIL
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{about}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": about}, *plain]


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in message["tool_calls"]]
    texts = [f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}" for call in calls]
    return {"role": "assistant", "content": "\n".join([*([message["content"]] if message["content"] else []), *texts])}
