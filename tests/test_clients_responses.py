"""/v1/responses as the official client uses it beyond one answer, against a real server and a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serving import Server

CONTEXT = 256
ASKED: dict[str, Any] = {"model": "m", "temperature": 0, "max_output_tokens": 24}


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2"), "--context", str(CONTEXT)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as made:
        yield made


def test_the_oldest_turns_make_room(client: openai.OpenAI) -> None:
    """The answer is that to the conversation without them."""
    old: list[Any] = [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "I see."}]
    new: list[Any] = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]
    new.append({"role": "user", "content": "What is the capital of France?"})
    for extra in ({}, {"truncation": "disabled"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**ASKED, **extra, input=3 * old + new)
        assert caught.value.code == "context_length_exceeded"
    cut = client.responses.create(**ASKED, input=3 * old + new, instructions="Be brief.", truncation="auto")
    whole = client.responses.create(**ASKED, input=old + new, instructions="Be brief.")
    assert cut.truncation == "auto" and whole.truncation == "disabled"
    assert cut.output_text == whole.output_text != ""
    assert cut.usage is not None and whole.usage is not None
    assert cut.usage.input_tokens == whole.usage.input_tokens < CONTEXT
    with pytest.raises(openai.BadRequestError) as caught:  # the last message of the user stays
        client.responses.create(**ASKED, input=[*new, {"role": "user", "content": "word " * 300}], truncation="auto")
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"


def test_what_a_model_thought_is_passed_over(client: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    thought: Any = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Rome?"}],
                    "content": [{"type": "reasoning_text", "text": "No."}], "encrypted_content": "x"}  # fmt: skip
    plain = client.responses.create(**ASKED, input=asked)
    found = client.responses.create(**ASKED, input=[thought, *asked], include=["reasoning.encrypted_content"])
    assert found.output_text == plain.output_text
    assert found.usage is not None and plain.usage is not None
    assert found.usage.input_tokens == plain.usage.input_tokens
