"""Tools, through clients that others wrote, against a real server and a real model. One server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, SecretStr

from serving import QUICK, Server

SAY = [{"role": "user", "content": "What is the capital of France?"}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2"), *QUICK) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as made:
        yield made


@pytest.fixture
def langchain(client: openai.OpenAI) -> ChatOpenAI:
    return ChatOpenAI(
        model="m",
        base_url=str(client.base_url),
        api_key=SecretStr("none"),
        temperature=0,
        max_completion_tokens=64,
        http_client=client._client,  # closed by the fixture
    )


def test_openai_tools(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "temperature": 0, "tools": [WEATHER], "max_tokens": 64}
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
    answer = client.chat.completions.create(**asked, messages=messages, tool_choice="required").choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    call = answer.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 24 degrees"}]
    after = client.chat.completions.create(**asked, messages=messages, tool_choice="none").choices[0]
    assert after.message.content and not after.message.tool_calls


def test_openai_tools_streamed(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model="m", messages=SAY, temperature=0, tools=[WEATHER], tool_choice=named, max_tokens=64
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        last = stream.get_final_completion()
    assert [event.name for event in done] == ["weather"]
    assert last.choices[0].message.tool_calls is not None
    assert json.loads(last.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_openai_allowed_tools(client: openai.OpenAI) -> None:
    named = [WEATHER, {"type": "function", "function": {"name": "stop"}}]
    messages: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
    asked: dict[str, Any] = {"model": "m", "temperature": 0, "parallel_tool_calls": False}
    only: Any = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": only}
    answer = client.chat.completions.create(
        **asked, messages=messages, tools=named, tool_choice=choice, max_tokens=64
    ).choices[0]  # fmt: skip
    assert [call.function.name for call in answer.message.tool_calls or ()] == ["stop"]  # type: ignore[union-attr]
    flat: Any = [{"type": "function", **tool["function"]} for tool in named]  # type: ignore[dict-item]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stop"}]}
    response = client.responses.create(
        **asked, input=messages, tools=flat, tool_choice=choice, max_output_tokens=64
    )  # fmt: skip
    assert [item.name for item in response.output if item.type == "function_call"] == ["stop"]
    assert response.tool_choice.type == "allowed_tools"  # type: ignore[union-attr]


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str
    capital: bool


@tool
def weather(city: str) -> str:
    """The weather of a city now."""
    return f"sunny in {city}"


def test_langchain_tools(langchain: ChatOpenAI) -> None:
    question = HumanMessage("How is the weather in Rome?")
    called = langchain.bind_tools([weather], tool_choice="weather").invoke([question])
    assert [call["name"] for call in called.tool_calls] == ["weather"]
    result = weather.invoke(called.tool_calls[0])
    assert isinstance(result, ToolMessage)
    assert langchain.invoke([question, called, result]).text


def test_langchain_structured_output(langchain: ChatOpenAI) -> None:
    structured = langchain.with_structured_output(Place, method="function_calling")
    assert isinstance(structured.invoke("What is the capital of France?"), Place)


def test_anthropic_tools(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.facts["url"], api_key="none") as client:
        forced: Any = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
        called = client.messages.create(
            model="m",
            max_tokens=64,
            messages=SAY,
            tools=[forced],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            extra_body={"temperature": 0},
        )
        uses = [block for block in called.content if block.type == "tool_use"]
        assert uses and uses[0].input["city"] in ("Paris", "Rome") and called.stop_reason == "tool_use"
