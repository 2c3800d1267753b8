"""A conversation with a model: who answers, what was said, and how much of it the model is shown."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis.files import whole as whole_file
from millis.tasks import checks
from millis.tasks.language import language
from millis.tasks.memory import Messages, fitting, transcript
from millis.types import Completion, DeadlineError, RequestError, whole

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Stream

LEAST_TOKENS = 32  # of a memory
LARGEST_BYTES = 64 << 20  # of a file of messages
SUMMARY_SHARE = 0.5  # of the time until a deadline, at most, for a summary of what is forgotten
_PERSONA = {"en": "You are {persona}. Stay in this role.", "zh": "你是{persona}。请始终保持这个角色。"}


class Conversation:
    """Messages between somebody and `lm`, a model with a chat template.

    persona: who answers, such as "a patient teacher of mathematics"; system: what else is to be heeded. Both begin the
    conversation as its system message. memory_tokens: so many tokens of it, at most, the model is shown; the oldest
    questions go first, with their answers. summarize: a summary of what went stays. Not for several threads at once.

    >>> talk = millis.Conversation(lm, persona="a patient teacher of mathematics", memory_tokens=600)
    >>> print(talk.say("What is a prime number?", max_tokens=100))
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        persona: str | None = None,
        system: str | None = None,
        memory_tokens: int | None = None,
        summarize: bool = False,
    ) -> None:
        if summarize and memory_tokens is None:
            raise RequestError("summarize is for what memory_tokens drops; give both")
        self._lm, self._summarize = lm, summarize
        self.memory_tokens = None if memory_tokens is None else whole("memory_tokens", memory_tokens, LEAST_TOKENS)
        self._opening = _opening(persona, system)
        self.reset()

    @property
    def messages(self) -> Messages:
        """All that was said, the system message first; as `chat` takes it. A copy."""
        return [dict(message) for message in (*self._opening, *self._turns)]

    def reset(self) -> None:
        """Forgets what was said; who answers stays."""
        self._turns: Messages = []
        self.forgotten = 0  # messages that the model is shown no more,
        self.summary = ""  # and what it is told of them

    def say(self, text: str, *, deadline_ms: float | None = None, **options: Any) -> Completion:
        """The answer to `text`; both are then part of the conversation, unless the answer is empty.

        options: those of LanguageModel.chat. `deadline_ms` counts from the call, a summary included. RequestError: the
        message does not fit. That, or another error, leaves the messages as they were.
        """
        return self.say_stream(text, deadline_ms=deadline_ms, **options).result()

    def say_stream(self, text: str, *, deadline_ms: float | None = None, **options: Any) -> Stream:
        """As `say`, but hands out the text as it is written. Once its pieces end, or it is closed, what was written is
        part of the conversation."""
        question = {"role": "user", "content": checks.text(text, "the message")}
        if checks.deadline(deadline_ms) is not None:
            self._lm.prepare_deadlines()
        begin = time.perf_counter()
        shown = self._shown(question, deadline_ms)
        if deadline_ms is not None:
            spent_ms = 1000 * (time.perf_counter() - begin)
            deadline_ms = max(deadline_ms - spent_ms, 1e-6)  # a refusal, where nothing is left
        stream = self._lm.chat_stream(shown, deadline_ms=deadline_ms, **options)

        def keep(out: Completion) -> None:
            if out.text:  # stopped before its first character, an answer is none
                self._turns += [question, {"role": "assistant", "content": out.text}]

        stream.on_completion = keep
        return stream

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages as JSON, in one move, so that a failure leaves an old file as it was. RequestError."""
        given = checks.path(path, "the file")
        try:
            with whole_file(given.expanduser()) as file:
                file.write(json.dumps(self.messages, ensure_ascii=False, indent=2).encode())
        except RequestError:  # a folder, a device
            raise
        except (OSError, RuntimeError, ValueError) as error:  # the disk, an unknown ~user, what cannot be a path
            raise RequestError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on with the messages of a file that `save` wrote, its system message among them.

        RequestError: it cannot be read, or holds no conversation; the messages are then as they were.
        """
        opening, turns = _read(checks.path(path, "the file"))
        self.reset()
        self._opening, self._turns = opening, turns

    def _shown(self, question: dict[str, Any], deadline_ms: float | None) -> Messages:
        """What the model is asked with."""
        turns = [*self._turns[self.forgotten :], question]
        if self.memory_tokens is None:
            return [*self._opening, *turns]
        head, kept, gone = self._fitted(turns, self.memory_tokens)
        if gone and self._summarize:
            self.summary = self._summary(gone, deadline_ms)
            head, kept, _ = self._fitted(kept, self.memory_tokens)
        self.forgotten += len(turns) - len(kept)
        return [*head, *kept]

    def _fitted(self, turns: Messages, most_tokens: int) -> tuple[Messages, Messages, Messages]:
        """The system message, which goes without the summary where that leaves no room, and as `fitting`."""
        if self.summary:
            with suppress(RequestError):
                return (head := self._head(), *fitting(head, turns, most_tokens, self._count))
        return (self._opening, *fitting(self._opening, turns, most_tokens, self._count))

    def _summary(self, gone: Messages, deadline_ms: float | None) -> str:
        """Of what went, and went before; where no time is left for one, what there was before."""
        before = [{"role": "summary", "content": self.summary}] if self.summary else []
        limit_ms = None if deadline_ms is None else SUMMARY_SHARE * deadline_ms
        try:
            return self._lm.summarize(transcript([*before, *gone]), sentences=3, deadline_ms=limit_ms).text
        except DeadlineError:
            return self.summary

    def _head(self) -> Messages:
        if not self.summary:
            return self._opening
        before = f"{self._opening[0]['content']}\n\n" if self._opening else ""
        return [{"role": "system", "content": f"{before}Earlier in this conversation: {self.summary}"}]

    def _count(self, messages: Messages) -> int:
        return len(self._lm.tokenizer.encode_chat(messages)) if messages else 0


def _opening(persona: str | None, system: str | None) -> Messages:
    """The system message, if there is one: who answers, then what else is to be heeded."""
    parts = []
    if persona is not None:
        persona = checks.text(persona, "the persona")
        parts.append(_PERSONA[language(persona)].replace("{persona}", persona.strip()))
    if system is not None:
        parts.append(checks.text(system, "the system message"))
    return [{"role": "system", "content": "\n\n".join(parts)}] if parts else []


def _read(path: Path) -> tuple[Messages, Messages]:
    """(the system message, the turns) of a file."""
    try:
        with open(path.expanduser(), "rb") as file:
            data = file.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise RequestError(f"{path} is larger than {LARGEST_BYTES >> 20} MiB, and no conversation")
        found = json.loads(data)
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError) as error:  # an unknown ~user, what cannot be a path, no UTF-8, no JSON, too deep
        raise RequestError(f"{path} holds no conversation: {error}") from None
    messages: list[Any] = found if isinstance(found, list) else [None]
    for one in messages:
        if not isinstance(one, dict) or set(one) != {"role", "content"} or not isinstance(one["content"], str):
            raise RequestError(f"{path} holds no conversation; a list of messages with role and content is one")
    opening = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(opening) :]
    if len(turns) % 2 or any(one["role"] != ("user", "assistant")[i % 2] for i, one in enumerate(turns)):
        raise RequestError(f"{path}: behind a system message, user and assistant must take turns, the answer last")
    return opening, turns
