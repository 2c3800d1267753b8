"""Cascades over HTTP: whose answer is taken on engines that say what they are told to, then a real server with two."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anthropic
import openai
import pytest

from api_support import refused
from gguf_files import DROP, HIDDEN, write_tiny
from millis.config import ServerConfig
from millis.server.api.endpoints import ROUTES
from millis.server.api.job import Endpoint
from millis.server.cascading import Cascading
from millis.server.client import EngineClient, Lost, Mailbox
from millis.server.exchange import Answer
from millis.server.messages import EngineInfo, Failed, Refused, Stats, Submit, Tokens
from millis.server.metrics import Metrics
from millis.server.served import Model
from millis.server.service import Service
from millis.tasks.cascade import expected_tokens
from millis.tokenizer import Tokenizer
from millis.types import Timings, TokenLogprob
from serving import CHAT, Server, chat, until
from shell import error_line, millis
from tokenizer_tiny import bpe

TOKENIZER = Tokenizer.from_gguf(bpe())
EXACT = ("--precision", "exact", "--threads", "1")
Script = Callable[[Submit], list[Any]]


class Engine:
    """A client whose process answers as the script says; no script: it is starting again."""

    def __init__(self, script: Script | None) -> None:
        self.script, self.ready = script, script is not None
        self.asked: list[Submit] = []
        self.cancelled: list[int] = []
        self.info = EngineInfo(
            path="", context=256, vocab=266, threads=1, isa="scalar", weight_bytes=0, load_s=0.0, warm_s=0.0
        )
        self.stats = Stats(at_s=0.0)
        self.adapters: dict[str, str] = {}
        self.delivery_s, self.in_flight, self.restarts = 0.0, 0, 0

    def number(self) -> int:
        return len(self.asked) + 1

    def submit(self, work: Submit, mailbox: Mailbox) -> None:
        self.asked.append(work)
        assert self.script is not None
        for i, reply in enumerate(self.script(work)):
            asyncio.get_running_loop().call_later(i / 100, mailbox.put, reply)

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)


def says(text: str, *, sure: float = 0.5, reason: Any = "stop") -> Script:
    """An answer with so sure tokens."""
    ids = TOKENIZER.encode(text)

    def script(work: Submit) -> list[Any]:
        logprobs = tuple(TokenLogprob(token, math.log(sure)) for token in ids)
        timings = Timings(prompt_tokens=len(work.prompt), completion_tokens=len(ids))
        wanted = None if work.params.logprobs is None else logprobs
        return [
            Tokens(work.id, tuple(ids[:-1]), wanted and wanted[:-1]),
            Tokens(work.id, (ids[-1],), wanted and wanted[-1:], reason, timings),
        ]

    return script


def begins(work: Submit) -> list[Any]:
    """An answer that goes on and on."""
    return [Tokens(work.id, (97,), None if work.params.logprobs is None else (TokenLogprob(97, -1.0),))]


def silent(work: Submit) -> list[Any]:
    return []


def gives(*replies: Any) -> Script:
    return lambda work: list(replies)


def asked(
    scripts: dict[str, Script | None], body: dict[str, Any], endpoint: Endpoint = "completions"
) -> tuple[int, dict[str, Any], dict[str, Engine], str]:
    """Status and body of the answer of a service whose engines follow scripts, these engines, and the figures."""
    status, data, engines, figures = sent(scripts, body, endpoint)
    return status, json.loads(data), engines, figures


def sent(
    scripts: dict[str, Script | None], body: dict[str, Any], endpoint: Endpoint
) -> tuple[int, bytes, dict[str, Engine], str]:
    """As `asked`, the body as it was sent."""
    engines = {name: Engine(script) for name, script in scripts.items()}
    models: list[Model] = []
    for name, engine in engines.items():
        metrics = Metrics(name, models[0].metrics if models else None)
        models.append(Model(name, Path(name), cast(EngineClient, engine), metrics))
        models[-1].tokenizer = TOKENIZER
    service = Service(ServerConfig(), models)
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"tenant": "", "request_id": "1", "path": ROUTES[endpoint].path, "headers": []}
    asyncio.run(Cascading(service, endpoint, scope, send).run(receive))
    service.close()
    data = b"".join(message["body"] for message in messages[1:])
    return messages[0]["status"], data, engines, service.metrics_text().decode()


def events(data: bytes) -> list[dict[str, Any]]:
    """What the events of a stream hold."""
    return [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]


SAY = [{"role": "user", "content": "hi"}]
BODIES: dict[Endpoint, dict[str, Any]] = {
    "completions": {"prompt": "hi"},
    "chat": {"messages": SAY, "stream_options": {"include_usage": True}},
    "responses": {"input": "hi"},
    "messages": {"messages": SAY, "max_tokens": 40},
}
BODY = {"models": ["small", "large"], "prompt": "hi", "max_tokens": 40}


@pytest.mark.parametrize(
    ("large", "fields", "why"),
    [
        (says("hello there"), {}, "replaced"),
        (says("hello there"), {"confidence": 0.5}, "confident"),
        (says("hello there"), {"confidence": 0.51}, "replaced"),
        (gives(Refused(1, "deadline_unmeetable", "…", 9.0, 1.0)), {"deadline_ms": 5000}, "no time"),
        (says("hello", reason="deadline"), {"deadline_ms": 5000}, "not whole"),
        (gives(Lost(1, "engine_restarted", "…")), {}, "failed"),
        (gives(Lost(1, "request_poisoned", "…", False)), {}, "failed"),
        (gives(Failed(1, "…")), {}, "failed"),
        (gives(Refused(1, "overloaded", "…", None, 1.0)), {}, "failed"),
        (None, {}, "failed"),
        (silent, {"deadline_ms": 120}, "not whole"),
        (begins, {"deadline_ms": 120}, "not whole"),
        (begins, {"deadline_ms": 120, "structured_outputs": {"regex": "a+"}}, "not whole"),
        (begins, {"deadline_ms": 120, "on_deadline": "fallback", "fallback": "wait"}, "not whole"),
    ],
)
def test_the_larger_answer_is_taken_where_it_came_whole(large: Script | None, fields: dict[str, Any], why: str) -> None:
    status, answer, engines, figures = asked({"small": says("hell"), "large": large}, BODY | fields)
    name, text = ("large", "hello there") if why == "replaced" else ("small", "hell")
    assert status == 200, answer
    assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
    timings = answer["timings"]
    assert (timings["model"], timings["why"], timings["confidence"]) == (name, why, 0.5)
    asked_models = ["small"] if why in ("confident", "no time") else ["small", "large"]
    assert [one for one, _ in timings["model_ms"]] == asked_models
    assert timings["total_ms"] >= sum(ms for _, ms in timings["model_ms"]) - 0.01
    if "deadline_ms" in fields:
        assert timings["slack_ms"] == pytest.approx(fields["deadline_ms"] - timings["total_ms"], abs=0.01)
    assert answer["choices"][0]["logprobs"] is None  # which only the server wanted
    assert answer["usage"]["completion_tokens"] == len(TOKENIZER.encode(text))
    if engines["large"].asked:
        (work,) = engines["large"].asked
        assert work.minimum_tokens == expected_tokens(len(TOKENIZER.encode("hell"))) and work.params.logprobs is None
        assert work.deadline_s == engines["small"].asked[0].deadline_s
        assert large not in (silent, begins) or engines["large"].cancelled[:1] == [1]
    finished = 'millis:request_success_total{finished_reason="stop",model_name="%s"} 1.0'
    assert finished % "small" in figures and (finished % "large" in figures) == (why == "replaced")
    failures = 'requests_failed_total{model_name="large"', 'requests_refused_total{model_name="large"'
    assert sum(figures.count(one) for one in failures) == (
        why in ("no time", "not whole") or bool(large and why == "failed")
    )


def test_one_timer_watches_the_deadline_of_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    watch = Cascading.watch_deadline
    monkeypatch.setattr(Answer, "watch_deadline", lambda self, job: watched.append(self) or watch(self, job))
    _, answer, _, _ = asked({"small": says("a"), "large": silent}, BODY | {"deadline_ms": 120})
    assert answer["timings"]["why"] == "not whole" and len(watched) == 1
    scripts = {"small": says("a", reason="deadline"), "large": says("b")}
    _, answer, engines, _ = asked(scripts, BODY | {"deadline_ms": 5000})
    assert (answer["model"], answer["timings"]["why"]) == ("small", "no time") and not engines["large"].asked


def test_every_model_of_three_may_be_the_one_that_is_sure_enough() -> None:
    scripts: dict[str, Script | None] = {"a": says("x", sure=0.1), "b": says("y", sure=0.95), "c": says("z", sure=0.99)}
    body = BODY | {"models": ["a", "b", "c"]}
    _, answer, engines, _ = asked(scripts, body)
    assert (answer["model"], answer["timings"]["why"], answer["timings"]["confidence"]) == ("b", "confident", 0.1)
    assert not engines["c"].asked
    _, answer, _, _ = asked(scripts, body | {"confidence": 1})
    assert (answer["model"], answer["choices"][0]["text"], answer["timings"]["why"]) == ("c", "z", "replaced")


def test_log_probabilities_are_those_of_the_answer_that_is_taken() -> None:
    _, answer, engines, _ = asked({"small": says("a"), "large": says("b", sure=0.25)}, BODY | {"logprobs": 0})
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [pytest.approx(math.log(0.25))]
    assert engines["large"].asked[0].params.logprobs == 0


def test_the_first_model_decides_whether_a_request_is_refused() -> None:
    late = Refused(1, "deadline_unmeetable", "it would be late", 9.0, 1.0)
    status, answer, engines, figures = asked({"small": gives(late), "large": says("b")}, BODY | {"deadline_ms": 5000})
    assert (status, answer["error"]["code"], answer["error"]["predicted_ms"]) == (503, "deadline_unmeetable", 9.0)
    assert not engines["large"].asked
    assert 'requests_refused_total{model_name="small",reason="deadline_unmeetable"} 1.0' in figures
    status, answer, _, _ = asked({"small": says("a"), "large": says("b")}, BODY | {"models": ["small", "huge"]})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (404, "models", "model_not_found")
    status, answer, _, _ = asked({"small": says("a"), "large": says("b")}, {**BODY, "models": None, "model": "large"})
    assert (answer["model"], answer["choices"][0]["text"]) == ("large", "b") and "why" not in answer["timings"]


def whole_of(endpoint: Endpoint, answer: dict[str, Any]) -> str:
    if endpoint == "completions":
        return str(answer["choices"][0]["text"])
    if endpoint == "chat":
        return str(answer["choices"][0]["message"]["content"])
    content = answer["output"][0]["content"] if endpoint == "responses" else answer["content"]
    return str(content[0]["text"])


def streamed_of(endpoint: Endpoint, found: list[dict[str, Any]]) -> str:
    if endpoint == "completions":
        return "".join(choice["text"] for event in found for choice in event["choices"])
    if endpoint == "chat":
        return "".join(choice["delta"].get("content", "") for event in found for choice in event["choices"])
    if endpoint == "responses":
        return "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    return "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize(
    ("large", "fields", "why"),
    [
        (says("hello there"), {}, "replaced"),
        (says("hello there"), {"confidence": 0.5}, "confident"),
        (says("hello", reason="deadline"), {"deadline_ms": 5000}, "not whole"),
        (gives(Lost(1, "engine_restarted", "…")), {}, "failed"),
        (None, {}, "failed"),
    ],
)
def test_streams_say_what_whole_answers_say(
    endpoint: Endpoint, large: Script | None, fields: dict[str, Any], why: str
) -> None:
    scripts = {"small": says("hell"), "large": large}
    body = {"models": ["small", "large"], **BODIES[endpoint], **fields}
    _, answer, _, _ = asked(scripts, {**body, "stream_options": None} if endpoint == "chat" else body, endpoint)
    status, data, _, figures = sent(scripts, body | {"stream": True}, endpoint)
    name, text = ("large", "hello there") if why == "replaced" else ("small", "hell")
    assert (status, answer["model"], whole_of(endpoint, answer)) == (200, name, text)
    found = events(data)
    assert streamed_of(endpoint, found) == text
    last = found[-1].get("response", found[-1])
    for timings in (answer["timings"], last["timings"]):
        assert (timings["model"], timings["why"], timings["confidence"]) == (name, why, 0.5)
        assert [one for one, _ in timings["model_ms"]] == (["small"] if why == "confident" else ["small", "large"])
    if endpoint == "chat":
        assert found[0]["choices"][0]["delta"]["role"] == "assistant" and found[0]["model"] == "small"
        assert {event["model"] for event in found[1:]} == {name} and len({event["created"] for event in found}) == 1
        assert found[-1]["usage"] == answer["usage"] and found[-2]["timings"] == last["timings"]
    elif endpoint == "completions":
        assert {event["model"] for event in found} == {name}
    elif endpoint == "responses":
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert found[0]["response"]["model"] == last["model"] == name
        assert last["output"][0]["content"][0]["logprobs"] == answer["output"][0]["content"][0]["logprobs"] == []
    else:
        assert found[0]["message"]["model"] == name
        assert found[-2]["usage"] == answer["usage"]
    finished = 'millis:request_success_total{finished_reason="stop",model_name="%s"} 1.0'
    assert finished % "small" in figures and (finished % "large" in figures) == (why == "replaced")


def test_a_fallback_stands_alone_in_a_stream() -> None:
    late = {"deadline_ms": 5000, "on_deadline": "fallback", "fallback": "wait", "stream": True}
    scripts: dict[str, Script | None] = {"small": says("hell", reason="deadline"), "large": None}
    for endpoint, body in BODIES.items():
        _, data, _, _ = sent(scripts, {"models": ["small", "large"], **body, **late}, endpoint)
        assert streamed_of(endpoint, events(data)) == "wait"


def test_log_probabilities_of_streams_are_those_of_the_answer_that_is_taken() -> None:
    scripts: dict[str, Script | None] = {"small": says("a"), "large": says("b", sure=0.25)}
    told = {"include": ["message.output_text.logprobs"], "stream": True}
    _, data, _, _ = sent(scripts, {"models": ["small", "large"], **BODIES["responses"], **told}, "responses")
    (place,) = events(data)[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert place["token"] == "b" and place["logprob"] == pytest.approx(math.log(0.25))


@pytest.mark.parametrize("endpoint", BODIES)
def test_streams_fail_as_their_api_has_it(endpoint: Endpoint) -> None:
    body = {"models": ["small", "large"], **BODIES[endpoint], "stream": True}
    refusal = gives(Refused(1, "deadline_unmeetable", "it would be late", 9.0, 1.0))
    status, data, engines, _ = sent({"small": refusal, "large": says("b")}, body | {"deadline_ms": 5000}, endpoint)
    error = json.loads(data)
    assert status == 503 and "it would be late" in error["error"]["message"] and not engines["large"].asked
    assert error.get("type") == ("error" if endpoint == "messages" else None)

    def dies(work: Submit) -> list[Any]:
        return [*begins(work), Lost(1, "engine_restarted", "it starts again")]

    status, data, _, _ = sent({"small": dies, "large": says("b")}, body, endpoint)
    *before, error = events(data)
    assert status == 200 and len(before) == (endpoint == "chat")
    assert error.get("error", error)["message"] == "it starts again"
    assert error.get("type") == ("error" if endpoint in ("responses", "messages") else None)


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"model": "b"}, "model", "must be the first of models"),
        ({"models": ["smollm2"]}, "models", "at least 2"),
        ({"models": ["smollm2", "smollm2"]}, "models", "one model twice"),
        ({"models": None, "model": None}, "model", "model is missing"),
        ({"models": None, "confidence": 0.5}, "confidence", "needs models"),
        ({"confidence": 1.5}, "confidence", "less than or equal to 1"),
        ({"n": 2}, "n", "one answer"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "in another model"),
        ({"echo": True}, "echo", "not what several do"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "not what several do"),
        ({"prompt": [1, 2]}, "prompt", "one text"),
        ({"prompt": ["a", "b"]}, "prompt", "one text"),
    ],
)
def test_what_several_models_do_not_do_is_refused_by_name(fields: dict[str, Any], param: str, part: str) -> None:
    error = refused("completions", **{"models": ["smollm2", "b"], **fields})
    assert error.param == param and part in error.message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cascade")
    vocabulary = bpe() | {"tokenizer.ggml.scores": DROP, ".context_length": 256}
    tensors = {"token_embd.weight": (len(vocabulary["tokenizer.ggml.tokens"]), HIDDEN)}
    for seed, name in enumerate(("small", "big")):
        write_tiny(root / f"{name}.gguf", keys=vocabulary, tensors=tensors, seed=seed)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(folder / "small.gguf", *EXACT, f"--larger=big={folder / 'big.gguf'}") as running:
        yield running


def test_a_server_answers_with_either_model_or_both(server: Server) -> None:
    assert server.facts["larger"] == ["big"]
    listed = server.json("/v1/models")[1]["data"]
    assert [one["id"] for one in listed] == ["m", "big"] and CHAT in listed[1]["endpoints"]
    texts = {name: server.json(CHAT, chat(model=name))[1]["choices"][0]["message"]["content"] for name in ("m", "big")}
    assert texts["m"] != texts["big"]
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as client:
        fields: Any = {**chat(), "extra_body": {"models": ["m", "big"], "confidence": 1, "deadline_ms": 20_000}}
        both = client.chat.completions.create(**fields)
    assert (both.model, both.choices[0].message.content) == ("big", texts["big"])
    timings: Any = both.model_extra and both.model_extra["timings"]
    assert timings["why"] == "replaced" and 0 < timings["confidence"] < 1 and timings["slack_ms"] > 0
    sure = server.json(CHAT, chat(models=["m", "big"], confidence=timings["confidence"] / 2))[1]
    assert (sure["model"], sure["choices"][0]["message"]["content"]) == ("m", texts["m"])
    status, error = server.json(CHAT, chat(models=["m", "big"], deadline_ms=0.01))
    assert (status, error["error"]["code"]) == (503, "deadline_unmeetable")
    schemas = server.json("/openapi.json")[1]["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "ResponseRequest", "MessagesRequest"):
        written = schemas[name]["properties"]
        assert written["model"]["enum"] == written["models"]["anyOf"][0]["items"]["enum"] == ["m", "big"]


def test_the_official_clients_read_streams(server: Server) -> None:
    text = server.json(CHAT, chat(model="big"))[1]["choices"][0]["message"]["content"]
    both = {"models": ["m", "big"], "confidence": 1}
    say: Any = chat()["messages"]
    fields: Any = {"model": "m", "temperature": 0, "extra_body": both}
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as client:
        usage: Any = {"include_usage": True}
        with client.chat.completions.stream(**fields, messages=say, max_tokens=8, stream_options=usage) as chunks:
            seen = list(chunks)
        assert "".join(event.delta for event in seen if event.type == "content.delta") == text
        *_, last = (event.chunk for event in seen if event.type == "chunk")
        extra: Any = last.model_extra
        assert (last.model, extra["timings"]["model"], extra["timings"]["why"]) == ("big", "big", "replaced")
        assert last.usage is not None and last.usage.completion_tokens == extra["timings"]["completion_tokens"]
        plain: Any = client.completions.create(**fields, prompt="hi", stream=True)
        whole: Any = client.completions.create(**fields, prompt="hi")
        assert "".join(chunk.choices[0].text for chunk in plain) == whole.choices[0].text and whole.model == "big"
        with client.responses.stream(**fields, input="Say hello.", max_output_tokens=8) as parts:
            heard: list[Any] = list(parts)
        pieces = "".join(event.delta for event in heard if event.type == "response.output_text.delta")
        assert pieces == heard[-1].response.output_text == text and heard[-1].response.model == "big"
        assert client.responses.create(**fields, input="Say hello.", max_output_tokens=8).output_text == text
    with anthropic.Anthropic(base_url=server.facts["url"], api_key="none") as other:
        greedy: Any = {"model": "m", "messages": say, "max_tokens": 8, "extra_body": {"temperature": 0, **both}}
        with other.messages.stream(**greedy) as stream:
            pieces = "".join(stream.text_stream)
            message = stream.get_final_message()
        assert pieces == text and message.model == "big"
        said: Any = other.messages.create(**greedy)
        assert (said.content[0].text, said.model, said.timings["why"]) == (text, "big", "replaced")
        with pytest.raises(anthropic.NotFoundError, match="huge"):
            other.messages.create(**greedy | {"extra_body": {"models": ["m", "huge"]}})


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_reader_who_leaves_frees_both_models(server: Server, folder: Path, path: str) -> None:
    body = {"models": ["m", "big"], "confidence": 1, "stream": True}
    body |= {"prompt": "hi"} if path == "/v1/completions" else {"input": "hi"} if path == "/v1/responses" else {}
    body |= {"messages": SAY, "max_tokens": 9} if path in (CHAT, "/v1/messages") else {}
    pids = {name: engine(server, folder / file) for name, file in (("m", "small.gguf"), ("big", "big.gguf"))}
    for name, pid in pids.items():  # at whose answer the client leaves
        os.kill(pid, signal.SIGSTOP)
        with server.raw() as connection:
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            until(lambda name=name: server.metric("num_requests_in_flight", model_name=name) == 1)  # type: ignore[misc]
            if path == CHAT and name == "big":
                connection.settimeout(10)
                assert b"assistant" in connection.recv(1 << 16)
        until(lambda: server.metric("num_requests_in_flight") == 0)
        os.kill(pid, signal.SIGCONT)
    assert server.json(CHAT, chat(models=["m", "big"], confidence=1))[1]["timings"]["why"] == "replaced"


def engine(server: Server, model: Path) -> int:
    """The process that has a model's file."""
    (found,) = (pid for pid in server.workers() if str(model) in Path(f"/proc/{pid}/maps").read_text())
    return found


def test_a_larger_engine_that_hangs_or_dies_takes_no_answer_along(server: Server, folder: Path) -> None:
    larger = engine(server, folder / "big.gguf")
    body = chat(models=["m", "big"], confidence=1)
    os.kill(larger, signal.SIGSTOP)
    status, answer = server.json(CHAT, {**body, "deadline_ms": 500})
    assert (status, answer["model"], answer["timings"]["why"]) == (200, "m", "not whole")
    assert answer["timings"]["slack_ms"] > -100  # how late the machine may be
    found: list[tuple[int, Any]] = []
    other = chat("Say no.", models=["m", "big"], confidence=1)  # one that kills two processes would be refused
    streamed: list[Any] = []
    asking = [
        threading.Thread(target=lambda: found.append(server.json(CHAT, body))),
        threading.Thread(target=lambda: streamed.extend(server.stream({**other, "stream": True}))),
    ]
    for each in asking:
        each.start()
    until(lambda: server.metric("num_requests_in_flight", model_name="big") == 2)
    os.kill(larger, signal.SIGKILL)
    for each in asking:
        each.join()
    ((status, answer),) = found
    assert (status, answer["model"], answer["timings"]["why"]) == (200, "m", "failed")
    assert (streamed[-1]["model"], streamed[-1]["timings"]["why"]) == ("m", "failed")
    alone = server.json(CHAT, {**other, "model": "m", "models": None, "confidence": None})[1]
    assert streamed_of("chat", streamed) == alone["choices"][0]["message"]["content"]
    until(lambda: server.metric("engine_restarts_total", model_name="big") == 1 and server.json("/ready")[0] == 200)
    assert server.json(CHAT, body)[1]["timings"]["why"] == "replaced"
    assert server.metric("engine_restarts_total", model_name="m") == 0
    assert server.metric("requests_failed_total", model_name="big", reason="engine_restarted") == 2


def test_settings_that_do_not_fit_are_refused(folder: Path) -> None:
    def told(*arguments: str, code: int = 1) -> str:
        return error_line(millis("serve", "--port", "0", "-m", str(folder / "small.gguf"), *arguments), code)

    big = folder / "big.gguf"
    assert "two models are called 'a'" in told("--served-name", "a", "--larger", f"a={big}")
    assert "--larger names two models 'a'" in told("--larger", f"a={big}", "--larger", f"a={big}", code=2)
    assert "give --larger as MODEL or NAME=MODEL" in told("--larger", "=x", code=2)
