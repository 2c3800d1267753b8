"""Clients that others wrote, as their users write with them, against a real server and a real model. One server."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, SecretStr

from millis import Index
from serving import QUICK, Server

SAY = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2"), *QUICK) as running:
        yield running


@pytest.fixture
def seen() -> list[httpx.Response]:
    return []


@pytest.fixture
def client(server: Server, seen: list[httpx.Response]) -> Iterator[openai.OpenAI]:
    """The official client with its own retries; `seen` has every answer that came."""
    transport = openai.DefaultHttpxClient(event_hooks={"response": [seen.append]})
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none", http_client=transport) as made:
        yield made


# openai


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=SAY, temperature=0, max_tokens=24)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert (
        answer.usage is not None
        and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    assert [model.id for model in client.models.list()] == ["m"] and client.models.retrieve("m").object == "model"


def test_openai_stream_says_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": SAY, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        last: ChatCompletion = stream.get_final_completion()
    assert len(pieces) > 1 and "".join(pieces) == whole.message.content == last.choices[0].message.content
    assert last.choices[0].finish_reason == whole.finish_reason
    assert last.usage is not None and last.usage.completion_tokens > 0


def test_openai_parameters(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": SAY, "max_completion_tokens": 6, "temperature": 1.0, "seed": 7}
    two = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=3)
    assert [choice.index for choice in two.choices] == [0, 1]
    for choice in two.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in choice.logprobs.content)
    again = client.chat.completions.create(**asked, n=2)
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in two.choices]
    legacy = client.completions.create(model="m", prompt="One, two, three,", max_tokens=6, temperature=0, stop=["\n"])
    assert "four" in legacy.choices[0].text


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str
    capital: bool


def test_openai_json_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="m", messages=SAY, temperature=0, max_tokens=64, response_format=form)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
    parsed = client.chat.completions.parse(model="m", messages=SAY, temperature=0, max_tokens=64, response_format=Place)
    assert isinstance(parsed.choices[0].message.parsed, Place)
    loose = client.chat.completions.create(
        model="m", messages=SAY, temperature=0, max_tokens=200, response_format={"type": "json_object"}
    )
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content or ""), dict)


def test_openai_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="m", input="What is the capital of France?", temperature=0, max_output_tokens=24
    )
    assert "Paris" in answer.output_text and answer.status in ("completed", "incomplete")
    with client.responses.stream(
        model="m", input="What is the capital of France?", temperature=0, max_output_tokens=99
    ) as stream:
        events = list(stream)
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert text and stream.get_final_response().output_text == text


def test_openai_errors_are_typed(client: openai.OpenAI, seen: list[httpx.Response]) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-none", messages=SAY)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=SAY, temperature=9)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model="m", messages=SAY, extra_body={"tempratur": 1})
    assert "tempratur" in str(unknown.value)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="m", prompt="word " * 20_000, max_tokens=1)
    assert "context" in str(long.value)
    assert len(seen) == 4


def test_openai_does_not_try_again_what_came_too_late(client: openai.OpenAI, seen: list[httpx.Response]) -> None:
    late = {"deadline_ms": 0.001, "on_deadline": "error"}
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="m", messages=SAY, extra_body=late)
    assert refused.value.status_code == 503 and refused.value.code in ("deadline_unmeetable", "deadline_exceeded")
    assert [answer.headers["x-should-retry"] for answer in seen] == ["false"]


def test_openai_a_deadline_shortens_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=SAY, max_tokens=4, temperature=0, extra_body={"deadline_ms": 60_000}
    )
    timings = answer.model_extra["timings"]  # type: ignore[index]
    assert timings["deadline_ms"] == 60_000
    assert timings["slack_ms"] == pytest.approx(60_000 - timings["total_ms"], abs=0.01)


def test_openai_a_wrong_key_is_an_authentication_error(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"sha256:{hashlib.sha256(b'right').hexdigest()} us\n")
    with Server(model_path("smollm2"), *QUICK, "--api-key-file", str(keys), key="right") as server:
        base = f"{server.facts['url']}/v1"
        with openai.OpenAI(base_url=base, api_key="wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with openai.OpenAI(base_url=base, api_key="right") as right:
            assert [model.id for model in right.models.list()] == ["m"]
        with anthropic.Anthropic(base_url=server.facts["url"], api_key="wrong") as other:
            with pytest.raises(anthropic.AuthenticationError):
                other.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "Hi"}])


# anthropic


def test_anthropic_messages(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.facts["url"], api_key="none") as client:
        greedy = {"temperature": 0}
        asked: Any = {"model": "m", "max_tokens": 24, "messages": SAY, "system": "Be brief.", "extra_body": greedy}
        whole = client.messages.create(**asked)
        assert whole.content[0].type == "text" and "Paris" in whole.content[0].text
        assert whole.stop_reason in ("end_turn", "max_tokens") and whole.usage.output_tokens > 0
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            last = stream.get_final_message()
        assert text == whole.content[0].text and last.stop_reason == whole.stop_reason
        tool: Any = {"name": "weather", "description": "Of a city", "input_schema": SCHEMA}
        for more in ({}, {"tools": [tool]}):
            said = {"messages": SAY, "model": "m", "system": "Be brief.", **more}
            used = client.messages.create(**said, max_tokens=1).usage
            counted = client.messages.count_tokens(**said).input_tokens
            assert counted == used.input_tokens + (used.cache_read_input_tokens or 0)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(**said | {"model": "claude-none"})
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**asked | {"model": "claude-none"})
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(**asked | {"extra_body": {"temperature": 7}})


# LangChain


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


def test_langchain_invoke_and_stream(langchain: ChatOpenAI) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("What is the capital of France?")]
    whole = langchain.invoke(messages)
    assert "Paris" in whole.text and whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 0
    pieces = [piece.text for piece in langchain.stream(messages)]
    assert len(pieces) > 2 and "".join(pieces) == whole.text


def test_langchain_structured_output(langchain: ChatOpenAI) -> None:
    structured = langchain.with_structured_output(Place, method="json_schema")
    assert isinstance(structured.invoke("What is the capital of France?"), Place)


# schemathesis


EXPECTED = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]  # 503: a deadline that cannot be met
"""


def test_schemathesis_finds_no_fault(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Requests made up from /openapi.json, right and wrong ones. That some of the right ones are refused is no fault:
    a schema cannot say which fields need each other."""
    (tmp_path / "schemathesis.toml").write_text(EXPECTED)
    with Index.open(tmp_path / "index", embedder=None, create=True) as index:
        index.add(["The monthly fee is $5.00.", "A lost card is replaced in 3 days."])
    with Server(model_path("smollm2"), *QUICK, "--context", "64", "--index", str(tmp_path / "index")) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{server.facts['url']}/openapi.json"]
        command += [
            "--phases",
            "fuzzing",
            "-n",
            "25",
            "--generation-deterministic",
            "--continue-on-failure",
            "--no-shrink",
        ]
        command += ["--exclude-checks", "positive_data_acceptance", "--warnings", "off", "--request-timeout", "60"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
        assert re.search(r"Operations: +(\d+) selected / \1 total", found.stdout) and "passed" in found.stdout
        assert server.metric("engine_restarts_total") == 0
