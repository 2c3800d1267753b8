"""/v1/responses as the official client uses it beyond one answer, against a real server and a real model."""

from __future__ import annotations

import hashlib
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


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    """The model reads what it reads where the whole conversation is sent."""
    asked: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    first = client.responses.create(**ASKED, input=asked, store=True)
    with client.responses.stream(**ASKED, input="And of Italy?", store=True, previous_response_id=first.id) as stream:
        second = stream.until_done().get_final_response()
    assert second.previous_response_id == first.id and second.store is True
    third = client.responses.create(**ASKED, input="Thanks.", previous_response_id=second.id)
    asked += [first.output[0], {"role": "user", "content": "And of Italy?"}]
    whole = client.responses.create(**ASKED, input=asked)
    assert whole.output_text == second.output_text and whole.store is False
    asked += [second.output[0], {"role": "user", "content": "Thanks."}]
    assert client.responses.create(**ASKED, input=asked).output_text == third.output_text

    assert client.responses.retrieve(first.id).output == first.output
    assert client.responses.retrieve(second.id).usage == second.usage
    pages = client.responses.input_items.list(second.id, limit=2, order="asc")
    items = list(pages)
    assert [item.type for item in items] == ["message"] * 3 and items[1] == first.output[0]
    assert [item.id for item in client.responses.input_items.list(second.id)] == [item.id for item in items][::-1]
    assert len({item.id for item in items}) == 3 and items[0].content[0].text == asked[0]["content"]  # type: ignore
    again: Any = [{"type": "item_reference", "id": items[0].id}]
    assert client.responses.create(**ASKED, input=again).output_text == first.output_text

    for kept in (third.id, whole.id):  # which did not ask for it
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(kept)
    client.responses.delete(first.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(first.id)
        assert missing.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError, match=first.id):
        client.responses.input_items.list(second.id)
    with pytest.raises(openai.BadRequestError, match=first.id) as caught:
        client.responses.create(**ASKED, input="Hi", previous_response_id=second.id)
    assert caught.value.code == "previous_response_not_found"


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after"), ("what=1", "what")],
)
def test_questions_that_cannot_be_are_named(server: Server, client: openai.OpenAI, query: str, param: str) -> None:
    kept = client.responses.create(**ASKED, input="Hi", store=True)
    status, answer = server.json(f"/v1/responses/{kept.id}/input_items?{query}")
    assert (status, answer["error"]["param"]) == (400, param)
    assert server.json(f"/v1/responses/{kept.id}?stream=true")[1]["error"]["param"] == "stream"


def test_another_keys_responses_are_not_there(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    hashes = [f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {key}" for key in ("one", "two")]
    (tmp_path / "keys").write_text("\n".join(hashes))
    arguments = ("--api-key-file", str(tmp_path / "keys"), "--max-stored", "1")
    with Server(model_path("smollm2"), *arguments, key="one") as server:
        base = f"{server.facts['url']}/v1"
        with openai.OpenAI(base_url=base, api_key="one") as one, openai.OpenAI(base_url=base, api_key="two") as two:
            kept = one.responses.create(**ASKED, input="Hi", store=True)
            item: Any = [{"type": "item_reference", "id": kept.output[0].id}]
            for ask in (two.responses.retrieve, two.responses.delete, two.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    ask(kept.id)
            for body in ({"input": item}, {"input": "Hi", "previous_response_id": kept.id}):
                with pytest.raises(openai.BadRequestError):
                    two.responses.create(**ASKED, **body)
            assert one.responses.retrieve(kept.id).id == kept.id
            one.responses.create(**ASKED, input="Hi", store=True)
            with pytest.raises(openai.NotFoundError):  # there is room for one
                one.responses.retrieve(kept.id)


def test_a_server_may_keep_nothing(model_path: Callable[[str], Path]) -> None:
    with Server(model_path("smollm2"), "--max-stored", "0") as server:
        with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as client:
            assert client.responses.create(**ASKED, input="Hi").status is not None
            with pytest.raises(openai.BadRequestError, match="--max-stored"):
                client.responses.create(**ASKED, input="Hi", store=True)
