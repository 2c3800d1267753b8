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
from millis.files import whole
from millis.tasks.language import language
from millis.tasks.memory import fitting, transcript
from millis.types import Completion, MillisError, RequestError, TemplateError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Stream

EXAMPLE = 'millis chat -m qwen2.5-0.5b --system "You answer in one sentence."'
_PERSONA = {"en": "You are {persona}. Stay in this role.", "zh": "你是{persona}。请始终保持这个角色。"}
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
    lm = common.load(model, threads=threads, context=context, precision=precision, speculation=speculation, draft=draft)
    if not lm.tokenizer.has_chat_template:
        raise TemplateError(f"{model} is a base model without a chat template; use: millis run -m {model} PROMPT")
    name = None if adapter is None else lm.load_adapter(adapter, "adapter")
    common.say(f"{model}: {HELP}")
    memory = Memory(lm, memory_tokens, summarize=summarize)
    options = {**sampling, "deadline_ms": deadline_ms, "adapter": name}
    talk(Conversation(lm, _opening(system, persona), options, memory, json=json))


def _opening(system: str | None, persona: str | None) -> str | None:
    """The system message: who answers, then what else is to be heeded."""
    if persona is None:
        return system
    given = lines.read_text(Path(persona[1:])) if persona.startswith("@") else persona
    tongue = language(given)
    whole = _PERSONA[tongue].replace("{persona}", given.strip())
    return whole if system is None else f"{whole}\n\n{system}"


class Memory:
    """How much of a conversation the model is shown: all of it, or the latest turns and a summary of the others."""

    def __init__(self, lm: LanguageModel, tokens: int | None = None, *, summarize: bool = False) -> None:
        self._lm, self._tokens, self._summarize = lm, tokens, summarize
        self._summary = ""
        self._dropped = 0  # messages that are shown no more

    def forget(self) -> None:
        """The conversation starts anew."""
        self._summary, self._dropped = "", 0

    def shown(self, opening: list[dict[str, str]], messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """What the model is asked with; says so where older turns go. RequestError: the last message is too long."""
        if self._tokens is None:
            return [*opening, *messages]
        turns = messages[self._dropped :]
        kept, gone = fitting(self._head(opening), turns, self._tokens, self._count)
        if gone:
            self._dropped += len(gone)
            how = "forgotten"
            if self._summarize:
                text = transcript([{"role": "summary", "content": self._summary}, *gone] if self._summary else gone)
                self._summary = self._lm.summarize(text, sentences=3).text
                how = "kept as a summary"
                kept, more = fitting(self._head(opening), kept, self._tokens, self._count)
                self._dropped += len(more)
            common.say(f"memory of {self._tokens} tokens: the {self._dropped} oldest messages are {how}")
        return [*self._head(opening), *kept]

    def _head(self, opening: list[dict[str, str]]) -> list[dict[str, str]]:
        if not self._summary:
            return opening
        before = f"{opening[0]['content']}\n\n" if opening else ""
        return [{"role": "system", "content": f"{before}Earlier in this conversation: {self._summary}"}]

    def _count(self, messages: list[dict[str, str]]) -> int:
        return len(self._lm.tokenizer.encode_chat(messages)) if messages else 0


class Conversation:
    """The messages so far, and what a line does to them."""

    def __init__(
        self,
        lm: LanguageModel,
        system: str | None,
        options: dict[str, Any],
        memory: Memory | None = None,
        *,
        json: bool = False,
    ) -> None:
        self._lm, self.json = lm, json
        self._memory = memory or Memory(lm)
        self._options = options
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def take(self, line: str) -> None:
        """Obeys a command or answers a message."""
        verb, _, rest = line.strip().partition(" ")
        if verb == "/reset":
            self.messages = list(self._opening)
            self._memory.forget()
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
            shown = self._memory.shown(self._opening, messages[len(self._opening) :])
            out = self._show(self._lm.chat_stream(shown, **self._options))
        except MillisError as error:
            if self.json:
                _print_line({"error": str(error)})
            common.say(f"millis: {error}; the conversation is as it was before, /reset starts anew")
        else:
            if out.text:  # stopped before its first character, an answer is none
                self.messages = [*messages, {"role": "assistant", "content": out.text}]
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


def talk(conversation: Conversation) -> None:
    """Takes the user's lines until /exit or the end of input. Ctrl-C drops what is under way, and no message."""
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing for input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, not the end
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and not conversation.json else "")
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
    try:
        path = Path(name).expanduser()
        with whole(path) as file:
            file.write(jsonlib.dumps(messages, ensure_ascii=False, indent=2).encode())
        return f"{len(messages)} messages in {path}"
    except RequestError as error:  # a folder, a device
        return f"{error}; the conversation goes on"
    except (OSError, RuntimeError, ValueError) as error:  # the disk, an unknown ~user, a name that cannot be a path
        return f"cannot write {name}: {getattr(error, 'strerror', None) or error}; the conversation goes on"
