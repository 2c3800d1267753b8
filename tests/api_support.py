"""What the tests of the wire types share: heads, timings, streams read apart, refusals."""

from __future__ import annotations

import codecs
import json
from typing import Any

import pytest

from millis.server.api.endpoints import parse
from millis.server.api.errors import ApiError
from millis.server.api.job import Endpoint, Job, Limits
from millis.server.api.writer import Head
from millis.types import Timings


class Bytes:
    """Tokens that are bytes, as the text they write."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))


HEAD = Head("0123", 1_700_000_000, "smollm2", "fp", token_bytes=lambda token: bytes([token]), detokenizer=Bytes)
USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'

# The least that each endpoint takes.
LEAST: dict[Endpoint, dict[str, Any]] = {
    "chat": {"model": "smollm2", "messages": [USER]},
    "completions": {"model": "smollm2", "prompt": "Hi"},
    "responses": {"model": "smollm2", "input": "Hi"},
    "messages": {"model": "smollm2", "messages": [USER], "max_tokens": 5},
    "count_tokens": {"model": "smollm2", "messages": [USER]},
    "embeddings": {"model": "smollm2", "input": "Hi"},
    "classify": {"model": "smollm2", "input": "Hi", "labels": ["good", "bad"]},
    "score": {"model": "smollm2", "text_1": "a", "text_2": "b"},
    "rerank": {"model": "smollm2", "query": "a", "documents": ["b"]},
    "answer": {"question": "Hi"},
    "tokenize": {"prompt": "Hi"},
    "detokenize": {"tokens": [1]},
}


def timings() -> Timings:
    return Timings(queue_ms=1.23456, total_ms=9, prompt_tokens=7, cached_tokens=3, completion_tokens=2, steps=2)


def job(endpoint: Endpoint, **fields: Any) -> Job:
    """The job of the least body and `fields`."""
    return parse(endpoint, json.dumps({**LEAST[endpoint], **fields}).encode(), Limits())


def refused(endpoint: Endpoint, **fields: Any) -> ApiError:
    """The error that `fields` bring about."""
    with pytest.raises(ApiError) as caught:
        job(endpoint, **fields)
    error = caught.value
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert "\n" not in error.message
    return error


def events(data: bytes) -> list[dict[str, Any]]:
    """The JSON of a stream's events; each event's name is its type, where it has one."""
    found = []
    *parts, nothing = data.decode().split("\n\n")
    assert nothing == ""
    for part in parts:
        *name, text = part.split("\n")
        event = json.loads(text.removeprefix("data: "))
        assert name in ([], [f"event: {event.get('type')}"])
        found.append(event)
    return found


def openai_events(data: bytes) -> list[dict[str, Any]]:
    """The JSON of a stream that ends with [DONE]."""
    done = b"data: [DONE]\n\n"
    assert data.endswith(done) and data.count(b"[DONE]") == 1
    return events(data.removesuffix(done))
