"""millis train --task chat: conversations through the model's own template; only the answers' tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millis.samples.read import Row, Skipped, files_of, read_rows
from millis.tasks.language import language
from millis.tasks.translate import prompt
from millis.tokenizer import Tokenizer
from millis.train.base import Base
from millis.train.batches import divided
from millis.train.lm import LanguageModelling, Tokens
from millis.train.settings import Settings
from millis.types import RequestError, TemplateError

# (question, answer) columns of rows that hold one exchange.
_COLUMNS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))


def messages_of(row: Row) -> list[dict[str, Any]] | None:
    """A row's conversation: `messages`, or a question and an answer, perhaps with `system`; None without either.

    A row of `source` and `target`, Chinese and English, is asked as `millis translate` asks.
    """
    fields = row.fields
    if isinstance(fields.get("messages"), list):
        return list(fields["messages"])
    for question, answer in _COLUMNS:
        asked, said = fields.get(question), fields.get(answer)
        if isinstance(asked, str) and isinstance(said, str) and asked.strip() and said.strip():
            more = fields.get("input")
            asked = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
            system = fields.get("system")
            first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
            return [*first, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    text, translation = fields.get("source"), fields.get("target")
    if isinstance(text, str) and isinstance(translation, str) and text.strip() and translation.strip():
        asked = prompt(text.strip(), language(translation))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": translation.strip()}]
    return None


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> Tokens:
    """The conversation's ids, with every assistant message, up to the token that ends it, as what is learned.

    TemplateError where the template writes earlier messages otherwise once later ones follow; RequestError for messages
    that it does not take.
    """
    whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
    counted = [False] * len(whole)
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        before = tokenizer.encode_chat(messages[:i], add_generation_prompt=True)
        after = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise TemplateError("the chat template rewrites earlier messages; give conversations of one answer")
        ends = [at for at in range(len(before), len(after)) if after[at] in tokenizer.eos]
        for at in range(len(before), ends[-1] + 1 if ends else len(after)):
            counted[at] = True
    if not any(counted):
        raise RequestError("no message of the assistant")
    return Tokens.of(whole, counted)


def conversations(tokenizer: Tokenizer, settings: Settings, skipped: Skipped, paths: Sequence[Path]) -> list[Tokens]:
    """Every usable row; those that are too long are skipped, for half an answer teaches to stop halfway."""
    found = []
    for row in read_rows(files_of(paths), skipped):
        messages = messages_of(row)
        if messages is None:
            skipped.add(row.file, row.line, "no conversation")
            continue
        try:
            sample = chat_tokens(tokenizer, messages)
        except (RequestError, TemplateError) as error:
            skipped.add(row.file, row.line, f"malformed: {error}")
            continue
        if len(sample.ids) > settings.max_tokens:
            skipped.add(row.file, row.line, f"too long: {len(sample.ids)} tokens")
            continue
        found.append(sample)
    if not found:
        columns = "; ".join(f"{question}, {answer}" for question, answer in (*_COLUMNS, ("source", "target")))
        why = f": {skipped.summary()}" if skipped.count else ""
        raise RequestError(f"no usable conversation{why}; a row needs messages, or one of: {columns}")
    return found


def prepare(
    base: Base, settings: Settings, skipped: Skipped, data: Sequence[Path], held: Sequence[Path]
) -> LanguageModelling:
    """Reads the data and makes the job. RequestError for a model without a chat template."""
    if not base.tokenizer.has_chat_template:
        raise RequestError(f"{base.name} has no chat template; use --task lm, or a model made for conversations")
    train = conversations(base.tokenizer, settings, skipped, data)
    if held:
        other = conversations(base.tokenizer, settings, skipped, held)
    else:
        keys = [tuple(sample.ids) for sample in train]
        train, other = divided(train, keys, settings.eval_split, settings.seed)
    return LanguageModelling(base, settings, base.causal(), train, other)
