"""/v1/responses without a server: items to messages, and events as OpenAI's own client joins them."""

from __future__ import annotations

from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from api_support import CALL, HEAD, SCHEMA, events, job, refused, timings
from millis.server.api.endpoints import writer
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation
from millis.server.api.writer import Writer
from millis.types import FinishReason, Grammar, TokenLogprob

TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def run(made: Writer, text: str, reason: FinishReason = "stop") -> bytes:
    """A stream, fed letter by letter."""
    data = made.begin()
    for letter in text:
        data += made.feed(0, letter)
    return data + made.finish(0, reason, timings()) + made.end()


def kinds(data: bytes) -> list[str]:
    found = [event["type"].removeprefix("response.") for event in events(data)]
    return [kind for i, kind in enumerate(found) if i == 0 or found[i - 1] != kind]


def test_a_text_and_instructions_become_messages() -> None:
    found = job("responses", instructions="Be brief.", max_output_tokens=9, text={"format": {"type": "json_object"}})
    assert found.prompts == (
        Conversation(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})),
    )
    assert (found.params.max_tokens, found.open_ended) == (9, False)
    assert found.params.grammar == Grammar("json_object", "")


def test_items_become_messages() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}', "id": "f"},
        {"type": "function_call_output", "call_id": "c1", "output": "cold"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't."}]},
    ]  # fmt: skip
    (conversation,) = job("responses", input=items, tools=[TOOL]).prompts
    assert isinstance(conversation, Conversation)
    user, assistant, tool, refusal = conversation.messages
    assert user == {"role": "user", "content": "Weather?"}
    assert assistant["content"] == "Let me see."
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert tool == {"role": "tool", "content": "cold", "tool_call_id": "c1"}
    assert refusal == {"role": "assistant", "content": "I won't."}
    assert conversation.tools == ({"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},)


def test_what_openais_client_parsed_may_be_sent_back() -> None:
    """As `model_dump` writes the items of `responses.parse`: what the client made of them, and all that is null."""
    text = {"type": "output_text", "text": '{"a": 1}', "annotations": [], "logprobs": []}
    said = {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [text]}
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}", "id": "f", "status": None}
    more = {"parsed_arguments": {}, "caller": None, "namespace": None, "async_": None}
    asked = {"role": "user", "content": "Hi"}
    sent = [asked, {**said, "content": [{**text, "parsed": {"a": 1}}], "phase": None}, {**call, **more}, asked]
    assert job("responses", input=sent) == job("responses", input=[asked, said, call, asked])
    assert job("responses", top_logprobs=0).params.logprobs is None


def test_an_answer_is_a_response() -> None:
    made = writer(job("responses", metadata={"a": "b"}, include=["message.output_text.logprobs"]), HEAD)
    made.feed(0, "Hi", [TokenLogprob(72, -0.5)])
    made.finish(0, "stop", timings())
    found = Response.model_validate(made.body())
    assert (found.output_text, found.status, found.error, found.metadata) == ("Hi", "completed", None, {"a": "b"})
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (7, 2, 9)
    assert found.usage.input_tokens_details.cached_tokens == 3
    (message,) = found.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None and logprobs[0].token == "H"
    assert made.body()["timings"]["total_ms"] == 9


def test_a_stream_of_text() -> None:
    data = run(writer(job("responses", stream=True), HEAD), "Hi")
    assert kinds(data) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events(data)] == list(range(len(events(data))))
    assert events(data)[-1]["response"]["timings"]["total_ms"] == 9


@pytest.mark.parametrize("text", ["Hi", "", CALL, f"See:\n{CALL}\n{CALL} Done."])
def test_the_clients_own_accumulator_joins_a_stream_to_the_same_response(text: str) -> None:
    fields: dict[str, Any] = {"tools": [TOOL]}
    data = run(writer(job("responses", stream=True, **fields), HEAD), text)
    whole = writer(job("responses", **fields), HEAD)
    run(whole, text)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events(data):
        state.handle_event(EVENT.validate_python(event))
    joined = state._completed_response
    assert joined is not None
    expected = Response.model_validate(whole.body())
    assert joined.output_text == expected.output_text
    assert [item.type for item in joined.output] == [item.type for item in expected.output]
    done = [event["item"] for event in events(data) if event["type"] == "response.output_item.done"]
    assert done == whole.body()["output"]
    deltas: dict[int, str] = {}
    for event in events(data):
        if event["type"].endswith(".delta"):
            deltas[event["output_index"]] = deltas.get(event["output_index"], "") + event["delta"]
    texts = [item["arguments"] if "arguments" in item else item["content"][0]["text"] for item in done]
    assert [deltas.get(i, "") for i in range(len(texts))] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_has_the_log_probabilities_of_its_own_tokens(stream: bool) -> None:
    text = f"See:\n{CALL}\n{CALL} Done."
    made = writer(job("responses", stream=stream, tools=[TOOL], include=["message.output_text.logprobs"]), HEAD)
    data = made.begin()
    for byte in text.encode():
        data += made.feed(0, chr(byte), [TokenLogprob(byte, -0.5)])
    data += made.finish(0, "stop", timings()) + made.end()
    output = made.body()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call", "message"]
    for i in (0, 3):
        part = output[i]["content"][0]
        assert "".join(one["token"] for one in part["logprobs"]).strip() == part["text"].strip() != ""
        told = [event for event in events(data) if event.get("output_index") == i and "logprobs" in event]
        joined = [one for event in told if event["type"].endswith(".delta") for one in event["logprobs"]]
        assert not stream or joined == told[-1]["logprobs"] == part["logprobs"]


def test_an_answer_that_is_a_call_has_no_text() -> None:
    made = writer(job("responses", tools=[TOOL], include=["message.output_text.logprobs"]), HEAD)
    for byte in CALL.encode():
        made.feed(0, chr(byte), [TokenLogprob(byte, -0.5)])
    made.finish(0, "stop", timings())
    assert [item["type"] for item in made.body()["output"]] == ["function_call"]


@pytest.mark.parametrize(("reason", "why"), [("length", "max_output_tokens"), ("deadline", "deadline")])
def test_a_response_that_was_cut_is_incomplete(reason: FinishReason, why: str) -> None:
    data = run(writer(job("responses", stream=True), HEAD), "Hi", reason)
    last = events(data)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": why}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_an_error_in_a_stream_is_an_event() -> None:
    made = writer(job("responses", stream=True), HEAD)
    made.begin()
    (event,) = events(made.error(ApiError(500, "it broke", code="internal_error")))
    assert EVENT.validate_python(event).message == "it broke"
    assert event["sequence_number"] == 2


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"previous_response_id": "r"}, "unsupported_parameter", "previous_response_id"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning"),
        ({"truncation": "oldest"}, "invalid_value", "truncation"),
        ({"include": ["file_search_call.results"]}, "unsupported_parameter", "include"),
        ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "invalid_value", "input"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text"}]}]}, "missing_required_parameter",
         "input[0].summary[0].text"),
        ({"input": [{"type": "image_generation_call"}]}, "invalid_value", "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "invalid_value",
         "input[0].content[0].type"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [3]}, "invalid_value", "input[0]"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 2, "include": ["reasoning.encrypted_content"]}, "invalid_value", "top_logprobs"),
        ({"messages": []}, "unknown_parameter", "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    error = refused("responses", **fields)
    assert (error.code, error.param) == (code, param)
