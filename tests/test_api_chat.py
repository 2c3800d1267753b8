"""/v1/chat/completions without a server: bodies to jobs, and answers as OpenAI's own client reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from millis.server.api.chat import ChatWriter, parse_chat
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation, Job, Limits
from millis.server.api.writer import Head
from millis.types import Grammar, Timings, TokenLogprob

HEAD = Head("0123", 1_700_000_000, "smollm2", "fp", token_bytes=lambda token: bytes([token]))
USER = {"role": "user", "content": "Hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIMINGS = Timings(queue_ms=1.23456, total_ms=9, prompt_tokens=7, cached_tokens=3, completion_tokens=2, steps=2)


def parse(**fields: Any) -> Job:
    return parse_chat(json.dumps({"model": "smollm2", "messages": [USER], **fields}).encode(), Limits())


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def events(data: bytes) -> list[dict[str, Any]]:
    """The JSON of a stream that ends as OpenAI's do."""
    *parts, done, nothing = data.decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def chunks(data: bytes) -> list[ChatCompletionChunk]:
    found = [ChatCompletionChunk.model_validate(event) for event in events(data)]
    assert {(c.id, c.created, c.model) for c in found} == {("chatcmpl-0123", 1_700_000_000, "smollm2")}
    return found


def test_a_plain_body_becomes_a_job() -> None:
    job = parse()
    assert job.prompts == (Conversation(({"role": "user", "content": "Hi"},)),)
    assert job.params.temperature == 1.0
    assert job.open_ended
    assert (job.n, job.stream, job.deadline_ms, job.priority, job.on_deadline) == (
        1,
        False,
        None,
        "standard",
        "partial",
    )


def test_every_parameter_arrives() -> None:
    job = parse(
        max_completion_tokens=5, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=1, frequency_penalty=-1, logit_bias={"7": -100}, seed=-1, stop=["a", "b"], ignore_eos=True,
        logprobs=True, top_logprobs=2, n=2, stream=True, stream_options={"include_usage": True}, deadline_ms=250,
        on_deadline="fallback", fallback="later", priority="interactive",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"b": 1, "a": 2}}},
    )  # fmt: skip
    p = job.params
    assert (p.max_tokens, p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) == (5, 0.5, 0.9, 3, 0.1, 1.1)
    assert (p.presence_penalty, p.frequency_penalty, p.logit_bias, p.seed) == (1, -1, {7: -100.0}, 2**64 - 1)
    assert (p.stop, p.ignore_eos, p.logprobs) == (("a", "b"), True, 2)
    assert p.grammar == Grammar("json_schema", '{"b":1,"a":2}')
    assert not job.open_ended
    assert (job.n, job.stream, job.include_usage, job.deadline_ms) == (2, True, True, 250)
    assert (job.on_deadline, job.fallback, job.priority) == ("fallback", "later", "interactive")


def test_an_answer_is_a_chat_completion() -> None:
    writer = ChatWriter(parse(logprobs=True, top_logprobs=1), HEAD)
    assert writer.begin() == b""
    assert writer.feed(0, "H", [TokenLogprob(72, -0.5, ((72, -0.5),))]) == b""
    writer.feed(0, "i", [TokenLogprob(0xE4, float("-inf"))])
    writer.finish(0, "stop", TIMINGS)
    answer = ChatCompletion.model_validate(json.loads(json.dumps(writer.body(), allow_nan=False)))
    (choice,) = answer.choices
    assert (answer.id, answer.system_fingerprint) == ("chatcmpl-0123", "fp")
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("Hi", "stop", None)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes, first.top_logprobs[0].token) == ("H", -0.5, [72], "H")
    assert (second.token, second.logprob, second.bytes) == ("\N{REPLACEMENT CHARACTER}", -9999.0, [0xE4])
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 2, 9)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    timings = writer.body()["timings"]
    assert (timings["queue_ms"], timings["total_ms"], timings["steps"]) == (1.235, 9, 2)


def test_a_stream_is_chunks() -> None:
    writer = ChatWriter(parse(stream=True, stream_options={"include_usage": True}), HEAD)
    data = writer.begin() + writer.feed(0, "H") + writer.feed(0, "") + writer.feed(0, "i")
    data += writer.finish(0, "length", TIMINGS) + writer.end()
    found = chunks(data)
    assert [c.choices[0].delta.content for c in found[:-1]] == ["", "H", "i", None]
    assert [c.choices[0].finish_reason for c in found[:-1]] == [None, None, None, "length"]
    assert found[0].choices[0].delta.role == "assistant"
    assert found[-1].choices == [] and found[-1].usage is not None and found[-1].usage.total_tokens == 9
    assert all(c.usage is None for c in found[:-1])
    assert events(data)[-1]["timings"]["total_ms"] == 9
    assert events(data)[-2]["timings"]["total_ms"] == 9


def test_fields_we_do_not_do_are_named() -> None:
    error = refused(audio={"voice": "alloy"})
    assert (error.code, error.param) == ("unsupported_parameter", "audio")
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}
    assert refused(nonsense=1).code == "unknown_parameter"
    assert parse(audio=None, store=False, service_tier="auto", user="u", metadata={"a": "b"}).model == "smollm2"
    assert refused(store=True).code == "unsupported_parameter"
