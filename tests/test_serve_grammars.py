"""Grammars under `millis serve`: who waits while they are compiled, what is given up, what clients are told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grammars import record
from millis.engine.adapters import Adapters
from millis.engine.grammar import GrammarCompiler, Matcher
from millis.server.messages import Batch, Cancel, Embed, Failed, Refused, Stats, Submit
from millis.server.worker import Worker
from millis.types import Grammar, GrammarError, SamplingParams
from serving import CHAT, LIMIT_S, QUICK, Server, chat, until
from test_constrained import Characters, engine

PEOPLE = record(old={"type": "boolean"})


# The engine process, on a fake model


class Gated(GrammarCompiler):
    """Compiles each grammar when it is let through, and says which it was asked for."""

    def __init__(self) -> None:
        super().__init__(Characters())
        self.asked: list[str] = []
        self.gate = threading.Semaphore(0)

    def compile(self, grammar: Grammar) -> Matcher:
        if not self.ready(grammar):
            self.asked.append(grammar.source)
            assert self.gate.acquire(timeout=LIMIT_S)
        if grammar.source == "broken":
            raise RuntimeError("an error that nobody foresaw")
        return super().compile(grammar)


class Desk:
    """A worker, and what it said."""

    def __init__(self, most: int = 100) -> None:
        self.grammars, self.sent = Gated(), list[Any]()
        tokenizer = SimpleNamespace(vocab_size=0, eos=Characters.eos, control=Characters.control, token_bytes=None)
        made = engine()
        made.grammars = self.grammars.compile
        adapters = Adapters(lambda path: None, lambda weights: None, 1)  # type: ignore[arg-type, return-value]
        config = SimpleNamespace(max_waiting=most)
        parts = {"engine": made, "tokenizer": tokenizer, "grammars": self.grammars, "adapters": adapters}
        self.worker = Worker(SimpleNamespace(**parts, config=config), self)  # type: ignore[arg-type]
        self.engine = made

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def submit(self, number: int, pattern: str, tenant: str = "", **more: Any) -> None:
        params = SamplingParams(grammar=Grammar("regex", pattern), max_tokens=30)
        work = Submit(id=number, prompt=(5, 6), params=params, arrival_s=time.monotonic(), tenant=tenant, **more)
        self.worker.take(work)

    def let(self, count: int) -> None:
        """So many are compiled."""
        self.grammars.gate.release(count)

    def said(self, kind: type[Any]) -> list[Any]:
        return [item for batch in self.sent if isinstance(batch, Batch) for item in batch.items if type(item) is kind]

    def stats(self) -> Stats:
        self.worker._send_stats()
        return next(message for message in reversed(self.sent) if isinstance(message, Stats))


def test_what_was_cancelled_is_not_compiled() -> None:
    desk = Desk()
    for number in range(20):
        desk.submit(number, f"a{{{number + 2}}}")
    until(lambda: len(desk.grammars.asked) == 1)
    assert (desk.stats().waiting, desk.stats().unprepared) == (19, 19)
    desk.submit(20, "innocent")
    for number in range(20):
        desk.worker.take(Cancel(number))
    assert desk.stats().unprepared == 1
    desk.let(2)
    until(lambda: 20 in desk.worker._table)
    assert desk.grammars.asked == ["a{2}", "innocent"]
    until(lambda: desk.worker._preparing is None)
    load = desk.engine.load()
    assert (load.running + load.waiting, load.free_pages) == (0, load.pages)  # "innocent" was forced, the first dropped


def test_texts_that_were_cancelled_are_not_read() -> None:
    desk = Desk()
    for number in (1, 2):
        desk.worker.take(Embed(id=number, prompts=((5,),), arrival_s=time.monotonic()))
    desk.worker.take(Cancel(1))
    assert [job.id for job in desk.worker._embeds] == [2]


def test_tenants_take_turns() -> None:
    desk = Desk()
    for number in range(5):
        desk.submit(number, f"a{{{number + 2}}}", "flood")
    desk.submit(5, "b", "guest")
    desk.let(6)
    until(lambda: len(desk.grammars.asked) == 6)
    assert desk.grammars.asked[:4] == ["a{2}", "a{3}", "b", "a{4}"]


def test_a_grammar_that_is_kept_waits_for_nobody() -> None:
    desk = Desk()
    desk.submit(1, "known")
    desk.let(1)
    until(lambda: 1 in desk.worker._table)
    desk.submit(2, "slow")
    until(lambda: len(desk.grammars.asked) == 2)
    desk.submit(3, "known")
    assert 3 in desk.worker._table and 2 not in desk.worker._table
    desk.let(1)


def test_too_many_are_refused_and_late_ones_are_not_compiled() -> None:
    desk = Desk(most=2)
    for number in range(4):
        desk.submit(number, f"a{{{number + 2}}}", deadline_s=time.monotonic() + 1e-6 if number == 1 else None)
        until(lambda: len(desk.grammars.asked) == 1)
    (full,) = desk.said(Refused)
    assert (full.id, full.kind) == (3, "overloaded")
    desk.let(2)
    until(lambda: desk.stats().compiled == 2)
    assert desk.grammars.asked == ["a{2}", "a{4}"]
    assert [(reply.id, reply.kind) for reply in desk.said(Refused)][1:] == [(1, "deadline_unmeetable")]


def test_failures_of_grammars_are_the_clients_and_all_others_are_ours() -> None:
    desk = Desk()
    desk.grammars.gate.release(10)
    desk.submit(1, "(")
    desk.submit(2, "broken")
    desk.submit(3, "[a-z]{20}")
    until(lambda: 3 in desk.worker._table)
    (refused,), (failed,) = desk.said(Refused), desk.said(Failed)
    assert (refused.id, refused.kind) == (1, "invalid_grammar") and "unclosed group" in refused.message
    assert (failed.id, failed.code, failed.message) == (2, "failed", "RuntimeError")
    request = desk.worker._table[3]
    assert request.constraint is not None
    desk.engine.step()
    request.constraint.error = GrammarError("too many states")
    while request.finish_reason is None:
        desk.engine.step()
    desk.worker._hand_out()
    assert desk.said(Failed)[1:] == [Failed(3, "too many states", "invalid_grammar")]


# The server


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2"), *QUICK) as running:
        yield running


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


def test_clients_that_left_hold_up_nobody(server: Server) -> None:
    before = server.metric("grammars_compiled_total")
    gone = []
    for i in range(40):
        schema = record(old={"type": "string", "minLength": 100_000 + i})
        body = json.dumps(chat(**form(schema))).encode()
        gone.append(server.raw())
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        gone[-1].sendall(head.encode() + body)
    until(lambda: server.metric("num_requests_unprepared") >= 5)
    status, answer = server.chat(**form(PEOPLE), deadline_ms=200)
    assert status == 503 and answer["error"]["code"] == "deadline_unmeetable"
    assert "grammar" in answer["error"]["message"] and answer["error"]["predicted_ms"] >= 199
    for connection in gone:
        connection.close()
    status, answer = server.chat(**form(PEOPLE))
    assert status == 200 and set(json.loads(answer["choices"][0]["message"]["content"])) == {"old"}
    assert server.metric("grammars_compiled_total") - before < 40
    until(lambda: server.metric("num_requests_in_flight") == server.metric("num_requests_unprepared") == 0)


def test_a_pattern_that_is_given_up_on_the_way_is_the_clients_error(server: Server) -> None:
    asked = {"structured_outputs": {"regex": ".*a.{240}b"}, "max_tokens": 250}
    status, answer = server.chat("Write a long story.", **asked)
    assert status == 400, answer
    *_, last = server.stream(chat("Write a long story.", **asked, stream=True))
    for error in (answer["error"], last["error"]):
        assert (error["code"], error["param"]) == ("invalid_grammar", "structured_outputs")
        assert "too many" in error["message"]
    assert server.metric("requests_failed_total", reason="invalid_grammar") == 2
    assert server.metric("num_requests_in_flight") == 0
    until(lambda: server.metric("num_requests_running") == 0)  # the engine tells what it holds a moment later


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    """A tool whose calls keep to its parameters."""
    return {"type": "function", "function": {"name": f"f{len(parameters)}", "parameters": parameters, "strict": True}}


NUMBER = tool({"type": "object", "properties": {"n": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (form({"type": "string", "pattern": "("}), "response_format", "unclosed group"),
        (form({"$ref": "#"}), "response_format", "$ref"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs", "unclosed character class"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"uniqueItems": True}}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
            "tools[0].function.parameters: schema.uniqueItems",
        ),
        ({"tools": [NUMBER, tool({"$ref": "#/x"})]}, "tools[1].function.parameters", "Pointer '/x' does not exist"),
        ({"tools": [NUMBER], **form({"type": "string", "pattern": "("})}, "response_format", "unclosed group"),
        ({"structured_outputs": {"grammar": 'start: answer\nanswer: %json {"type": "x"}'}}, "structured_outputs", "x"),
    ],
)
def test_errors_of_grammars_name_the_field_and_the_reason(
    fields: dict[str, Any], param: str, reason: str, server: Server
) -> None:
    status, answer = server.chat(**fields)
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "invalid_grammar", param)
    assert reason in error["message"]
