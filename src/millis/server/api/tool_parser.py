"""Finds tool calls in an answer as it is written. What may become a call is held back until it is one or is not."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from millis.server.api.tools import CLOSE, OPEN


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model wrote. `arguments` is a JSON object, as text."""

    name: str
    arguments: str


Piece = str | Call


class ToolParser:
    """Text in as it comes, pieces out: text and whole calls in their order.

    A call is `<tool_call>{"name": …, "arguments": {…}}</tool_call>` of a known tool; anything else stays text. White
    space around calls is dropped.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._inside = False
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        """What `text` makes sure of."""
        self._held += text
        pieces: list[Piece] = []
        while self._inside or OPEN in self._held:
            if not self._inside:
                before, _, self._held = self._held.partition(OPEN)
                _append(pieces, before.rstrip())
                self._inside = True
            if CLOSE not in self._held:
                return pieces
            body, _, rest = self._held.partition(CLOSE)
            call = self._call(body)
            self._inside, self._held = False, rest
            if call is None:
                _append(pieces, OPEN + body + CLOSE)
            else:
                pieces.append(call)
                self._after_call = True
        if self._after_call:
            self._held = self._held.lstrip()
        keep = _unsure(self._held)
        if keep:
            self._after_call = False
        _append(pieces, self._held[:keep])
        self._held = self._held[keep:]
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, when no more text comes. A call that was cut short stays text."""
        held = OPEN + self._held if self._inside else self._held
        self._held, self._inside = "", False
        return [held] if held and not (self._after_call and not held.strip()) else []

    def _call(self, body: str) -> Call | None:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return None
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


def _append(pieces: list[Piece], text: str) -> None:
    if not text:
        return
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] += text
    else:
        pieces.append(text)


def _unsure(text: str) -> int:
    """Where the end of `text` begins that may still belong to a call: white space, and what begins its tag."""
    for n in range(min(len(text), len(OPEN) - 1), 0, -1):
        if OPEN.startswith(text[-n:]):
            text = text[:-n]
            break
    return len(text.rstrip())
