"""Encoders over HTTP: vectors and labels against transformers, what they refuse, deadlines, a crash. Two servers."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from transformers import AutoTokenizer

from encoders import CONTEXT, LABELS, decoder, hidden, logits, save, tiny
from gguf_files import DROP, HIDDEN, write_tiny
from millis import Encoder
from serving import CHAT, Server, chat, until
from shell import error_line, millis
from tokenizer_tiny import bpe

TEXTS = ["where is my parcel", "late loan ?", "help"]
ONE: dict[str, Any] = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
EXACT = ("--precision", "exact", "--threads", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    vocabulary = bpe() | {"tokenizer.ggml.scores": DROP, ".context_length": 256}
    size = len(vocabulary["tokenizer.ggml.tokens"])
    write_tiny(root / "tiny.gguf", keys=vocabulary, tensors={"token_embd.weight": (size, HIDDEN)})
    body, head, many, causal, rank = (root / name for name in ("body", "head", "many", "causal", "rank"))
    save(tiny("bert", **ONE), rank)
    save(decoder("Llama"), causal)
    save(tiny("bert", head=False), body)
    save(tiny("bert"), head)
    save(tiny("distilbert", problem_type="multi_label_classification"), many)
    return {"lm": root / "tiny.gguf", "body": body, "head": head, "many": many, "causal": causal, "rank": rank}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Server]:
    """A model that writes, and five that read, a decoder and a cross-encoder among them."""
    beside = [
        f"--encoder={folders['body']}",
        f"--encoder=intents={folders['head']}",
        f"--encoder=many={folders['many']}",
        f"--encoder=causal={folders['causal']}",
        f"--encoder=rank={folders['rank']}",
    ]
    with Server(folders["lm"], *EXACT, *beside) as running:
        yield running


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Iterator[Server]:
    """An encoder with a head, and nothing else."""
    with Server(folders["head"], *EXACT) as running:
        yield running


def ids_of(folder: Path, text: str, **options: Any) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(folder)(text, **options).input_ids
    return found


def unit(folder: Path, model: Any, text: str) -> np.ndarray:
    mean = hidden(model, ids_of(folder, text)).mean(0)
    return mean / np.linalg.norm(mean)  # type: ignore[no-any-return]


def test_vectors_are_those_of_transformers(server: Server, folders: dict[str, Path]) -> None:
    model = tiny("bert", head=False)
    wanted = np.stack([unit(folders["body"], model, text) for text in TEXTS])
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as client:
        found = client.embeddings.create(model="body", input=TEXTS)
    np.testing.assert_allclose([one.embedding for one in found.data], wanted, atol=2e-5)
    assert found.usage.prompt_tokens == sum(len(ids_of(folders["body"], text)) for text in TEXTS)
    given = [ids_of(folders["body"], text) for text in TEXTS]
    by_ids = server.json("/v1/embeddings", {"model": "body", "input": given})[1]
    np.testing.assert_allclose([one["embedding"] for one in by_ids["data"]], wanted, atol=2e-5)
    score = server.json("/v1/score", {"model": "body", "text_1": TEXTS[0], "text_2": TEXTS[1:]})[1]
    cosines = wanted[1:] @ wanted[0]
    assert [one["score"] for one in score["data"]] == pytest.approx(cosines.tolist(), abs=5e-5)
    ranked = server.json("/v1/rerank", {"model": "body", "query": TEXTS[0], "documents": TEXTS[1:]})[1]
    assert [one["index"] for one in ranked["results"]] == (-cosines).argsort().tolist()
    for path in ("/rerank", "/v2/rerank"):  # as clients of Cohere, Jina and vLLM ask
        asked = {"model": "body", "query": TEXTS[0], "documents": TEXTS[1:]}
        assert server.json(path, asked)[1]["results"] == ranked["results"]
    intents = {"model": "intents", "input": TEXTS[0], "use_activation": True}
    assert server.json("/classify", intents)[1]["data"] == server.json("/v1/classify", intents)[1]["data"]
    again = server.json("/score", {"model": "body", "text_1": TEXTS[0], "text_2": TEXTS[1:]})
    assert again[1]["data"] == score["data"] and server.ask("/score")[0] == 405
    ids = server.json("/tokenize", {"model": "body", "prompt": TEXTS[0]})[1]
    assert ids["tokens"] == given[0] and ids["max_model_len"] == CONTEXT


def test_a_cross_encoder_reads_two_texts_together(server: Server, folders: dict[str, Path]) -> None:
    encoder = Encoder(folders["rank"], threads=1, precision="exact")
    wanted = encoder.relevance(TEXTS[0], TEXTS[1:])
    ranked = server.json("/v1/rerank", {"model": "rank", "query": TEXTS[0], "documents": TEXTS[1:]})[1]
    assert [one["index"] for one in ranked["results"]] == (-wanted).argsort().tolist()
    assert [one["relevance_score"] for one in ranked["results"]] == pytest.approx(
        sorted(wanted, reverse=True), abs=1e-5
    )
    both = {"model": "rank", "text_1": TEXTS[:2], "text_2": TEXTS[1:]}
    score = server.json("/v1/score", both)[1]
    apart = [float(encoder.relevance(a, [b])[0]) for a, b in zip(TEXTS[:2], TEXTS[1:], strict=True)]
    assert [one["score"] for one in score["data"]] == pytest.approx(apart, abs=1e-5)
    long = {"model": "rank", "query": TEXTS[0], "documents": ["a", "card " * CONTEXT]}
    status, answer = server.json("/v1/rerank", long)
    assert (status, answer["error"]["param"]) == (400, "documents[1]")
    assert "query and documents[1] have" in answer["error"]["message"]
    assert server.json("/v1/rerank", {**long, "truncate_prompt_tokens": -1})[0] == 200
    assert server.json("/v1/embeddings", {"model": "rank", "input": "card"})[0] == 200


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()  # type: ignore[no-any-return]


def test_a_trained_head_says_its_labels(server: Server, folders: dict[str, Path]) -> None:
    model = tiny("bert")
    rows = [softmax(logits(model, ids_of(folders["head"], text))) for text in TEXTS]
    status, headers, _ = server.ask("/v1/classify", {"model": "intents", "input": TEXTS[0]})
    assert status == 200 and {"queue", "prefill", "total"} <= {
        part.partition(";")[0].strip() for part in headers["server-timing"].split(",")
    }
    found = server.json("/v1/classify", {"model": "intents", "input": TEXTS})[1]
    for one, wanted in zip(found["data"], rows, strict=True):
        assert list(one["scores"]) == list(LABELS.values()) and one["num_classes"] == 4
        assert one["probs"] == pytest.approx(wanted.tolist(), abs=2e-5)
        assert one["label"] == LABELS[int(wanted.argmax())] and "truncated" not in one
    assert found["timings"]["prompt_tokens"] == found["usage"]["prompt_tokens"] > 0
    some = server.json("/v1/classify", {"model": "intents", "input": TEXTS[0], "labels": ["parcel", "card"]})[1]
    part = softmax(logits(model, ids_of(folders["head"], TEXTS[0]))[[2, 0]])
    assert list(some["data"][0]["scores"]) == ["parcel", "card"]
    assert some["data"][0]["probs"] == pytest.approx(part.tolist(), abs=2e-5)
    several = server.json("/v1/classify", {"model": "many", "input": TEXTS[0]})[1]["data"][0]
    independent = 1 / (1 + np.exp(-logits(tiny("distilbert"), ids_of(folders["many"], TEXTS[0]))))
    assert several["probs"] == pytest.approx(independent.tolist(), abs=2e-5)


def test_a_decoder_says_its_labels_and_keeps_deadlines(server: Server, folders: dict[str, Path]) -> None:
    model, ids = decoder("Llama"), [ids_of(folders["causal"], text) for text in TEXTS]
    found = server.json("/v1/classify", {"model": "causal", "input": TEXTS, "deadline_ms": 5000})[1]
    for one, text in zip(found["data"], ids, strict=True):
        assert one["probs"] == pytest.approx(softmax(logits(model, text)).tolist(), abs=2e-5)
    vector = server.json("/v1/embeddings", {"model": "causal", "input": TEXTS[0]})[1]["data"][0]["embedding"]
    mean = hidden(model, ids[0]).mean(0)
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-5)
    texts = {"model": "m", "input": ["where is my parcel " * 4] * 150, "deadline_ms": 4}
    status, refused = server.json("/v1/embeddings", texts)  # of the model that writes
    assert status == 503 and refused["error"]["code"] == "deadline_unmeetable"
    assert refused["error"]["message"].startswith("reading the texts takes") and refused["error"]["predicted_ms"] > 4
    status, found = server.json("/v1/embeddings", texts | {"deadline_ms": 60_000})
    assert status == 200 and found["timings"]["slack_ms"] > 0
    several = {"model": "m", "input": [f"{i} {text}" for i in range(4) for text in TEXTS], "labels": ["a", "b"]}
    times = server.json("/v1/classify", several)[1]["timings"]
    assert 0 < times["queue_ms"] + times["prefill_ms"] <= times["total_ms"]  # of all together
    late = {"model": "causal", "input": ["where is my parcel " * 12] * 400, "deadline_ms": 2}
    status, refused = server.json("/v1/classify", late)
    assert status == 503 and refused["error"]["code"] == "deadline_unmeetable"


def test_long_texts_are_cut_where_that_is_said(server: Server, folders: dict[str, Path]) -> None:
    long = "parcel " * 100
    cut = ids_of(folders["head"], long, truncation=True, max_length=CONTEXT)
    found = server.json("/v1/classify", {"model": "intents", "input": [long, "help"]})[1]
    assert found["data"][0]["truncated"] is True and "truncated" not in found["data"][1]
    wanted = softmax(logits(tiny("bert"), cut))
    assert found["data"][0]["probs"] == pytest.approx(wanted.tolist(), abs=2e-5)
    status, refused = server.json("/v1/embeddings", {"model": "body", "input": long})
    assert status == 400 and refused["error"]["code"] == "context_length_exceeded"
    assert refused["error"]["param"] == "input"
    assert "102 tokens; body reads 64" in refused["error"]["message"]
    body = {"model": "body", "input": long, "truncate_prompt_tokens": -1}
    assert server.json("/v1/embeddings", body)[1]["usage"]["prompt_tokens"] == CONTEXT
    few = server.json("/v1/embeddings", body | {"truncate_prompt_tokens": 9})[1]["data"][0]["embedding"]
    mean = hidden(tiny("bert", head=False), ids_of(folders["body"], long, truncation=True, max_length=9)).mean(0)
    assert few == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=2e-5)


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (CHAT, chat() | {"model": "body"}, "model", "body is an encoder, which writes no text"),
        ("/v1/completions", {"model": "body", "prompt": "x"}, "model", "needs a model that writes.*here that is m$"),
        ("/v1/classify", {"model": "body", "input": "x"}, "model", "not trained to classify.*here that is m, intents"),
        ("/v1/classify", {"model": "m", "input": "x"}, "labels", "labels is missing"),
        ("/v1/classify", {"model": "intents", "input": "x", "labels": ["card", "no"]}, "labels", "to tell 'no'"),
        ("/v1/classify", {"model": "intents", "input": "x", "template": "{text}?"}, "template", "asked nothing"),
        (
            "/v1/embeddings",
            {"model": "m", "input": "x", "truncate_prompt_tokens": 3},
            "truncate_prompt_tokens",
            "whole",
        ),
        (
            "/v1/embeddings",
            {"model": "body", "input": "x", "truncate_prompt_tokens": 0},
            "truncate_prompt_tokens",
            "-1",
        ),
        ("/v1/embeddings", {"model": "body", "input": [9999]}, "input", "the model has 120 tokens"),
        (
            "/rerank",
            {"model": "body", "query": "x", "documents": ["x", "help " * 99]},
            "documents[1]",
            r"^documents\[1\] has \d+ tokens; body reads 64",
        ),
        ("/score", {"model": "body", "text_1": "x " * 99, "text_2": "x"}, "text_1", "^text_1 has"),
        ("/v1/embeddings", {"model": "bodies", "input": "x"}, "model", "beside the model itself body, intents, many"),
    ],
)
def test_what_a_model_does_not_do_is_refused(server: Server, path: str, body: Any, param: str, says: str) -> None:
    status, found = server.json(path, body)
    assert status == (404 if body["model"] == "bodies" else 400), found
    assert found["error"]["param"] == param
    assert re.search(says, found["error"]["message"]), found


def test_models_say_what_they_answer(server: Server, alone: Server) -> None:
    models = {one["id"]: one for one in server.json("/v1/models")[1]["data"]}
    assert list(models) == ["m", "body", "intents", "many", "causal", "rank"]
    assert CHAT in models["m"]["endpoints"] and CHAT not in models["intents"]["endpoints"]
    assert "/v1/classify" in models["intents"]["endpoints"] and "/v1/classify" not in models["body"]["endpoints"]
    assert models["intents"]["labels"] == list(LABELS.values()) and "labels" not in models["m"]
    assert server.json("/v1/models/intents")[1] == models["intents"]
    assert server.chat()[0] == 200 and server.json("/ready")[0] == alone.json("/health")[0] == 200
    (only,) = alone.json("/v1/models")[1]["data"]
    assert "/v1/classify" in only["endpoints"] and CHAT not in only["endpoints"]
    paths = alone.json("/openapi.json")[1]["paths"]
    assert CHAT not in paths and "/v1/classify" in paths
    assert alone.json(CHAT, chat())[1]["error"]["message"].endswith("none is served here")
    assert alone.json("/v1/classify", {"model": "m", "input": "help"})[0] == 200
    assert alone.ask("/")[0] == 200


def test_deadlines_and_figures(server: Server) -> None:
    text = "parcel " * 40
    late = server.json("/v1/embeddings", {"model": "body", "input": [text] * 500, "deadline_ms": 3})
    assert late[0] == 503 and late[1]["error"]["code"] == "deadline_unmeetable"
    assert late[1]["error"]["message"].startswith("the deadline of 3")
    assert late[1]["error"]["predicted_ms"] > 3
    header = {"X-Deadline-Ms": "0.01"}
    assert server.json("/v1/classify", {"model": "intents", "input": "help"}, header)[0] == 503
    status, found = server.json("/v1/classify", {"model": "intents", "input": "help", "deadline_ms": 60_000})
    assert status == 200 and found["timings"]["deadline_ms"] == 60_000 and found["timings"]["slack_ms"] > 0
    assert server.metric("requests_refused_total", model_name="body", reason="deadline_unmeetable") == 1
    assert server.metric("deadlines_met_total", model_name="intents") == 1
    assert server.metric("request_success_total", model_name="intents") > 0
    assert server.metric("engine_up") == 6 and server.metric("step_actual_seconds", model_name="body") > 0


def test_requests_at_once_are_each_answered_with_their_own(server: Server) -> None:
    texts = [f"{a} {b}" for a in ("parcel", "card", "loan") for b in ("late", "lost", "new", "help")]
    alone = [server.json("/v1/classify", {"model": "intents", "input": text})[1]["data"][0]["probs"] for text in texts]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = server.json("/v1/classify", {"model": "intents", "input": texts[i]})[1]["data"][0]["probs"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, probs in enumerate(alone):
        assert found[i] == pytest.approx(probs, abs=1e-5)


def test_an_encoder_that_dies_is_started_again_and_the_others_go_on(server: Server) -> None:
    victim = next(pid for pid in children(server.process.pid) if is_encoder(pid))
    os.kill(victim, signal.SIGKILL)
    assert server.chat()[0] == 200
    until(lambda: server.metric("engine_restarts_total") == 1 and server.json("/ready")[0] == 200)
    for name in ("body", "intents", "many"):
        assert server.json("/v1/embeddings", {"model": name, "input": "help"})[0] == 200


def children(pid: int) -> list[int]:
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def is_encoder(pid: int) -> bool:
    return b"millis.server.encoder_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_settings_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    def refused(*arguments: str, code: int = 1) -> str:
        return error_line(millis("serve", "--port", "0", *arguments), code)

    head, lm = str(folders["head"]), str(folders["lm"])
    assert "head is an encoder, for which --draft means nothing" in refused("-m", head, "--draft", lm).replace(
        head, "head"
    )
    assert "for which --max-sequences means nothing" in refused("-m", head, "--max-sequences", "3")
    assert "is no encoder; --encoder is for models that read" in refused("-m", lm, "--encoder", f"x={lm}")
    assert "two models are called 'a'" in refused("-m", lm, "--served-name", "a", "--encoder", f"a={head}")
    twice = ("--encoder", f"a={head}", "--encoder", f"a={head}")
    assert "--encoder names two models 'a'" in refused("-m", lm, *twice, code=2)
    assert "NAME=MODEL" in refused("-m", lm, "--encoder", "=x", code=2)
