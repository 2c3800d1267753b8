"""millis chat: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from millis.commands import common
from millis.types import MillisError, TemplateError

HELP = "/reset forgets the conversation · /save FILE writes it as JSON · /help · /exit or Ctrl-D leaves · Ctrl-C stops an answer"


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
) -> None:
    """Talks with a model. Example: millis chat -m qwen2.5-0.5b --system "You answer in one sentence." """
    lm = common.load(model, threads=threads, context=context, precision=precision)
    if not lm.tokenizer.has_chat_template:
        raise TemplateError(f"{model} is a base model without a chat template; use: millis run -m {model} PROMPT")
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "deadline_ms": deadline_ms,
    }
    common.say(f"{model}: {HELP}")
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    for line in _lines():
        verb, _, rest = line.partition(" ")
        if verb in ("/exit", "/quit"):
            break
        if verb == "/reset":
            messages = list(opening)
            common.say("the conversation starts anew")
        elif verb == "/save":
            _save(messages, rest.strip())
        elif verb.startswith("/"):
            common.say(HELP if verb == "/help" else f"unknown command {verb}; {HELP}")
        elif line.strip():
            messages.append({"role": "user", "content": line})
            _answer(lm, messages, options)


def _lines():  # type: ignore[no-untyped-def]
    """The user's lines until the end of input; Ctrl-C at the prompt drops the line."""
    try:
        import readline  # noqa: F401  history and editing for input()
    except ImportError:
        pass
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def _answer(lm, messages, options) -> None:  # type: ignore[no-untyped-def]
    """Answers the last message and keeps both; what cannot be answered leaves the conversation as it was."""
    try:
        stream = lm.chat_stream(messages, **options)
    except MillisError as error:
        messages.pop()
        common.say(f"{error}; /reset makes room" if "context" in str(error) else str(error))
        return
    common.show(stream)
    messages.append({"role": "assistant", "content": stream.completion.text})
    common.say(common.status_line(stream.timings, lm))


def _save(messages: list[dict[str, str]], name: str) -> None:
    """Writes the conversation in one move, so that a failure leaves the old file."""
    if not name:
        common.say("give a file: /save FILE")
        return
    path = Path(name).expanduser()
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(messages, file, ensure_ascii=False, indent=2)
        os.replace(file.name, path)
    except OSError as error:
        common.say(f"cannot write {path}: {error.strerror}; the conversation goes on")
        return
    common.say(f"{len(messages)} messages in {path}")
