"""Endpoints that generate nothing: embeddings, classify, score, rerank, tokenize, detokenize, models."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types import Model as OpenAIModel

from api_support import HEAD, USER, job, refused, timings
from millis.server.api.classify import labels_body
from millis.server.api.embeddings import embedding_body
from millis.server.api.errors import ApiError
from millis.server.api.job import Conversation, Instruction
from millis.server.api.models import Served, model_body, models_body
from millis.server.api.similarity import cosines, rerank_body, score_body
from millis.server.api.tokenize import detokenize_body, tokenize_body

VECTORS = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)


def clean(body: dict[str, Any]) -> dict[str, Any]:
    """The body as it would be after a network."""
    found: dict[str, Any] = json.loads(json.dumps(body, allow_nan=False))
    assert found.get("timings", {"total_ms": 9})["total_ms"] == 9
    return found


def test_embeddings() -> None:
    found = job("embeddings", input=["a", "b", "c"], deadline_ms=50, priority="batch")
    assert (found.kind, found.prompts, found.deadline_ms, found.priority) == ("embed", ("a", "b", "c"), 50, "batch")
    answer = CreateEmbeddingResponse.model_validate(clean(embedding_body(found, HEAD, VECTORS, timings())))
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    np.testing.assert_array_equal(np.array([entry.embedding for entry in answer.data], np.float32), VECTORS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)


@pytest.mark.parametrize(
    ("given", "priority"), [(-3, "interactive"), (0, "standard"), (7, "batch"), (None, "standard")]
)
def test_numbers_of_priority_are_vllms(given: int | None, priority: str) -> None:
    assert job("embeddings", input="a", priority=given).priority == priority
    assert job("chat", messages=[USER], priority=given).priority == priority


def test_values_that_ask_for_nothing_are_taken() -> None:
    assert job("embeddings", normalize=True, add_special_tokens=True, user="u") == job("embeddings")
    least = {"prompt": None, "messages": [USER]}
    nothing = {"continue_final_message": False, "chat_template_kwargs": {}}
    assert job("tokenize", **least, **nothing) == job("tokenize", **least)
    (prompt,) = job("tokenize", **least, add_special_tokens=False).prompts  # the template alone says which there are
    assert prompt == job("tokenize", **least).prompts[0]


def test_embeddings_may_be_asked_for_in_the_models_own_width() -> None:
    assert embedding_body(job("embeddings", input=["a"], dimensions=2), HEAD, VECTORS, timings())["data"]
    with pytest.raises(ApiError, match="dimensions is not supported: vectors of .* have 2;") as caught:
        embedding_body(job("embeddings", input=["a"], dimensions=3), HEAD, VECTORS, timings())
    assert (caught.value.status, caught.value.param) == (400, "dimensions")


def test_embeddings_in_base64_are_little_endian_floats() -> None:
    found = job("embeddings", input=[[1, 2], [3]], encoding_format="base64")
    assert found.prompts == ((1, 2), (3,))
    body = clean(embedding_body(found, HEAD, VECTORS, timings()))
    rows = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in body["data"]]
    np.testing.assert_array_equal(rows, VECTORS)


def test_classify() -> None:
    found = job("classify", input=["{labels}", "b"], labels=["good", "bad"])
    assert found.kind == "score"
    assert found.continuations == ("good", "bad")
    first = found.prompts[0]
    assert isinstance(first, Instruction)
    assert "one of: good, bad." in first.text and "Text: {labels}" in first.text
    values = [[math.log(0.2), math.log(0.6)], [-math.inf, -math.inf]]
    rows = [found.extra["question"].scores(row) for row in values]
    body = clean(labels_body(found, HEAD, rows, timings(), False, [{}, {"complete": False}]))
    one, other = body["data"]
    assert (one["index"], one["label"], one["num_classes"]) == (0, "bad", 2)
    assert one["probs"] == pytest.approx([0.25, 0.75])
    assert one["scores"] == pytest.approx({"good": 0.25, "bad": 0.75})
    assert other["probs"] == [0.5, 0.5] and other["complete"] is False and "complete" not in one


def test_classify_asks_in_chinese_with_examples_and_each_label_by_itself() -> None:
    found = job("classify", input="很好", labels=["正面", "负面"], examples=[{"text": "真差", "label": "负面"}])
    first = found.prompts[0]
    assert isinstance(first, Instruction) and first.text.endswith("文本：真差\n\n类别：负面\n\n文本：很好\n\n类别：")
    several = job("classify", input="很好", labels=["正面", "快"], multi_label=True)
    assert several.extra["question"].multi and "标签“{label}”适用于" in several.extra["question"].text("很好")
    rows = several.extra["question"].scores([math.log(0.6), math.log(0.2), -math.inf, -math.inf])
    assert rows == pytest.approx([0.75, 0.5])
    (one,) = clean(labels_body(several, HEAD, [[0.75, 0.2]], timings(), True, [{}]))["data"]
    assert (one["label"], one["labels"]) == ("正面", ["正面"])
    (none,) = clean(labels_body(several, HEAD, [[0.4, 0.2]], timings(), True, [{}]))["data"]
    assert (none["label"], none["labels"]) == (None, [])


def test_a_question_cut_short_names_none_of_several_labels() -> None:
    several = job("classify", labels=["good", "bad"], multi_label=True)
    (cut,) = clean(labels_body(several, HEAD, [[0.75, 0.5]], timings(), True, [{"complete": False}]))["data"]
    assert (cut["label"], cut["labels"]) == (None, []) and cut["scores"] == {"good": 0.75, "bad": 0.5}


def test_classify_abstains() -> None:
    found = job("classify", labels=["good", "bad"], abstain=0.8)
    rows = [[0.75, 0.25], [0.1, 0.9]]
    body = clean(labels_body(found, HEAD, rows, timings(), False, [{}, {}]))
    assert [one["label"] for one in body["data"]] == [None, "bad"]


def test_classify_takes_a_template_of_ones_own() -> None:
    found = job("classify", template="Mood of {text}?", labels=["a", "b"])
    assert found.prompts == (Instruction("Mood of Hi?"),)


def test_score() -> None:
    one = job("score", text_1="a", text_2=["b", "c"])
    assert one.prompts == ("a", "b", "c")
    body = clean(score_body(one, HEAD, cosines(one, VECTORS), timings()))
    assert [entry["score"] for entry in body["data"]] == pytest.approx([0.6, 0.8])
    pairs = job("score", text_1=["a", "b"], text_2=["c", "d"], encoding_format="float")  # as vLLM's clients say it
    assert pairs.extra["fields"] == ["text_1[0]", "text_1[1]", "text_2[0]", "text_2[1]"]
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 0, 2]]
    body = clean(score_body(pairs, HEAD, cosines(pairs, vectors), timings()))
    assert [entry["score"] for entry in body["data"]] == [1, 0]


def test_rerank() -> None:
    found = job("rerank", documents=["b", {"text": "c"}], top_n=5)
    body = clean(rerank_body(found, HEAD, cosines(found, VECTORS), timings()))
    assert [(r["index"], r["document"]["text"]) for r in body["results"]] == [(1, "c"), (0, "b")]
    assert [r["relevance_score"] for r in body["results"]] == pytest.approx([0.8, 0.6])
    found = job("rerank", documents=["b", "c"], top_n=1, return_documents=False)
    (only,) = clean(rerank_body(found, HEAD, cosines(found, VECTORS), timings()))["results"]
    assert only["index"] == 1 and "document" not in only
    found = job("rerank", documents=["b", "c"], top_n=0)  # vLLM's default
    assert len(rerank_body(found, HEAD, cosines(found, VECTORS), timings())["results"]) == 2


def test_tokenize_and_detokenize() -> None:
    found = job("tokenize", add_special_tokens=False, return_token_strs=True)
    assert (found.prompts, found.add_special, found.model) == (("Hi",), False, None)
    body = clean(tokenize_body(found, [72, 105], 8192, HEAD.token_bytes))
    assert body == {"count": 2, "max_model_len": 8192, "tokens": [72, 105], "token_strs": ["H", "i"]}
    assert tokenize_body(job("tokenize"), [], 9, HEAD.token_bytes)["token_strs"] is None
    chat = job("tokenize", prompt=None, messages=[USER], add_generation_prompt=False)
    assert chat.prompts == (Conversation((USER,)),) and not chat.add_generation_prompt
    assert job("detokenize", tokens=[1, 2]).prompts == ((1, 2),)
    assert detokenize_body("Hi") == {"prompt": "Hi"}


def test_models() -> None:
    served = [Served("smollm2", 1_700_000_000, 8192)]
    (entry,) = models_body(served)["data"]
    assert OpenAIModel.model_validate(entry).id == "smollm2"
    assert model_body(served, "smollm2") == entry and entry["max_model_len"] == 8192
    with pytest.raises(ApiError) as caught:
        model_body(served, "gpt\n4")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        ("embeddings", {"dimensions": 0}, "dimensions"),
        ("embeddings", {"normalize": False}, "normalize"),
        ("embeddings", {"add_special_tokens": False}, "add_special_tokens"),
        ("tokenize", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("embeddings", {"encoding_format": "int8"}, "encoding_format"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("classify", {"labels": ["a"]}, "labels"),
        ("classify", {"labels": ["a", "a"]}, "labels"),
        ("classify", {"labels": ["a", ""]}, "labels[1]"),
        ("classify", {"labels": [str(i) for i in range(257)]}, "labels"),
        ("classify", {"template": "What?"}, "template"),
        ("classify", {"labels": ["a", "  "]}, "labels"),
        ("classify", {"template": "{text}?", "multi_label": True}, "template"),
        ("classify", {"examples": [{"text": "x", "label": "other"}]}, "examples"),
        ("classify", {"examples": [{"text": "x"}]}, "examples[0].label"),
        ("classify", {"abstain": 1.5}, "abstain"),
        ("classify", {"template": "{text}" * 600, "input": "x" * 4000}, "input"),
        ("classify", {"input": []}, "input"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("score", {"text_2": []}, "text_2"),
        ("rerank", {"documents": []}, "documents"),
        ("rerank", {"documents": [{"text": "b", "image": "x"}]}, "documents[0].image"),
        ("rerank", {"top_n": -1}, "top_n"),
        ("score", {"encoding_format": "base64"}, "encoding_format"),
        ("tokenize", {"messages": [USER]}, "prompt"),
        ("tokenize", {"add_generation_prompt": True}, "add_generation_prompt"),
        ("tokenize", {"prompt": None, "messages": [USER], "parse_special": False}, "parse_special"),
        ("tokenize", {"prompt": None, "messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_cannot_be_done_is_named(endpoint: Any, fields: dict[str, Any], param: str) -> None:
    assert refused(endpoint, **fields).param == param
