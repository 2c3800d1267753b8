"""/v1/chat/completions without a server: bodies to jobs, and answers as OpenAI's own client reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api_support import CALL, HEAD, SCHEMA, USER, WEATHER, job, openai_events, refused, timings
from millis.server.api.chat import ChatWriter
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation, ToolChoice
from millis.types import Grammar, TokenLogprob


def answer(writer: ChatWriter) -> ChatCompletion:
    return ChatCompletion.model_validate(json.loads(json.dumps(writer.body(), allow_nan=False)))


def chunks(data: bytes) -> list[ChatCompletionChunk]:
    found = [ChatCompletionChunk.model_validate(event) for event in openai_events(data)]
    assert {(c.id, c.created, c.model) for c in found} == {("chatcmpl-0123", 1_700_000_000, "smollm2")}
    return found


def test_a_plain_body_becomes_a_job() -> None:
    found = job("chat")
    assert found.prompts == (Conversation(({"role": "user", "content": "Hi"},)),)
    assert found.params.temperature == 1.0
    assert found.open_ended
    assert (found.n, found.stream, found.deadline_ms, found.priority) == (1, False, None, "standard")
    assert found.on_deadline == "partial"


def test_every_parameter_arrives() -> None:
    found = job(
        "chat", max_completion_tokens=5, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=1, frequency_penalty=-1, logit_bias={"7": -100}, seed=-1, stop=["a", "b"],
        logprobs=True, top_logprobs=2, n=2, stream=True, stream_options={"include_usage": True}, deadline_ms=250,
        on_deadline="fallback", fallback="later", priority="interactive",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"b": 1, "a": 2}}},
    )  # fmt: skip
    p = found.params
    assert (p.max_tokens, p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) == (5, 0.5, 0.9, 3, 0.1, 1.1)
    assert job("chat", top_k=-1).params.top_k == 0  # vLLM's word for it
    assert (p.presence_penalty, p.frequency_penalty, p.logit_bias, p.seed) == (1, -1, {7: -100.0}, 2**64 - 1)
    assert (p.stop, p.ignore_eos, p.logprobs) == (("a", "b"), False, 2)
    assert job("chat", ignore_eos=True).params.ignore_eos
    assert p.grammar == Grammar("json_schema", '{"b":1,"a":2}')
    assert not found.open_ended
    assert (found.n, found.stream, found.include_usage, found.deadline_ms) == (2, True, True, 250)
    assert (found.on_deadline, found.fallback, found.priority) == ("fallback", "later", "interactive")


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"json": {"type": "string"}}, Grammar("json_schema", '{"type":"string"}')),
        ({"json_object": True}, Grammar("json_object", "")),
        ({"regex": "[ab]+"}, Grammar("regex", "[ab]+")),
        ({"choice": ["ja", "nein"]}, Grammar("choice", '["ja", "nein"]')),
        ({"grammar": 'start: "x"'}, Grammar("lark", 'start: "x"')),
    ],
)
def test_an_answer_may_be_given_a_form(given: dict[str, Any], grammar: Grammar) -> None:
    assert job("chat", structured_outputs=given).params.grammar == grammar
    assert refused("chat", structured_outputs={**given, "regex": "x", "choice": ["x"]}).param == "structured_outputs"


def test_messages_reach_the_template_as_it_reads_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    found = job(
        "chat",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Weather?", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "content": "cold", "tool_call_id": "c1"},
        ],
        tools=[WEATHER],
    )
    (conversation,) = found.prompts
    assert isinstance(conversation, Conversation)
    system, user, assistant, tool = conversation.messages
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "Weather?", "name": "ann"}
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert tool == {"role": "tool", "content": "cold", "tool_call_id": "c1"}
    assert conversation.tools == (WEATHER,)
    assert found.tool_choice == ToolChoice("auto")


@pytest.mark.parametrize(
    "said", [{"content": None, "refusal": "I won't."}, {"content": [{"type": "refusal", "refusal": "I won't."}]}]
)
def test_a_refusal_of_an_earlier_model_is_what_it_said(said: dict[str, Any]) -> None:
    (conversation,) = job("chat", messages=[USER, {"role": "assistant", **said}, USER]).prompts
    assert isinstance(conversation, Conversation)
    assert conversation.messages[1] == {"role": "assistant", "content": "I won't."}


def test_an_answer_is_a_chat_completion() -> None:
    writer = ChatWriter(job("chat", logprobs=True, top_logprobs=1), HEAD)
    assert writer.begin() == b""
    assert writer.feed(0, "H", [TokenLogprob(72, -0.5, ((72, -0.5),))]) == b""
    writer.feed(0, "i", [TokenLogprob(0xE4, float("-inf"))])
    assert writer.finish(0, "stop", timings()) == writer.end() == b""
    found = answer(writer)
    (choice,) = found.choices
    assert (found.id, found.system_fingerprint) == ("chatcmpl-0123", "fp")
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("Hi", "stop", None)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes, first.top_logprobs[0].token) == ("H", -0.5, [72], "H")
    assert (second.token, second.logprob, second.bytes) == ("\N{REPLACEMENT CHARACTER}", -9999.0, [0xE4])
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (7, 2, 9)
    assert found.usage.prompt_tokens_details.cached_tokens == 3
    shown = writer.body()["timings"]
    assert (shown["queue_ms"], shown["total_ms"], shown["steps"]) == (1.235, 9, 2)
    assert "deadline_ms" not in shown


def test_a_stream_is_chunks() -> None:
    writer = ChatWriter(job("chat", stream=True, stream_options={"include_usage": True}), HEAD)
    data = writer.begin() + writer.feed(0, "H") + writer.feed(0, "") + writer.feed(0, "i")
    data += writer.finish(0, "length", timings()) + writer.end()
    found = chunks(data)
    assert [c.choices[0].delta.content for c in found[:-1]] == ["", "H", "i", None]
    assert [c.choices[0].finish_reason for c in found[:-1]] == [None, None, None, "length"]
    assert found[0].choices[0].delta.role == "assistant"
    assert found[-1].choices == [] and found[-1].usage is not None and found[-1].usage.total_tokens == 9
    assert all(event["usage"] is None for event in openai_events(data)[:-1])
    assert [event.get("timings", {}).get("total_ms") for event in openai_events(data)[-2:]] == [9, 9]


def test_without_usage_asked_for_there_is_none_in_a_stream() -> None:
    writer = ChatWriter(job("chat", stream=True, stream_options={"include_usage": False}), HEAD)
    data = writer.begin() + writer.feed(0, "Hi") + writer.finish(0, "stop", timings()) + writer.end()
    assert all("usage" not in event for event in openai_events(data))
    assert openai_events(data)[-1]["timings"]["total_ms"] == 9


@pytest.mark.parametrize("asked", [{}, {"logprobs": True}])
def test_the_clients_own_accumulator_joins_a_stream_to_the_same_answer(asked: dict[str, Any]) -> None:
    """Two choices, one with text and two calls, fed letter by letter."""
    fields = {"n": 2, "tools": [WEATHER], **asked}
    whole = ChatWriter(job("chat", **fields), HEAD)
    stream = ChatWriter(job("chat", stream=True, stream_options={"include_usage": True}, **fields), HEAD)
    data = stream.begin()
    for letter in f"Let me see.\n{CALL}\n{CALL}":
        logprobs = [TokenLogprob(ord(letter), -1.0)] if asked else []
        whole.feed(0, letter, logprobs)
        data += stream.feed(0, letter, logprobs)
    whole.feed(1, "No.")
    data += stream.feed(1, "No.")
    for index in (1, 0):
        whole.finish(index, "stop", timings())
        data += stream.finish(index, "stop", timings())
    data += stream.end()
    state = ChatCompletionStreamState(input_tools=[WEATHER])  # type: ignore[list-item]
    for chunk in chunks(data):
        state.handle_chunk(chunk)
    joined = state.get_final_completion()
    expected = answer(whole)
    assert [c.finish_reason for c in joined.choices] == ["tool_calls", "stop"]
    for one, other in zip(joined.choices, expected.choices, strict=True):
        assert one.message.content == other.message.content
        ours = [(c.id, c.function.name, c.function.arguments) for c in other.message.tool_calls or []]  # type: ignore[union-attr]
        assert [(c.id, c.function.name, c.function.arguments) for c in one.message.tool_calls or []] == ours
        if asked and other.logprobs is not None and other.logprobs.content:
            assert one.logprobs is not None and one.logprobs.content is not None
            assert len(one.logprobs.content) == len(other.logprobs.content)
    assert expected.choices[0].message.content == "Let me see."
    assert joined.usage == expected.usage
    assert joined.usage is not None and joined.usage.prompt_tokens == 7 and joined.usage.completion_tokens == 4


def test_a_call_alone_has_no_content() -> None:
    writer = ChatWriter(job("chat", tools=[WEATHER]), HEAD)
    writer.feed(0, CALL)
    writer.finish(0, "stop", timings())
    message = answer(writer).choices[0].message
    assert message.content is None
    assert message.tool_calls is not None and json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}  # type: ignore[union-attr]


def test_with_tool_choice_none_what_looks_like_a_call_is_text() -> None:
    found = job("chat", tools=[WEATHER], tool_choice="none")
    assert found.prompts == (Conversation(({"role": "user", "content": "Hi"},)),)
    writer = ChatWriter(found, HEAD)
    writer.feed(0, CALL)
    writer.finish(0, "stop", timings())
    assert answer(writer).choices[0].message.content == CALL


def test_calls_are_forced_by_a_grammar() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    free = job("chat", tools=[WEATHER, other]).params.grammar
    assert free is None
    either = job("chat", tools=[WEATHER, other], tool_choice="required").params.grammar
    assert either is not None and either.kind == "lark" and "weather" in either.source and "other" in either.source
    named = {"type": "function", "function": {"name": "weather"}}
    one = job("chat", tools=[WEATHER, other], tool_choice=named).params.grammar
    assert one is not None and "weather" in one.source and "other" not in one.source
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    assert job("chat", tools=[strict]).params.grammar is not None


def test_the_fallback_takes_the_place_of_what_came_late() -> None:
    fields = {"on_deadline": "fallback", "fallback": "Please hold.", "deadline_ms": 100}
    writer = ChatWriter(job("chat", **fields), HEAD)
    writer.feed(0, "Half an ans")
    writer.finish(0, "deadline", timings())
    (choice,) = writer.body()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Please hold.", "deadline")
    kept = ChatWriter(job("chat", **fields), HEAD)
    kept.feed(0, "Whole.")
    kept.finish(0, "stop", timings())
    assert kept.body()["choices"][0]["message"]["content"] == "Whole."


def test_in_a_stream_the_fallback_comes_only_where_nothing_was_sent() -> None:
    fields = {"on_deadline": "fallback", "fallback": "Please hold.", "deadline_ms": 100, "stream": True}
    silent, begun = ChatWriter(job("chat", **fields), HEAD), ChatWriter(job("chat", **fields), HEAD)
    begun.feed(0, "A sentence.")
    texts = []
    for writer in (silent, begun):
        found = openai_events(writer.finish(0, "deadline", timings()) + writer.end())
        texts.append([event["choices"][0]["delta"].get("content") for event in found])
        assert found[-1]["choices"][0]["finish_reason"] == "deadline"
    assert texts == [["Please hold.", None], [None]]


def test_an_error_may_be_asked_for_instead_of_a_late_answer() -> None:
    writer = ChatWriter(job("chat", on_deadline="error", stream=True), HEAD)
    writer.feed(0, "Half")
    with pytest.raises(ApiError) as caught:
        writer.finish(0, "deadline", timings())
    assert (caught.value.status, caught.value.code) == (503, "deadline_exceeded")
    assert caught.value.headers["x-should-retry"] == "false"
    (event,) = openai_events(writer.error(caught.value))
    assert event["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"chat_template_kwargs": {"a": ["b"]}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a": "b" * 1025}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {str(i): i for i in range(17)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a" * 65: 1}}, "chat_template_kwargs." + "a" * 64),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
         "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"x": "y" * 70000}}}},
         "response_format.json_schema.schema"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": True}, "deadline_ms"),
        ({"on_deadline": "panic"}, "on_deadline"),
        ({"on_deadline": "fallback"}, "fallback"),
        ({"fallback": "x"}, "fallback"),
        ({"priority": "first"}, "priority"), ({"priority": True}, "priority"), ({"priority": 0.5}, "priority"),
        ({"seed": 2**63}, "seed"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refused("chat", **fields)
    assert error.param == param
    assert error.code in ("invalid_value", "invalid_type", "missing_required_parameter", "unknown_parameter",
                          "unsupported_parameter")  # fmt: skip


def test_clients_may_send_what_changes_nothing() -> None:
    found = job(
        "chat", user="u", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
        safety_identifier="s", prompt_cache_key="k", modalities=["text"], audio=None, functions=None, tools=None,
        response_format={"type": "text"}, logprobs=False, stream=False, prediction=None, verbosity="medium",
        min_tokens=0, stop_token_ids=[], skip_special_tokens=True, add_generation_prompt=True, best_of=1, echo=False,
        include_stop_str_in_output=False, use_beam_search=False, length_penalty=1, continue_final_message=False,
        bad_words=[], return_token_ids=False, spaces_between_special_tokens=True, chat_template_kwargs={},
        truncate_prompt_tokens=None, allowed_token_ids=None, logits_processors=[], documents=[],
        add_special_tokens=False, include_reasoning=True, return_tokens_as_token_ids=False, cache_salt=None,
        vllm_xargs={}, kv_transfer_params=None, mm_processor_kwargs={}, cache_prompt=True, chat_template=None,
    )  # fmt: skip
    assert found == job("chat")
    said = {"role": "assistant", "content": "Hi"}
    sent = {**said, "reasoning": None, "reasoning_content": None, "refusal": None, "tool_calls": []}
    assert job("chat", messages=[USER, sent, USER]) == job("chat", messages=[USER, said, USER])
    assert job("chat", top_logprobs=0, logprobs=False) == job("chat")
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": False}
    assert job("chat", stream=True, stream_options=options).include_usage


def test_what_openais_client_parsed_may_be_sent_back() -> None:
    """As `chat.completions.parse` and `stream` give it: beside each text, what the client made of it."""
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    call = {"id": "c1", "type": "function", "function": {**function, "parsed_arguments": {"city": "Oslo"}}}
    said = {"role": "assistant", "content": '{"a": 1}', "refusal": None, "annotations": None, "audio": None,
            "function_call": None, "tool_calls": [call], "parsed": {"a": 1}}  # fmt: skip
    plain = {"role": "assistant", "content": '{"a": 1}', "tool_calls": [{**call, "function": function}]}
    assert job("chat", messages=[USER, said, USER]) == job("chat", messages=[USER, plain, USER])


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 1}, {"min_tokens": False}, {"stop_token_ids": [1]}, {"skip_special_tokens": False},
        {"skip_special_tokens": 1}, {"add_generation_prompt": False}, {"best_of": 2}, {"echo": True}, {"echo": 0},
        {"include_stop_str_in_output": True}, {"use_beam_search": True}, {"length_penalty": 0.9},
        {"length_penalty": True}, {"continue_final_message": True}, {"bad_words": ["fool"]}, {"bad_words": ""},
        {"return_token_ids": True}, {"spaces_between_special_tokens": False}, {"truncate_prompt_tokens": 8},
        {"allowed_token_ids": [1]}, {"logits_processors": ["x"]}, {"documents": [{"text": "a"}]},
        {"add_special_tokens": True}, {"include_reasoning": False}, {"cache_prompt": False}, {"store": True},
        {"service_tier": "priority"}, {"verbosity": "low"}, {"modalities": ["text", "audio"]},
    ],
)  # fmt: skip
def test_what_would_change_something_is_refused_by_name(fields: dict[str, Any]) -> None:
    error = refused("chat", **fields)
    assert (error.code, error.param) == ("unsupported_parameter", next(iter(fields)))
    error = refused("chat", messages=[USER, {"role": "assistant", "content": "Hi", "reasoning_content": "Hm."}])
    assert error.param == "messages[1].reasoning_content"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_sixty_four_stop_texts_can_be_used(endpoint: Any) -> None:
    texts = [str(i) for i in range(64)]
    assert job(endpoint, stop=texts).params.stop == tuple(texts)
    assert refused(endpoint, stop=[*texts, "one more"]).param == "stop"


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    schema = {"type": "object", "properties": {"z": SCHEMA, "a": SCHEMA}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    grammar = job("chat", response_format=form).params.grammar
    assert grammar is not None and list(json.loads(grammar.source)["properties"]) == ["z", "a"]
    assert '"required":["city"],"additionalProperties":false},"a":' in grammar.source  # strict closes objects
    assert json.loads(grammar.source)["additionalProperties"] is False
    form["json_schema"] = {"name": "x", "schema": schema}
    grammar = job("chat", response_format=form).params.grammar
    assert grammar is not None and json.loads(grammar.source) == schema
