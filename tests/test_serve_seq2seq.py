"""Encoder-decoder models over HTTP: answers of the library, whose turn it is, deadlines, refusals, a crash."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import openai
import pytest

import millis
from gguf_files import write_tiny
from millis.server.messages import Batch, Cancel, Refused, Stats, Submit, Tokens
from millis.server.process import Line
from millis.server.seq2seq_worker import Worker
from millis.types import Priority, SamplingParams
from seq2seqs import CONTEXT, LINES, VOCAB, add_tokenizer, save, tiny
from serving import CHAT, Server, chat, until
from shell import error_line
from shell import millis as shell

EXACT = ("--precision", "exact", "--threads", "1")
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that searches with three beams for an answer of at most 19 tokens."""
    model = tiny("marian", seed=1)
    model.generation_config.forced_eos_token_id = None
    model.generation_config.update(num_beams=3, max_length=20, eos_token_id=[0, *range(7, VOCAB, 9)])
    return add_tokenizer(save(model, tmp_path_factory.mktemp("seq2seq") / "marian"), "marian")


@pytest.fixture(scope="module")
def lm(folder: Path) -> millis.Seq2Seq:
    return millis.Seq2Seq(folder, threads=1, precision="exact")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(folder, *EXACT) as running:
        yield running


def test_answers_are_those_of_the_library(server: Server, lm: millis.Seq2Seq) -> None:
    wanted = lm.generate(LINES)
    assert len({one.text for one in wanted}) > 2
    status, found = server.json(COMPLETIONS, {"model": "m", "prompt": list(LINES)})
    assert status == 200, found
    assert [one["text"] for one in found["choices"]] == [one.text for one in wanted]
    assert [one["finish_reason"] for one in found["choices"]] == [one.finish_reason for one in wanted]
    assert found["usage"]["completion_tokens"] == sum(len(one.tokens) for one in wanted)
    assert found["usage"]["prompt_tokens"] == sum(one.timings.prompt_tokens for one in wanted)
    for options in ({"max_tokens": 5}, {"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.5}):
        body = {"model": "m", "prompt": LINES[1], **options}
        assert server.json(COMPLETIONS, body)[1]["choices"][0]["text"] == lm.generate(LINES[1], **options).text
    longest = server.json(COMPLETIONS, {"model": "m", "prompt": "a", "max_tokens": 10**6})
    assert longest[0] == 200 and longest[1]["usage"]["completion_tokens"] <= CONTEXT


def test_a_chats_last_message_is_the_text(server: Server, lm: millis.Seq2Seq) -> None:
    said = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": LINES[0]},
    ]
    with openai.OpenAI(base_url=f"{server.facts['url']}/v1", api_key="none") as client:
        messages: Any = said
        whole = client.chat.completions.create(model="m", messages=messages, extra_body={"deadline_ms": 20_000})
        parts = [
            event.choices[0].delta.content or ""
            for event in client.chat.completions.create(model="m", messages=messages, stream=True)
        ]
    wanted = lm.generate(LINES[0])
    assert whole.choices[0].message.content == "".join(parts) == wanted.text
    timings: Any = whole.model_extra and whole.model_extra["timings"]
    assert 0 < timings["first_token_ms"] <= timings["total_ms"] and timings["slack_ms"] > 0
    assert timings["steps"] == wanted.timings.steps


def test_a_chat_is_tokenized_as_it_is_read(server: Server) -> None:
    said = {"model": "m", "messages": [{"role": "user", "content": LINES[0]}]}
    plain = server.json("/tokenize", {"model": "m", "prompt": LINES[0]})[1]
    assert server.json("/tokenize", said) == (200, plain)
    assert server.json(CHAT, said)[1]["usage"]["prompt_tokens"] == plain["count"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert server.json("/tokenize", said | {"tools": tools})[1]["error"]["param"] == "tools"


@pytest.mark.parametrize(
    ("path", "body", "code", "param", "part"),
    [
        (COMPLETIONS, {"prompt": "x", "stop": "a"}, "unsupported_parameter", "stop", "encoder-decoder model"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 1}, "unsupported_parameter", "logprobs", "encoder-decoder model"),
        (COMPLETIONS, {"prompt": "x", "echo": True}, "unsupported_parameter", "echo", "encoder-decoder model"),
        (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 0}, "unsupported_parameter", "prompt_logprobs", "no use"),
        (COMPLETIONS, {"prompt": "x", "ignore_eos": True}, "unsupported_parameter", "ignore_eos", "no use"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 1}}, "unsupported_parameter", "logit_bias", "no use"),
        (
            COMPLETIONS,
            {"prompt": "x", "response_format": {"type": "json_object"}},
            "unsupported_parameter",
            "response_format",
            "no use",
        ),
        (
            COMPLETIONS,
            {"prompt": "x", "model": None, "models": ["m", "n"]},
            "unsupported_parameter",
            "models",
            "no use",
        ),
        (COMPLETIONS, {"prompt": [3] * (CONTEXT + 1)}, "context_length_exceeded", "prompt", f"reads {CONTEXT} tokens"),
        (COMPLETIONS, {"prompt": [VOCAB]}, "invalid_value", "prompt", "is token"),
        (CHAT, {"messages": [{"role": "system", "content": "x"}]}, "invalid_value", "messages[0].role", "role system"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "invalid_value",
            "messages",
            "must end with one of the user",
        ),
        ("/v1/embeddings", {"input": "x"}, "unsupported_model", "model", "is an encoder-decoder model"),
        ("/v1/classify", {"input": "x", "labels": ["a", "b"]}, "unsupported_model", "model", "needs a language model"),
        ("/v1/responses", {"input": "x"}, "unsupported_model", "model", "is an encoder-decoder model"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(
    path: str, body: dict[str, Any], code: str, param: str, part: str, server: Server
) -> None:
    status, answer = server.json(path, {"model": "m", **body})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param), answer
    assert part in answer["error"]["message"]


def test_figures_deadlines_and_a_crash(server: Server, lm: millis.Seq2Seq) -> None:
    (listed,) = server.json("/v1/models")[1]["data"]
    assert listed["endpoints"] == [CHAT, COMPLETIONS, "/tokenize", "/detokenize"] and listed["max_model_len"] == CONTEXT
    ids = server.json("/tokenize", {"model": "m", "prompt": LINES[0]})[1]["tokens"]
    assert ids == lm.tokenizer.encode(LINES[0])
    status, error = server.json(CHAT, chat(LINES[0], deadline_ms=0.01))
    assert (status, error["error"]["code"]) == (503, "deadline_unmeetable")
    done = server.metric("request_success_total")
    (process,) = server.workers("seq2seq_worker")
    os.kill(process, signal.SIGSTOP)
    status, error = server.json(CHAT, chat(LINES[0], deadline_ms=300))
    assert (status, error["error"]["code"]) == (503, "deadline_exceeded")
    status, answer = server.json(CHAT, chat(LINES[0], deadline_ms=300, on_deadline="fallback", fallback="wait"))
    assert answer["choices"][0]["message"]["content"] == "wait"
    os.kill(process, signal.SIGKILL)
    until(lambda: server.metric("engine_restarts_total") == 1 and server.json("/ready")[0] == 200)
    assert server.chat(LINES[0])[0] == 200 and server.metric("request_success_total") == done + 2
    until(lambda: server.metric("engine_steps_total") > 0)


class Lines:
    """What a worker has sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent += message.items if isinstance(message, Batch) else []
        assert isinstance(message, (Batch, Stats))


def worker(lm: millis.Seq2Seq, max_waiting: int = 9) -> tuple[Worker, Lines]:
    line = Lines()
    made = Worker(lm, cast(Line, line), max_waiting)
    made.warm_up(again=False)
    return made, line


def job(
    number: int, lm: millis.Seq2Seq, *, left_s: float | None = None, priority: Priority = "standard", tokens: int = 19
) -> Submit:
    now = time.monotonic()
    return Submit(
        id=number,
        prompt=tuple(lm.tokenizer.encode(LINES[number % 5])),
        params=SamplingParams(max_tokens=tokens),
        arrival_s=now,
        deadline_s=None if left_s is None else now + left_s,
        priority=priority,
    )


def test_what_is_due_first_is_written_first_and_equals_together(lm: millis.Seq2Seq) -> None:
    made, line = worker(lm)
    for one in (
        job(1, lm, priority="batch"),
        job(2, lm, tokens=7),
        job(3, lm, left_s=60),
        job(4, lm, left_s=30),
        job(5, lm, priority="interactive"),
    ):
        made.take(one)
    order = []
    while made.step():
        order.append([one.id for one in line.sent])
        line.sent.clear()
    assert order == [[4], [3], [5, 1], [2]]  # 5 and 1 want the same; 2 a shorter answer
    assert not made.step()


def test_what_is_wanted_whole_or_not_at_all_does_not_end_before_its_time(
    lm: millis.Seq2Seq, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = worker(lm)
    plain, lands = made._writer.write, []

    def write(texts: Any, wish: Any, stop: Any) -> Any:
        lands.append(wish.lands)
        return plain(texts, wish, stop)

    monkeypatch.setattr(made._writer, "write", write)
    for on_deadline in ("partial", "error", "fallback"):
        made.take(replace(job(1, lm, left_s=60), on_deadline=on_deadline))
        made.step()
    assert lands == [True, False, False]


def test_those_that_are_late_many_or_gone_are_told_or_dropped(
    lm: millis.Seq2Seq, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, line = worker(lm, max_waiting=2)
    made.take(job(1, lm, left_s=1e-6))
    (late,) = line.sent
    assert isinstance(late, Refused) and late.kind == "deadline_unmeetable" and late.predicted_ms
    line.sent.clear()
    for number in (2, 3, 4):
        made.take(job(number, lm))
    (many,) = line.sent
    assert isinstance(many, Refused) and (many.id, many.kind) == (4, "overloaded")
    line.sent.clear()
    made.take(Cancel(2))
    calls = []
    plain = lm.runner.step

    def step(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            made.take(job(5, lm, left_s=0.05))
            time.sleep(0.06)
        return plain(*arguments)

    monkeypatch.setattr(lm.runner, "step", step)
    assert made.step()
    assert [(one.id, type(one)) for one in line.sent] == [(5, Refused), (3, Tokens)]  # 5 while 3 was written
    line.sent.clear()
    made.take(job(6, lm, tokens=90))
    calls.clear()

    def cancelled(*arguments: Any) -> Any:
        calls.append(1)
        made.take(Cancel(6))
        return plain(*arguments)

    monkeypatch.setattr(lm.runner, "step", cancelled)
    assert made.step() and line.sent == [] and len(calls) == 1
    lm.runner.pages.check_integrity([])


def test_settings_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        return error_line(shell("serve", "--port", "0", *arguments))

    write_tiny(tmp_path / "lm.gguf")
    lm, marian = str(tmp_path / "lm.gguf"), str(folder)
    assert "is an encoder-decoder model, for which --larger means nothing" in told("-m", marian, "--larger", lm)
    assert "is an encoder-decoder model, for which --speculation means" in told("-m", marian, "--speculation", "off")
    assert "which is served alone" in told("-m", lm, "--larger", marian)
