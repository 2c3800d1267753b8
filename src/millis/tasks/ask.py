"""One instruction, or many that share steps, put to a model: what translate, summarize and extract are made of."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from millis.types import Completion, DeadlineError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Stream

TOGETHER = 64  # instructions under way at once


def ask(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    deadline_ms: float | None = None,
    advance: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Completion]:
    """An answer to each prompt: a user's message where the model has a chat template, otherwise text to go on with.

    The deadline is each one's, from when it is asked; `advance` is called with each answer. DeadlineError: one cannot
    be in time; then none is answered.
    """
    found: list[Completion] = []
    for at in range(0, len(prompts), TOGETHER):
        with ExitStack() as streams:
            together: list[Stream] = []
            for prompt in prompts[at : at + TOGETHER]:
                stream = _stream(lm, prompt, {**options, "deadline_ms": deadline_ms})
                together.append(streams.enter_context(stream))
            for stream in together:
                found.append(stream.result())
                advance()
    return found


def filled(template: str, **parts: str) -> str:
    """A template with its parts at their {names}; names in braces within a part stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda place: parts.get(place[1], place[0]), template)


def _stream(lm: LanguageModel, prompt: str, options: dict[str, Any]) -> Stream:
    if lm.tokenizer.has_chat_template:
        return lm.chat_stream([{"role": "user", "content": prompt}], **options)
    return lm.stream(prompt, **options)


@contextmanager
def within(deadline_ms: float | None, begin: float, share: float = 1.0) -> Iterator[None]:
    """Around what is asked with `share` of the time left of a call: a refusal names the call's own deadline, and what
    the call would take. begin: when that came (time.perf_counter)."""
    spent_ms = 1000 * (time.perf_counter() - begin)
    try:
        yield
    except DeadlineError as error:
        ms = spent_ms + error.predicted_ms / share
        raise DeadlineError(
            f"the deadline of {deadline_ms:g} ms cannot be met: it would take {ms:.0f} ms; allow more time, or ask for "
            "less",
            predicted_ms=ms,
            retry_after_s=error.retry_after_s,
        ) from None
