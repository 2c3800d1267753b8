"""/v1/messages without a server: Anthropic's blocks to messages, and events as its own client joins them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from api_support import CALL, HEAD, SCHEMA, USER, events, job, refused, timings
from millis.server.api.endpoints import writer
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation, ToolChoice
from millis.server.api.writer import Writer
from millis.types import FinishReason, Grammar

TOOL = {"name": "weather", "description": "d", "input_schema": SCHEMA}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def run(made: Writer, text: str, reason: FinishReason = "stop", stop: str | None = None) -> bytes:
    data = made.begin(7)
    for letter in text:
        data += made.feed(0, letter)
    return data + made.finish(0, reason, timings(), stop) + made.end()


def test_a_body_becomes_a_job() -> None:
    found = job(
        "messages", system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        stop_sequences=["END"], temperature=0, top_k=5, metadata={"user_id": "u"}, thinking={"type": "disabled"},
        deadline_ms=100, tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )  # fmt: skip
    (conversation,) = found.prompts
    assert isinstance(conversation, Conversation)
    assert conversation.messages == ({"role": "system", "content": "Be brief."}, USER)
    assert conversation.tools[0]["function"] == {"name": "weather", "description": "d", "parameters": SCHEMA}
    p = found.params
    assert (p.max_tokens, p.stop, p.temperature, p.top_k, found.deadline_ms) == (5, ("END",), 0, 5, 100)
    assert found.tool_choice == ToolChoice("required", None, False)
    assert p.grammar is not None and p.grammar.kind == "lark"


def test_blocks_become_messages() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "no such"}],
             "is_error": True},
            {"type": "text", "text": "Go on."}]},
    ]  # fmt: skip
    (conversation,) = job("messages", messages=turns).prompts
    assert isinstance(conversation, Conversation)
    user, assistant, tool, more = conversation.messages
    assert user == {"role": "user", "content": "Weather?"}
    assert assistant["content"] == "Let me see."
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert tool == {"role": "tool", "content": "Error: no such", "tool_call_id": "t1"}
    assert more == {"role": "user", "content": "Go on."}


def test_what_is_counted_is_what_would_be_read() -> None:
    asked = {"system": "Be brief.", "tools": [TOOL], "tool_choice": {"type": "any"}, "thinking": {"type": "disabled"}}
    counted = job("count_tokens", **asked)
    assert counted.prompts == job("messages", **asked).prompts and counted.kind == "tokenize"
    none = {**asked, "tool_choice": {"type": "none"}}
    assert job("count_tokens", **none).prompts == job("messages", **none).prompts != counted.prompts
    for name, value in (("max_tokens", 5), ("temperature", 0), ("stream", True), ("deadline_ms", 5)):
        error = refused("count_tokens", **{name: value})
        assert (error.code, error.param) == ("unknown_parameter", name)
    assert refused("count_tokens", thinking={"type": "enabled"}).param == "thinking"


def test_sixty_four_stop_sequences_can_be_used() -> None:
    assert len(job("messages", stop_sequences=[str(i) for i in range(64)]).params.stop) == 64


def test_an_output_format_is_a_grammar() -> None:
    found = job("messages", output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert found.params.grammar is not None and found.params.grammar.kind == "json_schema"
    assert json.loads(found.params.grammar.source) == SCHEMA
    assert isinstance(found.params.grammar, Grammar)


def test_an_answer_is_a_message() -> None:
    made = writer(job("messages", tools=[TOOL]), HEAD)
    run(made, f"Let me see.\n{CALL}")
    found = Message.model_validate(made.body())
    text, call = found.content
    assert text.type == "text" and text.text == "Let me see."
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Oslo"})
    assert (found.stop_reason, found.stop_sequence) == ("tool_use", None)
    usage = found.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 3, 2)
    assert made.body()["timings"]["total_ms"] == 9


@pytest.mark.parametrize("text", ["Hi", "", CALL, f"See:\n{CALL}\n{CALL} Done."])
def test_the_clients_own_accumulator_joins_a_stream_to_the_same_message(text: str) -> None:
    data = run(writer(job("messages", stream=True, tools=[TOOL]), HEAD), text)
    found = events(data)
    assert (found[0]["type"], found[-2]["type"], found[-1]["type"]) == (
        "message_start",
        "message_delta",
        "message_stop",
    )
    assert found[0]["message"]["usage"]["input_tokens"] == 7
    assert found[-1]["timings"]["total_ms"] == 9
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in found:
        snapshot = accumulate_event(event=EVENT.validate_python(event), current_snapshot=snapshot, json_bufs=buffers)
    whole = writer(job("messages", tools=[TOOL]), HEAD)
    run(whole, text)
    expected = Message.model_validate(whole.body())
    assert [block.to_dict() for block in snapshot.content] == [block.to_dict() for block in expected.content]
    assert (snapshot.stop_reason, snapshot.id) == (expected.stop_reason, expected.id)
    assert snapshot.usage.to_dict() == expected.usage.to_dict()
    starts = [event["index"] for event in found if event["type"] == "content_block_start"]
    stops = [event["index"] for event in found if event["type"] == "content_block_stop"]
    assert starts == stops == list(range(len(expected.content)))


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("deadline", None, ("deadline", None)),
    ],
)
def test_why_it_stopped(reason: FinishReason, stop: str | None, expected: tuple[str, str | None]) -> None:
    made = writer(job("messages"), HEAD)
    run(made, "Hi", reason, stop)
    assert (made.body()["stop_reason"], made.body()["stop_sequence"]) == expected


def test_an_error_in_a_stream_is_an_event_of_anthropics_shape() -> None:
    made = writer(job("messages", stream=True), HEAD)
    (event,) = events(made.error(ApiError(503, "busy", code="overloaded")))
    assert event == {"type": "error", "error": {"type": "overloaded_error", "message": "busy", "code": "overloaded"}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "unsupported_parameter", "thinking"),
        ({"container": "c"}, "unsupported_parameter", "container"),
        ({"mcp_servers": []}, "unsupported_parameter", "mcp_servers"),
        ({"thread": {"type": "create"}}, "unsupported_parameter", "thread"),
        ({"max_tokens": None}, "invalid_type", "max_tokens"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "invalid_value",
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": []}, USER]}, "invalid_value", "messages[0].content"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "invalid_value", "tools[0].type"),
        ({"temperature": 1.5}, "invalid_value", "temperature"),
        ({"stop_sequences": [str(i) for i in range(65)]}, "invalid_value", "stop_sequences"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "invalid_value", "tool_choice"),
        ({"n": 2}, "unknown_parameter", "n"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    error = refused("messages", **fields)
    assert (error.code, error.param) == (code, param)
    assert error.anthropic_body()["error"]["type"] == "invalid_request_error"


def test_a_thread_is_refused_so_that_tool_runners_go_on_without_it() -> None:
    """Anthropic's tool runners ask for one with every first request; this answer has them send all messages instead."""
    error = refused("messages", thread={"type": "create"}).anthropic_body()["error"]
    assert error["details"] == {"error_code": "thread_unsupported_request"}
    assert "details" not in refused("messages", container="c").anthropic_body()["error"]


def test_a_tool_may_ask_for_its_input_as_it_is_written() -> None:
    """As the AI SDK does of every tool in a stream; a call comes when it is whole all the same."""
    (tool,) = job("messages", stream=True, tools=[{**TOOL, "eager_input_streaming": True}]).tools
    assert tool.name == TOOL["name"]
