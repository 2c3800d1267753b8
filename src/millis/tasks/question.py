"""Extractive question answering over one text, for evaluation: the shortest answer that the text gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millis.tasks.ask import ask
from millis.tasks.language import language
from millis.types import Completion

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

_ASKED = {
    "en": "{context}\n\nAnswer the question with words from the text above, as few as possible.\nQuestion: {question}",
    "zh": "{context}\n\n请用上文中的原话回答问题，尽量简短。\n问题：{question}",
}
MOST_TOKENS = 48


def question(lm: LanguageModel, asked: str, context: str, deadline_ms: float | None = None) -> Completion:
    """The answer to a question from a text."""
    before, after = _ASKED[language(asked)].split("{question}")
    prompt = context.join(before.split("{context}")) + asked + after
    return ask(lm, [prompt], deadline_ms=deadline_ms, max_tokens=MOST_TOKENS)[0]
