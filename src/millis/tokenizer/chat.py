"""A conversation → the text of a model's chat template, with what the messages say kept apart from what it means.

A message may contain the spelling of a control token. So that it stays text, a sentinel character that occurs
nowhere else is put after every character in the messages with which a control token can begin; the rendered text is
split at control tokens, and the sentinel is taken out of the stretches between them. Strings that the template itself
looks for in messages (`</think>`) are left whole, where they can be no part of a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from millis.tokenizer.special import first_characters
from millis.tokenizer.template import Template
from millis.types import RequestError, TemplateError

_MAX_DEPTH = 32
# Roles that templates write into special tokens themselves, as in <|user|>.
_ROLES = frozenset(("system", "user", "assistant", "tool", "developer", "function", "model", "ipython", "observation"))


class Chat:
    """One model's chat template, if it has one, and the special tokens it may write."""

    def __init__(self, source: str | None, special: Mapping[str, str], control: Mapping[str, int]) -> None:
        self.source = source
        self._special = dict(special)  # bos_token, eos_token
        self._control = control
        self._template: Template | None = None
        self._pattern: re.Pattern[str] | None = None

    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        return self._compiled().variables

    def text(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The rendered conversation."""
        return self._compiled().render(self._variables(check_messages(messages), plain(variables, "", _MAX_DEPTH)))

    def guarded_text(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> tuple[str, str]:
        """The rendered conversation with the sentinel in it, and the sentinel."""
        template = self._compiled()
        checked, variables = check_messages(messages), plain(variables, "", _MAX_DEPTH)
        for i, message in enumerate(checked):
            self._check_role(i, message["role"])
        sentinel = _unused_character(json.dumps([checked, variables], ensure_ascii=False) + template.source)
        if self._pattern is not None:
            checked, variables = _guard([checked, variables], self._pattern, sentinel)
        return template.render(self._variables(checked, variables)), sentinel

    def _compiled(self) -> Template:
        if self.source is None:
            raise TemplateError("the model has no chat template: it is a base model; use generate instead of chat")
        if self._template is None:
            template = Template(self.source)
            self._pattern = _guard_pattern(self._control, template.literals)
            self._template = template
        return self._template

    def _variables(self, messages: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in variables.items():
            known = name in self._compiled().variables or name == "add_generation_prompt"
            if value is not None and not known:
                raise RequestError(f"{name} is not a variable of the model's chat template, which would ignore it")
        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        return {**self._special, **defaults, **variables, "messages": messages}

    def _check_role(self, i: int, role: str) -> None:
        if role not in _ROLES and any(role in token for token in self._control):
            raise RequestError(f"messages[{i}].role {role!r:.40} is part of a special token; use user or assistant")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of `messages` made of plain data; RequestError names the index and field that is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(f"messages must be a list of dictionaries, not {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty; give at least one message")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{i}] must be a dictionary, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"messages[{i}].role must be a non-empty text, not {role!r:.40}")
    content = message.get("content")
    if not isinstance(content, (str, list, tuple)) and not (content is None and message.get("tool_calls")):
        raise RequestError(f"messages[{i}].content must be a text, not {content!r:.40}")
    copy: dict[str, Any] = plain(message, f"messages[{i}]", _MAX_DEPTH)
    return copy


def plain(value: Any, where: str, depth: int) -> Any:
    """A copy of `value` made of dictionaries, lists, texts, numbers, booleans and None only."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value, where)
        return str(value)
    if depth == 0:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where} must have texts as keys")
        return {_key(key, where): plain(item, f"{where}.{key}".lstrip("."), depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
    raise RequestError(f"{where} must be a text, number, list or dictionary, not {type(value).__name__}")


def _key(key: str, where: str) -> str:
    _check_unicode(key, where)
    return str(key)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} holds a lone surrogate at position {error.start}; send valid Unicode") from None


def _guard_pattern(control: Mapping[str, int], literals: Sequence[str]) -> re.Pattern[str] | None:
    firsts = first_characters(control)
    if firsts is None:
        return None
    kept = [text for text in literals if firsts.search(text) and not _overlaps(text, control, firsts)]
    kept.sort(key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, kept), firsts.pattern]))


def _overlaps(text: str, control: Mapping[str, int], firsts: re.Pattern[str]) -> bool:
    """Whether a control token could begin inside `text`."""
    tails = [text[match.start() :] for match in firsts.finditer(text)]
    return any(tail.startswith(token) or token.startswith(tail) for tail in tails for token in control)


def _guard(value: Any, pattern: re.Pattern[str], sentinel: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0] if len(match[0]) > 1 else match[0] + sentinel, value)
    if isinstance(value, dict):
        return {_guard(key, pattern, sentinel): _guard(item, pattern, sentinel) for key, item in value.items()}
    if isinstance(value, list):
        return [_guard(item, pattern, sentinel) for item in value]
    return value


def _unused_character(text: str) -> str:
    """A private-use character that is not in `text`."""
    used = set(text)
    for code in range(0xE000, 0xF900):
        if chr(code) not in used:
            return chr(code)
    raise RequestError("the messages use every private-use character; none is left to guard special tokens with")
