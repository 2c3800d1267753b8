"""millis chat: a conversation in the terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis.commands import common
from millis.types import MillisError, TemplateError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

EXAMPLE = 'millis chat -m qwen2.5-0.5b --system "You answer in one sentence."'
HELP = (
    "/reset forgets the conversation · /save FILE writes it as JSON · /help · /exit or Ctrl-D leaves"
    " · Ctrl-C stops an answer"
)


def command(
    model: common.Model = "smollm2",
    system: common.System = None,
    max_tokens: common.MaxTokens = 1024,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    repetition_penalty: common.Penalty = 1.0,
    seed: common.Seed = None,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    speculation: common.Speculation = "auto",
    draft: common.Draft = None,
    adapter: common.Adapter = None,
) -> None:
    """A conversation in the terminal; every line is a message, or a command such as /help."""
    sampling = common.checked(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    lm = common.load(model, threads=threads, context=context, precision=precision, speculation=speculation, draft=draft)
    if not lm.tokenizer.has_chat_template:
        raise TemplateError(f"{model} is a base model without a chat template; use: millis run -m {model} PROMPT")
    name = None if adapter is None else lm.load_adapter(adapter, "adapter")
    common.say(f"{model}: {HELP}")
    talk(Conversation(lm, system, {**sampling, "deadline_ms": deadline_ms, "adapter": name}))


class Conversation:
    """The messages so far, and what a line does to them."""

    def __init__(self, lm: LanguageModel, system: str | None, options: dict[str, Any]) -> None:
        self._lm = lm
        self._options = options
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def take(self, line: str) -> None:
        """Obeys a command or answers a message."""
        verb, _, rest = line.strip().partition(" ")
        if verb == "/reset":
            self.messages = list(self._opening)
            common.say("the conversation starts anew")
        elif verb == "/save":
            common.say(save(self.messages, rest.strip()))
        elif verb.startswith("/"):
            common.say(HELP if verb == "/help" else f"unknown command {verb}; {HELP}")
        elif verb:
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Answers and keeps both messages; what cannot be answered leaves the conversation as it was."""
        messages = [*self.messages, {"role": "user", "content": line}]
        try:
            out = common.show(self._lm.chat_stream(messages, **self._options))
        except MillisError as error:
            common.say(f"millis: {error}; the conversation is as it was before, /reset starts anew")
        else:
            if out.text:  # stopped before its first character, an answer is none
                self.messages = [*messages, {"role": "assistant", "content": out.text}]
            common.say(common.status_line(out, self._lm))


def talk(conversation: Conversation) -> None:
    """Takes the user's lines until /exit or the end of input. Ctrl-C drops what is under way, and no message."""
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing for input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, not the end
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip() in ("/exit", "/quit"):
                return
            conversation.take(line)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def save(messages: list[dict[str, str]], name: str) -> str:
    """Writes the messages as JSON in one move, so that a failure leaves the old file. What to tell the user."""
    if not name:
        return "give a file: /save FILE"
    part = None
    try:
        path = Path(name).expanduser()
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            part = file.name
            json.dump(messages, file, ensure_ascii=False, indent=2)
        os.replace(part, path)
        return f"{len(messages)} messages in {path}"
    except (OSError, RuntimeError, ValueError) as error:  # the disk, an unknown ~user, a name that cannot be a path
        if part is not None:
            with suppress(OSError):
                os.unlink(part)
        return f"cannot write {name}: {getattr(error, 'strerror', None) or error}; the conversation goes on"
