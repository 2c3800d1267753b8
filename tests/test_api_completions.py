"""/v1/completions without a server, read by OpenAI's own types."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion

from api_support import HEAD, job, openai_events, refused, timings
from millis.server.api.completions import CompletionWriter
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
    assert logprobs.top_logprobs == [{"z": -1.5}, {}]
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
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
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


def test_values_that_ask_for_nothing_are_taken() -> None:
    assert job("completions", echo=False, suffix=None, best_of=1, user="u") == job("completions")
