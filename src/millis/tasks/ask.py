"""One instruction, or many that share steps, put to a model: what translate, summarize and extract are made of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from millis.types import Completion, RequestError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Stream

TOGETHER = 64  # instructions under way at once


def ask(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    system: str | None = None,
    deadline_ms: float | None = None,
    **options: Any,
) -> list[Completion]:
    """An answer to each prompt: a user's message where the model has a chat template, otherwise text to go on with.

    The deadline is each one's, from when it is asked. DeadlineError: one cannot be in time; then none is answered.
    """
    found: list[Completion] = []
    for at in range(0, len(prompts), TOGETHER):
        with ExitStack() as streams:
            together: list[Stream] = []
            for prompt in prompts[at : at + TOGETHER]:
                stream = _stream(lm, prompt, system, {**options, "deadline_ms": deadline_ms})
                together.append(streams.enter_context(stream))
            found += [stream.result() for stream in together]
    return found


def _stream(lm: LanguageModel, prompt: str, system: str | None, options: dict[str, Any]) -> Stream:
    if not lm.tokenizer.has_chat_template:
        return lm.stream(prompt if system is None else f"{system}\n\n{prompt}", **options)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return lm.chat_stream([*messages, {"role": "user", "content": prompt}], **options)


def listed(texts: str | Sequence[str]) -> tuple[list[str], bool]:
    """(the texts, whether it was one). RequestError: one is no text, or empty."""
    single = isinstance(texts, str)
    found = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str) or not text.strip():
            where = "the text" if single else f"text {i}"
            raise RequestError(
                f"{where} is empty; give at least one word" if isinstance(text, str) else f"{where} must be a str"
            )
    return found, single
