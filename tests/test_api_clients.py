"""The official clients and LangChain against the wire types, joined in memory: what they send is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import httpx2
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from api_support import CALL, HEAD, SCHEMA, USER, WEATHER, timings
from millis.server.api.embeddings import embedding_body
from millis.server.api.endpoints import ROUTES, parse, writer
from millis.server.api.errors import ApiError
from millis.server.api.job import Limits


def serve(text: str, http: Any) -> Callable[[Any], Any]:
    """Answers every generating request with `text`, in three pieces. `http`: httpx, or what Anthropic's client has."""

    def handle(request: Any) -> Any:
        (endpoint,) = (name for name, route in ROUTES.items() if route.path == request.url.path)
        try:
            job = parse(endpoint, request.content, Limits())
        except ApiError as error:
            return http.Response(error.status, json=error.body_for(request.url.path))
        if job.kind == "embed":
            return http.Response(200, json=embedding_body(job, HEAD, np.eye(3, dtype=np.float32), timings()))
        made = writer(job, HEAD)
        data = made.begin(7)
        for piece in (text[:5], text[5:9], text[9:]):
            data += made.feed(0, piece)
        data += made.finish(0, "stop", timings()) + made.end()
        if job.stream:
            return http.Response(200, content=data, headers={"content-type": "text/event-stream"})
        return http.Response(200, json=made.body())

    return handle


def client(text: str) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(serve(text, httpx)))


def openai_client(text: str) -> openai.OpenAI:
    return openai.OpenAI(api_key="k", base_url="http://millis/v1", http_client=client(text), max_retries=0)


class City(BaseModel):
    city: str


def test_openai_chat_parses_a_schema_into_the_callers_own_class() -> None:
    with openai_client('{"city": "Oslo"}') as ai:
        found = ai.chat.completions.parse(model="smollm2", messages=[USER], response_format=City)  # type: ignore[list-item]
    assert found.choices[0].message.parsed == City(city="Oslo")


def test_openai_chat_streams_text_and_calls() -> None:
    with openai_client(f"See: {CALL}") as ai:
        with ai.chat.completions.stream(model="smollm2", messages=[USER], tools=[WEATHER]) as stream:  # type: ignore[list-item]
            kinds = {event.type for event in stream}
            message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.done"} <= kinds
    assert message.content == "See:"
    assert message.tool_calls is not None and json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}


def test_openai_responses_stream_and_parse() -> None:
    with openai_client('{"city": "Oslo"}') as ai:
        with ai.responses.stream(model="smollm2", input="Hi", text_format=City) as stream:
            assert stream.get_final_response().output_parsed == City(city="Oslo")
        assert ai.responses.create(model="smollm2", input="Hi").output_text == '{"city": "Oslo"}'


def test_openai_embeddings_come_as_base64_by_default() -> None:
    with openai_client("") as ai:
        found = ai.embeddings.create(model="smollm2", input=["a", "b", "c"])
    assert [entry.embedding for entry in found.data] == np.eye(3).tolist()


def test_openai_errors_are_raised_with_their_code() -> None:
    with openai_client("") as ai, pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="smollm2", messages=[USER], reasoning_effort="high")  # type: ignore[list-item]
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "reasoning_effort")


def test_anthropic_streams_and_raises() -> None:
    tool: Any = {"name": "weather", "input_schema": SCHEMA}
    http = httpx2.Client(transport=httpx2.MockTransport(serve(f"See: {CALL}", httpx2)))
    with anthropic.Anthropic(api_key="k", base_url="http://millis", http_client=http) as ai:
        with ai.messages.stream(model="smollm2", max_tokens=9, messages=[USER], tools=[tool]) as stream:  # type: ignore[list-item]
            assert "".join(stream.text_stream) == "See:"
            call = stream.get_final_message().content[1]
        assert call.type == "tool_use" and call.input == {"city": "Oslo"}
        with pytest.raises(anthropic.BadRequestError, match="thinking"):
            ai.messages.create(
                model="smollm2", max_tokens=9, messages=[USER], thinking={"type": "enabled", "budget_tokens": 1024}  # type: ignore[list-item]
            )  # fmt: skip


def langchain(text: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="smollm2", base_url="http://millis/v1", api_key=SecretStr("k"), http_client=client(text), temperature=0
    )  # fmt: skip


def test_langchain_calls_tools_streams_and_fills_a_class() -> None:
    found = langchain(CALL).bind_tools([WEATHER], tool_choice="any").invoke("Weather?")
    assert [(call["name"], call["args"]) for call in found.tool_calls] == [("weather", {"city": "Oslo"})]
    again = langchain("Cold.").invoke([("user", "Weather?"), found, {"role": "tool", "content": "cold",
                                       "tool_call_id": found.tool_calls[0]["id"]}])  # fmt: skip
    assert again.content == "Cold."
    assert "".join(str(piece.content) for piece in langchain("Hello there").stream("Hi")) == "Hello there"
    assert langchain('{"city": "Oslo"}').with_structured_output(City).invoke("Hi") == City(city="Oslo")
