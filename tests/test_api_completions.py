"""/v1/completions without a server, read by OpenAI's own types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from openai.types import Completion

from api_support import HEAD, Bytes, job, openai_events, refused, timings
from millis.engine.runner import Ranked
from millis.server.api.completions import CompletionWriter
from millis.server.api.echo import Echo
from millis.server.api.writer import Head
from millis.types import TokenLogprob


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", ("Hi",)),
        (["Hi", "Ho"], ("Hi", "Ho")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_are_texts_or_tokens(prompt: Any, prompts: tuple[Any, ...]) -> None:
    found = job("completions", prompt=prompt)
    assert found.prompts == prompts
    assert (found.params.max_tokens, found.open_ended) == (16, False)


def test_every_choice_of_every_prompt_has_its_index() -> None:
    writer = CompletionWriter(job("completions", prompt=["a", "b"], n=2, logprobs=1), HEAD)
    for index, letter in enumerate("wxyz"):
        writer.feed(index, letter, [TokenLogprob(ord(letter), -1.5, ((ord(letter), -1.5),))])
        writer.feed(index, "é"[:0], [TokenLogprob(0xC3, -0.5)])
        writer.finish(index, "length", timings())
    found = Completion.model_validate(writer.body())
    assert [(c.index, c.text, c.finish_reason) for c in found.choices] == [
        (i, letter, "length") for i, letter in enumerate("wxyz")
    ]
    logprobs = found.choices[3].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs) == (["z", "bytes:\\xc3"], [-1.5, -0.5])
    assert logprobs.top_logprobs == [{"z": -1.5}, {"bytes:\\xc3": -0.5}]  # the chosen one is always told
    assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (14, 8)


def test_tokens_stand_where_they_begin_in_the_text_whole_or_in_pieces() -> None:
    """Also those within a character, and those whose text was held back."""
    text = "ab月c"
    logprobs = [TokenLogprob(byte, -0.5) for byte in text.encode()]
    whole = CompletionWriter(job("completions", logprobs=0), HEAD)
    whole.feed(0, text, logprobs)
    whole.finish(0, "length", timings())
    assert whole.body()["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 2, 2, 3]
    stream = CompletionWriter(job("completions", logprobs=0, stream=True), HEAD)
    data = b""
    for piece, logprob in zip(["", "", "", "", "ab月", "c"], logprobs, strict=True):
        data += stream.feed(0, piece, [logprob])
    found = [event["choices"][0]["logprobs"]["text_offset"] for event in openai_events(data + stream.end())]
    assert found == [[0], [1], [2], [2], [2], [3]]


def test_a_stream_is_pieces_of_completions() -> None:
    writer = CompletionWriter(job("completions", stream=True, stream_options={"include_usage": True}), HEAD)
    data = writer.begin() + writer.feed(0, "a") + writer.feed(0, "b")
    found = openai_events(data + writer.finish(0, "stop", timings()) + writer.end())
    pieces = [Completion.construct(**event) for event in found if event["choices"]]
    assert "".join(piece.choices[0].text for piece in pieces) == "ab"
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert found[-1]["usage"]["total_tokens"] == 9
    assert found[-1]["timings"]["total_ms"] == found[-2]["timings"]["total_ms"] == 9


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 0, "echo": False, "prompt_logprobs": 1}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "invalid_value", "max_tokens"),
        ({"echo": 1}, "invalid_type", "echo"),
        ({"echo": True, "logprobs": 6}, "invalid_value", "logprobs"),
        ({"prompt_logprobs": 6}, "invalid_value", "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "invalid_value", "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "unsupported_parameter", "prompt_logprobs"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"add_special_tokens": False}, "unsupported_parameter", "add_special_tokens"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"guided_regex": "a"}, "unsupported_parameter", "guided_regex"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[1], []]}, "invalid_value", "prompt[1]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
        ({"prompt": [-1]}, "invalid_value", "prompt[0]"),
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
        ({"prompt": "a" * (1 << 21)}, "string_above_max_length", "prompt"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"messages": []}, "unknown_parameter", "messages"),
    ],
)
def test_what_cannot_be_done_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    error = refused("completions", **fields)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    ("fields", "best", "writes"),
    [
        ({"echo": True}, None, True),
        ({"logprobs": 3}, None, True),
        ({"echo": True, "logprobs": 0}, 0, True),
        ({"echo": True, "logprobs": 2, "max_tokens": 0}, 2, False),
        ({"echo": True, "max_tokens": 0}, None, False),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 4}, 4, True),
        ({"logprobs": 5, "prompt_logprobs": 1}, 1, True),
    ],
)
def test_what_is_to_be_found_of_a_prompt(fields: dict[str, Any], best: int | None, writes: bool) -> None:
    found = job("completions", **fields)
    assert (found.best, found.writes, found.echo) == (best, writes, fields.get("echo", False))


ECHO = Echo("Hi", [72, 105, 72], [0, 1, 2])
RANKED = Ranked(
    np.array([-0.5, -np.inf], np.float32),
    np.array([1, 3], np.int32),
    np.array([[105, 65], [66, -1]], np.int32),
    np.array([[-0.5, -2.0], [-0.25, -np.inf]], np.float32),
)


def test_an_echo_comes_before_what_is_written() -> None:
    """In one object of log-probabilities; of the first token nothing is known, and no token is less than -9999."""
    whole = CompletionWriter(job("completions", echo=True, logprobs=1), HEAD)
    assert whole.echo([0], ECHO, RANKED) == b""
    whole.feed(0, "!", [TokenLogprob(33, -0.125, ((33, -0.125),))])
    whole.finish(0, "length", timings())
    (choice,) = whole.body()["choices"]
    assert choice["text"] == "Hi!"
    assert choice["logprobs"] == {
        "tokens": ["H", "i", "H", "!"],
        "token_logprobs": [None, -0.5, -9999.0, -0.125],
        "top_logprobs": [None, {"i": -0.5}, {"B": -0.25, "H": -9999.0}, {"!": -0.125}],
        "text_offset": [0, 1, 2, 2],
    }
    stream = CompletionWriter(job("completions", echo=True, logprobs=1, stream=True), HEAD)
    data = stream.echo([0], ECHO, RANKED) + stream.feed(0, "!", [TokenLogprob(33, -0.125, ((33, -0.125),))])
    first, second = (event["choices"][0] for event in openai_events(data + stream.end()))
    assert (first["text"], second["text"]) == ("Hi", "!")
    for name, values in choice["logprobs"].items():
        assert first["logprobs"][name] + second["logprobs"][name] == values


def test_tokens_that_are_written_alike_leave_the_likeliest() -> None:
    """So that the best of `top_logprobs` is the best of all."""
    alike = Head(*("",) * 4, token_bytes=lambda token: b"same", detokenizer=Bytes)  # type: ignore[arg-type]
    writer = CompletionWriter(job("completions", logprobs=2), alike)
    writer.feed(0, "same", [TokenLogprob(3, -4.0, ((1, -0.5), (2, -1.0)))])
    writer.finish(0, "length", timings())
    assert writer.body()["choices"][0]["logprobs"]["top_logprobs"] == [{"same": -0.5}]


def test_a_fallback_takes_the_place_of_the_echo_too() -> None:
    fields = {"echo": True, "logprobs": 1, "on_deadline": "fallback", "fallback": "sorry", "deadline_ms": 50}
    whole = CompletionWriter(job("completions", **fields), HEAD)
    whole.echo([0], ECHO, RANKED)
    whole.finish(0, "deadline", timings())
    (choice,) = whole.body()["choices"]
    assert choice["text"] == "sorry" and choice["logprobs"]["tokens"] == []
    stream = CompletionWriter(job("completions", **fields, stream=True), HEAD)  # unless that has been sent
    sent = stream.echo([0], ECHO, RANKED) + stream.finish(0, "deadline", timings()) + stream.end()
    assert "".join(event["choices"][0]["text"] for event in openai_events(sent)) == "Hi"


def test_values_that_ask_for_nothing_are_taken() -> None:
    assert job("completions", echo=False, suffix=None, best_of=1, user="u") == job("completions")
    more = {"store": False, "service_tier": "default", "metadata": {"a": "b"}, "safety_identifier": "s"}
    also = {"bad_words": [], "add_special_tokens": True, "return_token_ids": False, "prompt_cache_key": "k"}
    assert job("completions", **more, **also) == job("completions")
