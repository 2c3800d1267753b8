"""millis chat: a conversation in the terminal."""

from __future__ import annotations

import io
import json as jsonlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines
from millis.tasks.conversation import Conversation
from millis.types import Completion, MillisError, RequestError, TemplateError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Stream

EXAMPLE = 'millis chat -m qwen2.5-0.5b --system "You answer in one sentence."'
HELP = (
    "/reset forgets the conversation · /save FILE writes it as JSON · /help · /exit or Ctrl-D leaves"
    " · Ctrl-C stops an answer"
)


def command(
    model: common.Model = "smollm2",
    system: common.System = None,
    persona: Annotated[
        str | None, typer.Option("--persona", metavar="TEXT|@FILE", help="Who answers; part of the system message.")
    ] = None,
    memory_tokens: Annotated[
        int | None, typer.Option("--memory-tokens", min=32, help="Of the conversation, the model is shown so many.")
    ] = None,
    summarize: Annotated[
        bool, typer.Option("--summarize", help="With --memory-tokens: what is forgotten is kept as a summary.")
    ] = False,
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
    json: Annotated[bool, typer.Option("--json", help="One JSON object a reply, each on a line.")] = False,
) -> None:
    """A conversation in the terminal; every line is a message, or a command such as /help."""
    if summarize and memory_tokens is None:
        raise typer.BadParameter("--summarize is for what --memory-tokens drops; give both")
    sampling = common.checked(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    who = lines.read_text(Path(persona[1:])) if persona is not None and persona.startswith("@") else persona
    lm = common.load(model, threads=threads, context=context, precision=precision, speculation=speculation, draft=draft)
    if not lm.tokenizer.has_chat_template:
        raise TemplateError(f"{model} is a base model without a chat template; use: millis run -m {model} PROMPT")
    name = None if adapter is None else lm.load_adapter(adapter, "adapter")
    common.say(f"{model}: {HELP}")
    conversation = Conversation(lm, persona=who, system=system, memory_tokens=memory_tokens, summarize=summarize)
    options = {**sampling, "deadline_ms": deadline_ms, "adapter": name}
    talk(Chat(lm, conversation, options, json=json))


class Chat:
    """A conversation in the terminal, and what a line does to it."""

    def __init__(
        self, lm: LanguageModel, conversation: Conversation, options: dict[str, Any], *, json: bool = False
    ) -> None:
        self._lm, self._options, self.json = lm, options, json
        self.conversation = conversation

    def take(self, line: str) -> None:
        """Obeys a command or answers a message."""
        verb, _, rest = line.strip().partition(" ")
        if verb == "/reset":
            self.conversation.reset()
            common.say("the conversation starts anew")
        elif verb == "/save":
            common.say(save(self.conversation, rest.strip()))
        elif verb.startswith("/"):
            common.say(HELP if verb == "/help" else f"unknown command {verb}; {HELP}")
        elif verb:
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Answers; what cannot be answered leaves the conversation as it was."""
        talk, before = self.conversation, self.conversation.forgotten
        try:
            stream = talk.say_stream(line, **self._options)
            if talk.forgotten > before:
                how = "kept as a summary" if talk.summary else "forgotten"
                common.say(f"memory of {talk.memory_tokens} tokens: the {talk.forgotten} oldest messages are {how}")
            out = self._show(stream)
        except MillisError as error:
            if self.json:
                _print_line({"error": str(error)})
            common.say(f"millis: {error}; the conversation is as it was before, /reset starts anew")
        else:
            if not self.json:
                common.say(common.status_line(out, self._lm))

    def _show(self, stream: Stream) -> Completion:
        if not self.json:
            return common.show(stream)
        with common.stopped_by_interrupt(stream):
            out = stream.result()
        _print_line(common.record(out))
        return out


def _print_line(value: dict[str, Any]) -> None:
    print(jsonlib.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def talk(chat: Chat) -> None:
    """Takes the user's lines until /exit or the end of input. Ctrl-C drops what is under way, and no message."""
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing for input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, not the end
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and not chat.json else "")
            if line.strip() in ("/exit", "/quit"):
                return
            chat.take(line)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def save(conversation: Conversation, name: str) -> str:
    """Writes the messages as JSON. What to tell the user."""
    if not name:
        return "give a file: /save FILE"
    try:
        conversation.save(name)
    except RequestError as error:
        return f"{error}; the conversation goes on"
    return f"{len(conversation.messages)} messages in {Path(name).expanduser()}"
