"""/v1/answer: quotes that stand in the documents, the model's sentence, events, deadlines. One server, real models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bank import DOCUMENTS
from millis import Index
from millis.tasks.answer import ask
from serving import QUICK, Server
from shell import error_line, millis

QUESTION = "What is the monthly fee of the Blue Account?"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]) -> Path:
    path = tmp_path_factory.mktemp("index") / "bank.idx"
    model_path("minilm")  # by its name it is found where pulls put it
    with Index.open(path, create=True) as made:
        made.add(DOCUMENTS)
    return path


@pytest.fixture(scope="module")
def server(index: Path, model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2"), *QUICK, "--index", str(index)) as running:
        yield running


def test_an_answer_has_quotes_that_stand_in_the_documents(server: Server, index: Path) -> None:
    status, headers, data = server.ask("/v1/answer", {"question": QUESTION, "deadline_ms": 60_000})
    found = json.loads(data)
    assert status == 200 and found["found"] is True and found["model"] == "m" and "$5.00" in found["answer"]
    texts = {one["id"]: one for one in DOCUMENTS}
    for quote in found["quotes"]:
        document = texts[quote["document"]]
        assert document["text"][quote["start"] : quote["stop"]] == quote["quote"]
        assert quote["title"] == document["title"]
    with Index.open(index) as opened:  # as a program finds it, without a server
        wanted = ask(None, QUESTION, opened).result()
    assert [one["quote"] for one in found["quotes"]] == [source.quote for source in wanted.sources]
    assert found["probability"] == pytest.approx(wanted.probability, abs=2e-4)
    timings = found["timings"]
    assert 0 < timings["embed_ms"] < timings["quote_ms"] < timings["first_token_ms"] < timings["total_ms"] < 60_000
    assert timings["deadline_ms"] == 60_000 and found["usage"]["completion_tokens"] > 0
    assert all(f"{name};dur=" in headers["server-timing"] for name in ("embed", "search", "first_token", "total"))
    again = server.json("/v1/answer", {"question": "What is the overdraft fee?"})[1]
    assert again["timings"]["cached_tokens"] > 0  # the instruction's keys are kept


def test_what_the_documents_do_not_say_is_not_answered(server: Server) -> None:
    status, found = server.json("/v1/answer", {"question": "Who won the chess championship in Iceland?"})
    assert status == 200 and found["found"] is False and found["quotes"] == [] and found["written"] == "none"
    assert "do not answer" in found["answer"]
    chinese = server.json("/v1/answer", {"question": "金卡的年费是多少？", "extractive": True})[1]
    assert chinese["found"] is True and chinese["answer"] == "金卡的年费是三百元。" and chinese["written"] == "quote"


def test_a_stream_has_the_quotes_first_and_the_whole_in_the_end(server: Server) -> None:
    events = list(server.stream({"question": QUESTION, "stream": True}, "/v1/answer"))
    kinds = [event["type"] for event in events]
    assert kinds[0] == "answer.quotes" and kinds[-1] == "answer.completed" and set(kinds[1:-1]) == {"answer.delta"}
    whole = events[-1]["answer"]
    assert events[0]["quotes"] == whole["quotes"] and whole["written"] in ("model", "quote")
    text = "".join(event["delta"] for event in events[1:-1]).strip()
    assert text == whole["answer"] or whole["written"] == "quote"
    assert whole["answer"] == server.json("/v1/answer", {"question": QUESTION})[1]["answer"]
    nothing = list(server.stream({"question": "Who won at chess in Iceland?", "stream": True}, "/v1/answer"))
    assert [event["type"] for event in nothing] == ["answer.quotes", "answer.completed"]


def test_quotes_alone_need_no_model_and_without_time_for_one_it_is_refused(server: Server) -> None:
    status, found = server.json("/v1/answer", {"question": QUESTION, "deadline_ms": 0.05})
    assert status == 503 and found["error"]["code"] == "deadline_unmeetable"
    only = server.json("/v1/answer", {"question": QUESTION, "extractive": True})[1]
    assert only["written"] == "quote" and only["answer"] == only["quotes"][0]["quote"]
    by_encoder = server.json("/v1/answer", {"question": QUESTION, "model": "minilm"})[1]
    assert by_encoder["written"] == "quote" and by_encoder["quotes"] == only["quotes"]


def test_the_embedder_is_served_too(server: Server) -> None:
    models = {one["id"]: one["endpoints"] for one in server.json("/v1/models")[1]["data"]}
    assert list(models) == ["m", "minilm"] and all("/v1/answer" in paths for paths in models.values())
    vectors = server.json("/v1/embeddings", {"model": "minilm", "input": "a fee"})[1]
    assert len(vectors["data"][0]["embedding"]) == 384


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"question": " "}, "question"),
        ({}, "question"),
        ({"question": "x", "temperature": 1}, "temperature"),
        ({"question": "x", "max_tokens": 0}, "max_tokens"),
        ({"question": "x", "documents": []}, "documents"),
        ({"question": "x", "model": "other"}, "model"),
    ],
)
def test_bad_bodies_are_refused(server: Server, body: Any, param: str) -> None:
    status, found = server.json("/v1/answer", body)
    assert status == (404 if "model" in body else 400) and found["error"]["param"] == param


def test_an_index_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    assert "there is no index" in error_line(millis("serve", "--port", "0", "--index", str(tmp_path / "none")))
    (tmp_path / "text").write_text("no database")
    assert "text" in error_line(millis("serve", "--port", "0", "--index", str(tmp_path / "text")))
