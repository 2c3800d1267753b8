"""Responses that are kept: bounds, whose they are, what gives way; and what requests make of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api_support import CALL, HEAD, LEAST, SCHEMA, timings
from millis.server.api.endpoints import parse, writer
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation, Limits
from millis.server.stored import OVERHEAD_BYTES, Kept, Past, Stored

TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}


def kept(name: str, size: int = 0, previous: str | None = None) -> Kept:
    return Kept(name, b'{"output":[]}', b"[]" + b" " * size, previous, (f"item of {name}",))


def there(stored: Stored, tenant: str, *names: str) -> list[bool]:
    return [stored.get(tenant, name) is not None for name in names]


def test_the_one_not_used_for_longest_gives_way() -> None:
    stored = Stored(3, 1 << 20)
    for name in "abc":
        stored.keep("k", kept(name))
    stored.chain("k", "a")
    stored.keep("k", kept("d"))
    assert there(stored, "k", *"abcd") == [True, False, True, True]
    assert stored.holder("k", "item of b") is None and stored.holder("k", "item of a") == stored.get("k", "a")


def test_the_key_that_has_most_gives_way() -> None:
    stored = Stored(100, 10 * OVERHEAD_BYTES)
    stored.keep("small", kept("a"))
    for name in "bcdefgh":
        stored.keep("big", kept(name, OVERHEAD_BYTES))
    assert there(stored, "small", "a") == [True]
    assert there(stored, "big", *"bcdefgh") == [False] * 3 + [True] * 4
    stored.keep("small", kept("huge", 11 * OVERHEAD_BYTES))
    assert there(stored, "small", "a", "huge") == [False, False]
    assert stored.size("big") == sum(one.size for name in "efgh" if (one := stored.get("big", name)) is not None)


def test_a_chain_is_whole_or_names_what_it_lacks() -> None:
    stored = Stored(9, 1 << 20)
    stored.keep("k", kept("a"))
    stored.keep("k", kept("b", previous="a"))
    stored.keep("k", kept("c", previous="b"))
    assert [one.id for one in stored.chain("k", "c")] == ["a", "b", "c"]
    assert stored.remove("k", "b") and not stored.remove("k", "b") and not stored.remove("other", "a")
    with pytest.raises(KeyError, match="b"):
        stored.chain("k", "c")


def answered(past: Past | None, text: str, **fields: Any) -> tuple[dict[str, Any], Conversation]:
    """The response to a request whose model writes `text`, and the conversation that the model reads."""
    body = json.dumps({**LEAST["responses"], **fields}).encode()
    job = parse("responses", body, Limits(), past)
    made = writer(job, HEAD)
    for letter in text:
        made.feed(0, letter)
    made.finish(0, "stop", timings())
    (prompt,) = job.prompts
    assert isinstance(prompt, Conversation)
    return made.body(), prompt


def test_a_conversation_goes_on() -> None:
    past = Past(Stored(9, 1 << 20), "k")
    first, _ = answered(past, CALL, store=True, tools=[TOOL], instructions="Be brief.", input="Weather?")
    assert first["store"] is True and first["previous_response_id"] is None
    (call,) = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "cold"}
    _, read = answered(past, "Cold.", store=False, tools=[TOOL], previous_response_id=first["id"], input=[result])
    user, assistant, tool = read.messages  # the instructions are those of the request, and it has none
    assert user == {"role": "user", "content": "Weather?"}
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert tool == {"role": "tool", "content": "cold", "tool_call_id": call["call_id"]}
    asked = {"role": "user", "content": "Weather?"}
    for reference in ({"type": "item_reference", "id": call["id"]}, {"id": call["id"]}):
        _, referred = answered(past, "", tools=[TOOL], input=[asked, reference, result])
        assert referred.messages == read.messages
    assert [item["type"] for item in past.conversation(first["id"])] == ["message", "function_call"]


@pytest.mark.parametrize("fields", [{}, {"store": False}, {"store": None}])
def test_nothing_is_kept_unless_asked_for(fields: dict[str, Any]) -> None:
    stored = Stored(9, 1 << 20)
    made, _ = answered(Past(stored, "k"), "Hi", **fields)
    assert made["store"] is False and stored.size("k") == 0


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"previous_response_id": "resp_x"}, "previous_response_not_found", "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "item_not_found", "input[0].id"),
        ({"input": [{"id": "msg_x"}] * 2049}, "invalid_value", "input"),
        ({"input": [{"type": "item_reference"}]}, "missing_required_parameter", "input[0].id"),
        ({"store": "yes"}, "invalid_type", "store"),
        ({"previous_response_id": 3}, "invalid_type", "previous_response_id"),
        ({"conversation": "conv_x"}, "unsupported_parameter", "conversation"),
    ],
)
def test_what_is_not_there_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    stored = Stored(9, 1 << 20)
    answered(Past(stored, "other"), "Hi", store=True)
    with pytest.raises(ApiError) as caught:
        answered(Past(stored, "k"), "", **fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"store": True}, "store"), ({"previous_response_id": "r"}, "previous_response_id"),
     ({"input": [{"type": "item_reference", "id": "m"}]}, "input[0]")],
)  # fmt: skip
def test_a_server_that_keeps_nothing_says_so(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError, match="--max-stored") as caught:
        answered(None, "", **fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
