"""Completions that begin with their prompt: what a model holds of it against transformers, over HTTP and in Python."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import millis
from gguf_files import DROP, HIDDEN, write_tiny
from millis import _native
from millis.models.load import read_checkpoint
from millis.server.api.echo import echo_of
from millis.tokenizer import Tokenizer, load_tokenizer
from millis.types import RequestError
from reference import next_logits, reference_model
from serving import Server, until
from tokenizer_tiny import bpe, spm

EXACT = ("--context", "512", "--precision", "exact", "--threads", "1")
TEXT = "hello wörld 你好, <|im_start|>hell"
BOS, END = 261, 263
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = bpe(add_bos_token=True) | {"tokenizer.ggml.scores": DROP, ".context_length": 512}
    size = len(keys["tokenizer.ggml.tokens"])
    found = tmp_path_factory.mktemp("echo") / "tiny.gguf"
    write_tiny(found, keys=keys, tensors={"token_embd.weight": (size, HIDDEN)})
    return found


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Server]:
    with Server(path, *EXACT) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(path))


def held(path: Path, ids: list[int]) -> np.ndarray:
    """[T, vocab] log-probabilities of the token behind each, by transformers."""
    logits = next_logits(reference_model(path), ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def ask(server: Server, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "m", "prompt": prompt, "echo": True, "logprobs": 3, "temperature": 0, "max_tokens": 0, **fields}
    status, answer = server.json(PATH, body)
    assert status == 200, answer
    found: list[dict[str, Any]] = answer["choices"]
    return found


def check(choice: dict[str, Any], ids: list[int], written: int, path: Path, tokenizer: Tokenizer, best: int) -> None:
    """All that `logprobs` says of a prompt and the tokens behind it, which transformers finds likeliest, too."""
    logs, found = held(path, ids), choice["logprobs"]
    tokens = [*ids]
    for _ in range(written):
        tokens.append(int(held(path, tokens)[-1].argmax()))
    logs = held(path, tokens)
    assert found["tokens"] == [shown(tokenizer, token) for token in tokens]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    want = [logs[i, token] for i, token in enumerate(tokens[1:])]
    assert found["token_logprobs"][1:] == pytest.approx(want, abs=2e-4)
    for row, token, value, top in zip(
        logs, tokens[1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=False
    ):
        likely = [int(one) for one in np.argsort(-row, kind="stable")[:best]]
        places = {shown(tokenizer, one): row[one] for one in (*likely, token)}
        assert top == pytest.approx(places, abs=2e-4)
        assert list(top)[:best] == [shown(tokenizer, one) for one in likely]
        assert top[shown(tokenizer, token)] == value
        assert (value == max(top.values())) is (token == likely[0])  # by which clients tell a greedy choice


def shown(tokenizer: Tokenizer, token: int) -> str:
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


# Over HTTP


@pytest.mark.parametrize("written", [0, 1, 4])
def test_each_place_of_a_prompt_is_what_transformers_finds(
    written: int, server: Server, path: Path, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT, parse_special=True)
    likely = [BOS, 7]  # goes on with what is likeliest itself
    for _ in range(6):
        likely.append(int(held(path, likely)[-1].argmax()))
    for prompts in ([TEXT, "A"], [ids, likely]):
        choices = ask(server, prompts, max_tokens=written, ignore_eos=True)
        for choice, prompt in zip(choices, prompts, strict=True):
            text = isinstance(prompt, str)
            check(choice, tokenizer.encode(prompt, parse_special=True) if text else prompt, written, path, tokenizer, 3)
            if text:
                assert choice["text"][: len(prompt)] == prompt
        assert choices[0]["text"].startswith(TEXT)
        assert [choice["index"] for choice in choices] == [0, 1]
        assert {choice["finish_reason"] for choice in choices} == {"length"}


def test_tokens_stand_where_they_begin_in_what_is_echoed(server: Server, tokenizer: Tokenizer) -> None:
    (choice,) = ask(server, TEXT, max_tokens=3, ignore_eos=True)
    ids, offsets = tokenizer.encode(TEXT, parse_special=True), choice["logprobs"]["text_offset"]
    assert len(offsets) == len(ids) + 3 and offsets == sorted(offsets)
    assert offsets[:2] == [0, 0]  # BOS is no text
    assert offsets[len(ids)] == len(TEXT)
    for token, at in zip(ids[1:], offsets[1:], strict=False):
        raw = tokenizer.token_bytes(token)
        if raw.isascii():
            assert TEXT[at : at + len(raw)] == raw.decode()
    (plain,) = ask(server, TEXT, max_tokens=3, ignore_eos=True, echo=False)
    assert choice["text"] == TEXT + plain["text"]
    assert [at - len(TEXT) for at in offsets[len(ids) :]] == plain["logprobs"]["text_offset"]


def test_a_stream_tells_the_same(server: Server) -> None:
    fields = {"model": "m", "prompt": [TEXT, "A"], "echo": True, "logprobs": 2, "temperature": 0, "n": 2}
    for more in ({"max_tokens": 0}, {"max_tokens": 4, "ignore_eos": True}, {"max_tokens": 0, "logprobs": None}):
        status, whole = server.json(PATH, fields | more)
        assert status == 200
        found: list[dict[str, Any]] = [{"text": "", "logprobs": None} for _ in range(4)]
        for event in server.stream(fields | more | {"stream": True}, PATH):
            for piece in event["choices"]:
                one = found[piece["index"]]
                one["text"] += piece["text"]
                if piece["logprobs"]:
                    before = one["logprobs"] or {name: [] for name in piece["logprobs"]}
                    one["logprobs"] = {name: before[name] + piece["logprobs"][name] for name in before}
        for one, choice in zip(found, whole["choices"], strict=True):
            assert one["text"] == choice["text"]
            assert (one["logprobs"] is None) is (choice["logprobs"] is None)
            for name, values in (choice["logprobs"] or {}).items():
                if name in ("tokens", "text_offset"):
                    assert one["logprobs"][name] == values


def test_the_token_that_ends_an_answer_has_its_place(server: Server, path: Path) -> None:
    """Clients that ask for one token drop the last place, whatever it is."""
    prompt = [BOS, 5, 6, 7]
    (choice,) = ask(server, prompt, max_tokens=1, logit_bias={str(END): 100})
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == 5
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(held(path, prompt)[-1][END], abs=2e-4)
    (plain,) = ask(server, prompt, max_tokens=1, logit_bias={str(END): 100}, echo=False)
    assert (plain["text"], plain["logprobs"]["tokens"]) == ("", [])


def test_vllms_prompt_logprobs_have_ranks(server: Server, path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, parse_special=True)
    logs = held(path, ids)
    for fields in ({"echo": False, "logprobs": None, "max_tokens": 2}, {"max_tokens": 0, "logprobs": 5}):
        (choice,) = ask(server, TEXT, prompt_logprobs=2, **fields)
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(ids) - 1
        for row, token, places in zip(logs, ids[1:], rest, strict=False):
            order = np.argsort(-row, kind="stable").tolist()
            assert list(places) == list(dict.fromkeys(map(str, [token, *order[:2]])))
            for one, place in places.items():
                assert place["logprob"] == pytest.approx(row[int(one)], abs=2e-4)
                assert place["rank"] == order.index(int(one)) + 1
                assert place["decoded_token"] == tokenizer.token_bytes(int(one)).decode(errors="replace")
        assert choice["text"].startswith(TEXT) is (fields["max_tokens"] == 0)


def test_what_is_computed_of_a_prompt_is_counted_once_and_gone_on_from(server: Server) -> None:
    prompt = list(range(40, 200))
    for n in (1, 2):
        body = {
            "model": "m",
            "prompt": prompt,
            "echo": True,
            "logprobs": 0,
            "max_tokens": 2,
            "ignore_eos": True,
            "n": n,
        }
        status, answer = server.json(PATH, body)
        assert status == 200
        assert answer["usage"]["prompt_tokens"] == 160 and answer["usage"]["completion_tokens"] == 2 * n
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert answer["timings"]["prefill_ms"] > 0
    status, answer = server.json(PATH, {"model": "m", "prompt": [*prompt, 5], "max_tokens": 1})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 159
    status, answer = server.json(PATH, {"model": "m", "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert answer["usage"]["total_tokens"] == 160 and answer["timings"]["steps"] >= 1


def test_an_echo_without_logprobs_is_text_alone(server: Server) -> None:
    (choice,) = ask(server, TEXT, logprobs=None, stop=["hello"], max_tokens=2, ignore_eos=True)
    assert choice["text"].startswith(TEXT) and choice["logprobs"] is None
    (choice,) = ask(server, [BOS, 104, 105, END], logprobs=None)
    assert (choice["text"], choice["finish_reason"]) == ("hi<|im_end|>", "length")
    (choice,) = ask(server, [7])
    assert choice["logprobs"]["token_logprobs"] == [None] and choice["logprobs"]["top_logprobs"] == [None]


def test_prompts_fill_the_context_and_no_more(server: Server, path: Path) -> None:
    ids = [BOS, *(i % 256 for i in range(511))]
    (choice,) = ask(server, ids)
    want = [row[token] for row, token in zip(held(path, ids), ids[1:], strict=False)]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(want, abs=5e-4)
    for fields in ({"max_tokens": 0, "prompt": [*ids, 1]}, {"max_tokens": 1, "prompt": ids}):
        status, answer = server.json(PATH, {"model": "m", "echo": True, "logprobs": 1, **fields})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == "prompt"


def test_what_is_too_much_or_too_late_is_refused(server: Server) -> None:
    many = {"model": "m", "echo": True, "logprobs": 1, "max_tokens": 0, "prompt": [[1] * 500] * 33, "n": 2}
    status, answer = server.json(PATH, many)
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "32768 tokens" in answer["error"]["message"]
    late = {"model": "m", "echo": True, "logprobs": 1, "prompt": [1] * 500}
    for tokens in (0, 1):
        status, answer = server.json(PATH, {**late, "max_tokens": tokens, "deadline_ms": 0.5})
        assert status == 503 and answer["error"]["code"] in ("deadline_unmeetable", "deadline_exceeded")
        status, answer = server.json(PATH, {**late, "max_tokens": tokens, "deadline_ms": 60_000})
        assert status == 200 and answer["timings"]["slack_ms"] > 0


def test_nothing_goes_on_for_a_client_that_has_gone(server: Server) -> None:
    prompt = [BOS, *(i % 256 for i in range(500))]
    body = {"model": "m", "echo": True, "logprobs": 5, "max_tokens": 1, "prompt": [prompt] * 64}
    with closing(server.connect()) as connection:
        connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
        until(lambda: server.metric("num_requests_in_flight") > 0)
    names = ("num_requests_active", "num_requests_in_flight", "num_requests_running", "num_requests_waiting")
    until(lambda: not any(server.metric(name) for name in names))
    assert server.metric("requests_failed_total", reason="client_gone") == 1


# In Python


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_token_logprobs_are_those_of_transformers(isa: str, path: Path) -> None:
    """In steps of a few tokens each, and on every ISA."""
    lm = millis.load(path, precision="exact", threads=2, isa=isa, max_batch_tokens=24)
    ids = lm.tokenizer.encode(TEXT * 3)
    logs = held(path, ids)
    found = lm.token_logprobs(TEXT * 3, best=4)
    assert [one.token for one in found] == ids[1:] and len(ids) > 72
    for row, one in zip(logs, found, strict=False):
        assert one.logprob == pytest.approx(row[one.token], abs=2e-4)
        assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:4].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=2e-4)
    assert math.fsum(one.logprob for one in found) == pytest.approx(lm.score(ids[:1], [ids[1:]])[0], abs=1e-3)
    assert lm.token_logprobs([5]) == []
    with pytest.raises(RequestError, match="best"):
        lm.token_logprobs("a", best=-1)


# The text alone


def test_a_prompt_is_shown_as_it_was_sent() -> None:
    """BOS and a space, which the tokenizer puts before a text, are no part of it; the same ids give the same text."""
    tokenizer = Tokenizer.from_gguf(spm(add_bos_token=True))
    for text, want in (("ab é", [0, 0, 2, 3]), ("中", [0, 0, 0])):
        ids = tokenizer.encode(text)
        sent, ours = echo_of(text, ids, tokenizer), echo_of(tuple(ids), ids, tokenizer)
        assert sent == ours and sent.text == text
        assert sent.offsets == want
    ids = tokenizer.encode("ab")
    assert echo_of(tuple(ids[1:]), ids[1:], tokenizer).text == "ab"
    assert echo_of("\U0001f600a", [*tokenizer.encode("\U0001f600"), 3 + 0x61], tokenizer).offsets[-5:] == [
        0,
        0,
        0,
        0,
        1,
    ]
