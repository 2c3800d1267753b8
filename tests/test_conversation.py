"""A conversation in a program: persona, memory with and without summary, deadlines, files and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import millis
from millis.tasks.conversation import Conversation
from millis.types import DeadlineError, RequestError


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> millis.LanguageModel:
    return millis.LanguageModel(model_path("smollm2"), threads=1, context=1024)


def test_what_is_said_is_what_chat_is_asked(lm: millis.LanguageModel) -> None:
    talk = Conversation(lm, persona="a pirate", system="Be brief.")
    opening = {"role": "system", "content": "You are a pirate. Stay in this role.\n\nBe brief."}
    assert talk.messages == [opening]
    first = talk.say("Hello!", max_tokens=8)
    question = {"role": "user", "content": "Hello!"}
    assert first.text == lm.chat([opening, question], max_tokens=8).text
    assert talk.messages == [opening, question, {"role": "assistant", "content": first.text}]
    second = {"role": "user", "content": "And who are you?"}
    wanted = lm.chat([*talk.messages, second], max_tokens=8).text
    stream = talk.say_stream("And who are you?", max_tokens=8)
    assert len(talk.messages) == 3
    assert "".join(stream) == wanted and len(talk.messages) == 5
    talk.messages.clear()
    assert len(talk.messages) == 5
    talk.reset()
    assert talk.messages == [opening]
    assert Conversation(lm, persona="老师").messages[0]["content"] == "你是老师。请始终保持这个角色。"


def test_a_stream_that_is_closed_leaves_what_was_written(lm: millis.LanguageModel) -> None:
    talk = Conversation(lm)
    with talk.say_stream("Tell me a long story.", max_tokens=200) as stream:
        piece = next(stream)
    assert talk.messages[1]["content"].startswith(piece) and len(talk.messages) == 2


def test_memory_is_bounded(lm: millis.LanguageModel) -> None:
    talk = Conversation(lm, system="Be brief.", memory_tokens=80)
    prompts = [talk.say(f"What is {i} plus {i}?", max_tokens=12).timings.prompt_tokens for i in range(5)]
    assert max(prompts) <= 80 and talk.forgotten > 0 and talk.forgotten % 2 == 0 and not talk.summary
    assert len(talk.messages) == 11  # what is forgotten by the model is still said
    before = talk.messages
    with pytest.raises(RequestError, match="does not fit a memory of 80 tokens"):
        talk.say("word " * 100)
    assert talk.messages == before


def test_what_is_forgotten_may_stay_as_a_summary(lm: millis.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def summarize(text: str, **options: Any) -> Any:
        asked.append((text, options["deadline_ms"]))
        if options["deadline_ms"] is not None:
            raise DeadlineError("late", predicted_ms=1, retry_after_s=1)
        return type("Summary", (), {"text": f"sum {len(asked)}"})

    monkeypatch.setattr(lm, "summarize", summarize)
    talk = Conversation(lm, memory_tokens=100, summarize=True)
    for i in range(4):
        talk.say(f"What is {i} plus {i}?", max_tokens=12)
    assert asked and asked[0][0].startswith("user: What is 0 plus 0?\nassistant: ") and talk.summary.startswith("sum")
    known, count = talk.summary, len(asked)
    for _ in range(2):
        talk.say("And now?", max_tokens=12, deadline_ms=600_000)
    assert asked[count][1] == 300_000 and asked[count][0].startswith(f"summary: {known}\n") and talk.summary == known


def test_a_summary_without_room_is_left_out(lm: millis.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "summarize", lambda text, **_: type("Summary", (), {"text": "long " * 60}))
    talk = Conversation(lm, persona="a pirate", memory_tokens=64, summarize=True)
    prompts = [talk.say(f"What is {i} plus {i}?", max_tokens=12).timings.prompt_tokens for i in range(4)]
    assert max(prompts) <= 64 and talk.forgotten >= 2 and talk.summary
    with pytest.raises(RequestError, match="does not fit a memory of 64 tokens"):
        talk.say("word " * 100)


def test_a_deadline_that_cannot_be_kept_leaves_it_as_it_was(lm: millis.LanguageModel) -> None:
    talk = Conversation(lm)
    with pytest.raises(DeadlineError):
        talk.say("Hello!", deadline_ms=0.01)
    for wrong in (0, "x", True):
        with pytest.raises(RequestError, match="deadline_ms must be"):
            talk.say("Hello!", deadline_ms=wrong)  # type: ignore[arg-type]
    assert talk.messages == []
    timings = talk.say("Hello!", deadline_ms=60_000, max_tokens=4).timings
    assert timings.slack_ms is not None and timings.slack_ms > 0 and len(talk.messages) == 2


def test_a_file_goes_on_where_it_ended(lm: millis.LanguageModel, tmp_path: Path) -> None:
    talk = Conversation(lm, persona="a pirate")
    talk.say("Hello!", max_tokens=4)
    talk.save(tmp_path / "talk.json")
    other = Conversation(lm, memory_tokens=400)
    other.load(str(tmp_path / "talk.json"))
    assert other.messages == talk.messages
    assert other.say("Who are you?", max_tokens=6).text == talk.say("Who are you?", max_tokens=6).text
    with pytest.raises(RequestError, match="it is a folder"):
        talk.save(tmp_path)


TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
HOSTILE = {
    "an object": {"role": "user", "content": "a"},
    "no messages": [1],
    "another key": [{**TURN[0], "name": "x"}, TURN[1]],
    "no text": [{"role": "user", "content": ["a"]}, TURN[1]],
    "no answer": TURN[:1],
    "an answer first": TURN[::-1],
    "a system message late": [*TURN, {"role": "system", "content": "x"}, TURN[1]],
    "an unhashable role": [{"role": [], "content": "a"}, TURN[1]],
}


@pytest.mark.parametrize("fault", [*HOSTILE, "no JSON", "no UTF-8", "too deep", "absent", "too large"])
def test_files_that_hold_no_conversation(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    bytes_of = {"no JSON": b"[", "no UTF-8": b'["\xff"]', "too deep": b"[" * 100_000, "too large": b" " * 2000}
    if fault != "absent":
        path.write_bytes(bytes_of.get(fault) or json.dumps(HOSTILE[fault]).encode())
    monkeypatch.setattr("millis.tasks.conversation.LARGEST_BYTES", 1000 if fault == "too large" else 1 << 20)
    talk = Conversation(None, system="Be brief.")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"talk\.json"):
        talk.load(path)
    assert [message["content"] for message in talk.messages] == ["Be brief."]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"summarize": True}, "give both"),
        ({"memory_tokens": 5}, r"memory_tokens must be a whole number in \[32"),
        ({"persona": " "}, "the persona is empty"),
        ({"system": 5}, "the system message must be a str"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        Conversation(None, **options)  # type: ignore[arg-type]
