"""Finds tool calls in an answer as it is written. What may become a call is held back until it is one or is not.

A call is `<tool_call>{"name": …, "arguments": {…}}</tool_call>` of a known tool. Small models forget the tags: where
the answer may be any text, one that begins with such an object, bare or in a ```json block, begins with a call too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from millis.server.api.tools import CLOSE, OPEN

_FENCE = "```"
_BEGINNINGS = ('{"name":', _FENCE + 'json{"name":', _FENCE + '{"name":')  # without white space
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model wrote. `arguments` is a JSON object, as text."""

    name: str
    arguments: str


Piece = str | Call


class ToolParser:
    """Text in as it comes, pieces out: text and whole calls in their order, without the white space around calls.

    `bare`: calls without tags may stand where the answer begins.
    """

    def __init__(self, names: Collection[str], *, bare: bool = False) -> None:
        self._names = frozenset(names)
        self._bare = bare  # a call without tags may stand here
        self._held = ""
        self._inside = False  # behind an opening tag
        self._space = ""  # what stood before it
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        """What `text` makes sure of."""
        self._held += text
        pieces = self._bare_calls(done=False)
        return pieces if self._bare else pieces + self._tagged_calls()

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """What was held back, when no more text comes. What begins a call and ends as none is text.

        cut: the text was ended from without. A call that it ends in is then no call, and no text for readers either.
        """
        bare = self._bare
        pieces = self._bare_calls(done=True)
        if cut and bare and "".join(self._held[:64].split()).startswith(_BEGINNINGS):
            self._held = ""
        self._bare = False
        pieces += self._tagged_calls()
        call = self._call(self._held) if self._inside else None  # the closing tag alone is missing
        if call is not None:
            pieces.append(call)
        elif not (cut and self._inside):
            self._say(pieces, self._space + OPEN + self._held if self._inside else self._held)
        self._held, self._inside = "", False
        return pieces

    def _bare_calls(self, done: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._bare:
            text = self._held.lstrip()
            if self._after_call and text.startswith(CLOSE):  # of a tag that was not opened
                self._held = text.removeprefix(CLOSE)
                continue
            if self._after_call and CLOSE.startswith(text) and not done:
                break
            begun = "".join(text[:64].split())
            if not any(form.startswith(begun) or begun.startswith(form) for form in _BEGINNINGS):
                self._bare = False
                break
            found = _object(text, done)
            if found is None:
                break
            value, rest = found
            call = self._checked(value)
            if call is None:
                self._bare = False
                break
            pieces.append(call)
            self._held, self._after_call = rest.lstrip(), True
        return pieces

    def _tagged_calls(self) -> list[Piece]:
        pieces: list[Piece] = []
        while self._inside or OPEN in self._held:
            if not self._inside:
                before, _, self._held = self._held.partition(OPEN)
                self._say(pieces, before.rstrip())
                self._space = before[len(before.rstrip()) :]
                self._inside = True
            if CLOSE not in self._held:
                return pieces
            body, _, rest = self._held.partition(CLOSE)
            call = self._call(body)
            self._inside, self._held = False, rest
            if call is None:
                self._say(pieces, self._space + OPEN + body + CLOSE)
            else:
                pieces.append(call)
                self._after_call = True
        keep = _unsure(self._held)
        self._say(pieces, self._held[:keep])
        self._held = self._held[keep:]
        return pieces

    def _say(self, pieces: list[Piece], text: str) -> None:
        """Hands out text, without the white space that follows a call."""
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            pieces.append(text)

    def _call(self, body: str) -> Call | None:
        try:
            return self._checked(json.loads(body))
        except (ValueError, RecursionError):
            return None

    def _checked(self, found: Any) -> Call | None:
        """`found` as a call of a known tool; arguments may be JSON in a text, as some models write them."""
        if not isinstance(found, dict) or set(found) != {"name", "arguments"}:
            return None
        if not isinstance(found["name"], str) or found["name"] not in self._names:
            return None
        arguments: Any = found["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(found["name"], json.dumps(arguments, ensure_ascii=False))


def _object(text: str, done: bool) -> tuple[Any, str] | None:
    """The JSON at the beginning of `text`, bare or fenced, and what follows it; None while more of it may come.

    What can be no JSON any more is (None, text).
    """
    at = text.find("{")
    if at < 0 or (not done and text.count("{") > text.count("}")):
        return (None, text) if done else None
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        cut = isinstance(error, json.JSONDecodeError) and (
            error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())
        )
        return None if cut and not done else (None, text)
    rest = text[end:]
    if not text.startswith(_FENCE):
        return value, rest
    if not done and _FENCE.startswith(rest.strip()) and rest.strip() != _FENCE:
        return None
    return value, rest.lstrip().removeprefix(_FENCE)


def _unsure(text: str) -> int:
    """Where the end of `text` begins that may still belong to a call: white space, and what begins its tag."""
    for n in range(min(len(text), len(OPEN) - 1), 0, -1):
        if OPEN.startswith(text[-n:]):
            text = text[:-n]
            break
    return len(text.rstrip())
