"""millis chat in a terminal of its own, and through a pipe: the conversation survives whatever happens in it."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millis.commands import chat
from millis.commands.chat import Chat, save, talk
from millis.tasks.conversation import Conversation
from millis.tasks.model import LanguageModel
from millis.types import SamplingParams
from shell import Terminal, error_line, millis

STATUS = r"first token \d+\.\d ms · \d+\.\d tokens/s · (\d+) \+ (\d+) tokens in \d+ ms"
PROMPT = r"\n> $"


@pytest.fixture
def terminal(model_path: Callable[[str], Path]) -> Iterator[Terminal]:
    arguments = ("-m", model_path("smollm2"), "--system", "Be brief.", "--threads", "1", "--max-tokens", "8000")
    with Terminal("chat", *arguments) as terminal:
        assert "/reset forgets the conversation · /save FILE" in terminal.wait_for("> ")
        yield terminal


def ask(terminal: Terminal, line: str) -> tuple[str, int]:
    """Types a message and waits for the answer: its text, and the tokens of its prompt."""
    terminal.type(line + "\r")
    shown = terminal.wait_for(STATUS + r".*" + PROMPT)
    match = re.search(STATUS, shown)
    assert match is not None
    return shown[len(line) : match.start()].strip(), int(match[1])


def saved(terminal: Terminal, path: Path) -> list[dict[str, str]]:
    terminal.type(f"/save {path}\r")
    terminal.wait_for(r"\d+ messages in .*" + PROMPT)
    messages: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return messages


def test_a_conversation_from_greeting_to_exit(terminal: Terminal, tmp_path: Path) -> None:
    first, first_tokens = ask(terminal, "What is the capital of France?")
    second, second_tokens = ask(terminal, "And of Italy?")
    assert "Paris" in first and second
    assert second_tokens > first_tokens + 10, "the second prompt does not hold the first exchange"
    messages = saved(terminal, tmp_path / "talk.json")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages[:3:2]] == ["Be brief.", first]
    assert messages[3]["content"] == "And of Italy?"
    terminal.type("/reset\r")
    terminal.wait_for("the conversation starts anew" + PROMPT)
    assert ask(terminal, "What is the capital of France?") == (first, first_tokens)
    terminal.type("/exit\r")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("Write a very long story about a lighthouse keeper, with many chapters.\r")
    begun = terminal.wait_for(r"chapters\.\n\S+ \S+ \S+ ").split("\n", 1)[1]
    terminal.type("\x03")
    assert "ended by cancelled" in terminal.wait_for(STATUS + r".*" + PROMPT)
    answer, _ = ask(terminal, "Thank you. What is two plus two?")
    messages = saved(terminal, tmp_path / "talk.json")
    assert [message["role"] for message in messages[1:]] == ["user", "assistant"] * 2
    assert messages[2]["content"].startswith(begun.strip())
    assert messages[4]["content"].split() == answer.split()
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.type_until("\x03", PROMPT)  # Python's input() notices Ctrl-C only while it waits for a key
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_commands_and_their_mistakes(terminal: Terminal, tmp_path: Path) -> None:
    def answer_to(line: str) -> str:
        terminal.type(line + "\r")
        return terminal.wait_for(PROMPT)

    assert "/reset forgets" in answer_to("/help")
    assert "unknown command /frobnicate; /reset forgets" in answer_to("/frobnicate now")
    assert "give a file: /save FILE" in answer_to("/save")
    failed = answer_to(f"/save {tmp_path}/absent/talk.json")
    assert f"cannot write {tmp_path}/absent/talk.json: No such file or directory; the conversation goes on" in failed
    assert answer_to("   ") == "   \n> "
    terminal.type("/quit\r")
    assert terminal.exit_code() == 0


def test_through_a_pipe_only_answers_are_on_standard_output(model_path: Callable[[str], Path]) -> None:
    lines = b"What is the capital of France?\n\xff\xfe\n/nonsense\nAnd of Italy?\n/exit\nnever asked\n"
    arguments = ("chat", "-m", model_path("smollm2"), "--threads", "1", "--max-tokens", "6")
    done = millis(*arguments, stdin=lines)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2 and "Paris" in done.stdout
    greeting, first, refused, unknown, second = done.stderr.splitlines()
    assert greeting.endswith(chat.HELP)
    assert re.match(STATUS, first) and re.match(STATUS, second)
    assert refused.startswith("millis: ") and "valid Unicode" in refused
    assert unknown.startswith("unknown command /nonsense")


def test_the_end_of_a_pipe_is_the_end(model_path: Callable[[str], Path]) -> None:
    done = millis("chat", "-m", model_path("smollm2"), "--threads", "1", stdin="")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_base_model_cannot_chat(model_path: Callable[[str], Path]) -> None:
    path = model_path("gemma3-270m")
    line = error_line(millis("chat", "-m", path, "--context", "64"))
    assert line == f"{path} is a base model without a chat template; use: millis run -m {path} PROMPT"


# What a line does, without a process


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> LanguageModel:
    return LanguageModel(model_path("smollm2"), threads=1, context=96)


def test_a_message_that_does_not_fit_leaves_the_conversation_as_it_was(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(lm)
    chat = Chat(lm, conversation, {"max_tokens": 4})
    chat.take("Hello!")
    before = list(conversation.messages)
    assert [message["role"] for message in before] == ["user", "assistant"]
    capsys.readouterr()
    chat.take("word " * 100)
    assert conversation.messages == before
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert re.search(r"tokens; the context holds 96, .*; the conversation is as it was before, /reset starts anew", err)
    chat.take("/reset")
    assert conversation.messages == []
    chat.take("Hello!")
    assert conversation.messages == before
    lm.engine.scheduler.check_integrity()


def typed(*lines: str) -> Callable[[str], str]:
    """What stands for `input`; a line \x03 is Ctrl-C."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left)
        if line == "\x03":
            raise KeyboardInterrupt
        return line

    return read


def test_an_interrupt_outside_of_an_answer_leaves_the_conversation_as_it_was(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(lm, system="Be brief.")
    times = []

    def interrupted_once(*arguments: Any, **options: Any) -> Any:
        times.append(len(arguments[0]))
        if len(times) == 1:
            raise KeyboardInterrupt
        return LanguageModel.chat_stream(lm, *arguments, **options)

    monkeypatch.setattr(lm, "chat_stream", interrupted_once)
    monkeypatch.setattr("builtins.input", typed("Hello!", "\x03", "Hello again!", "/exit"))
    talk(Chat(lm, conversation, {"max_tokens": 4}))
    assert times == [2, 2]
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.messages[1]["content"] == "Hello again!"


def test_no_answer_is_no_message(lm: LanguageModel) -> None:
    conversation = Conversation(lm)
    Chat(lm, conversation, {"max_tokens": 4, "deadline_ms": 1e-3}).take("Hello!")
    assert conversation.messages == []


def test_the_options_are_those_of_an_answer(model_path: Callable[[str], Path]) -> None:
    """Every flag of chat arrives; one that went lost would be a default here."""
    given: dict[str, Any] = {
        "max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5,
        "seed": 9, "deadline_ms": 5e5,
    }  # fmt: skip
    seen: dict[str, Any] = {}

    class Spy:
        def __init__(self, *_: Any, **options: Any) -> None:
            self.tokenizer, self.options = type("", (), {"has_chat_template": True}), options

    def record(self: Chat, line: str) -> None:
        seen.update(self._options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millis.tasks.model.LanguageModel", Spy)
        patch.setattr(Chat, "take", record)
        patch.setattr("builtins.input", typed("Hello!", "/exit"))
        chat.command("smollm2", **given)
    assert seen == {**given, "adapter": None}
    assert set(given) - {"deadline_ms"} <= set(SamplingParams.__dataclass_fields__)


# /save


MESSAGES = [{"role": "system", "content": "你好 “quoted”\n"}]


def said_before() -> Conversation:
    return Conversation(None, system=MESSAGES[0]["content"])  # type: ignore[arg-type]


def test_save_writes_json_with_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    before = os.umask(0o026)
    try:
        said = save(said_before(), str(path))
    finally:
        os.umask(before)
    assert said == f"1 messages in {path}"
    assert json.loads(path.read_text(encoding="utf-8")) == MESSAGES
    assert "你好" in path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["talk.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_keeps_the_old_file_and_leaves_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    path.write_text("old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"millis.files.os.{step}", full)
        said = save(said_before(), str(path))
    assert said == f"cannot write {path}: No space left on device; the conversation goes on"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["talk.json"]


@pytest.mark.parametrize("name", ["", "folder", "absent/file", "~nobody-of-this-name/file", "a\0b"])
def test_names_that_cannot_be_saved_to(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    said = save(said_before(), name)
    assert said.startswith("cannot write " if name else "give a file")
    assert "\n" not in said
    assert os.listdir(tmp_path) == ["folder"]


def test_the_home_folder_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save(said_before(), "~/talk.json") == f"1 messages in {tmp_path / 'talk.json'}"
