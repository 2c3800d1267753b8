"""From token ids to the text a reader may see: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns ids into text as they come; see millis.tokenizer."""

    def push(self, token: int) -> str:
        """The new whole characters that `token` completes."""
        ...


class TextStream:
    """Assembles an answer's text. What could be the beginning of a stop string is held back until it is not.

    Where an answer is cut inside a character, the text ends before it. The stop string that is complete first counts,
    the longest of them where several are: so the text does not depend on where tokens begin and end.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""  # all that was handed out
        self.stopped = False
        self.stopped_by: str | None = None  # the stop string that ended it
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` makes visible, maybe none; sets `stopped` once a stop string is complete."""
        text = self._held + self._detokenizer.push(token)
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, keep, self.stopped_by = min(found)
        else:
            keep = len(text) - self._overlap(text)
        self._held = "" if found else text[keep:]
        return self._hand_out(text[:keep])

    def finish(self) -> str:
        """What was held back for a stop string, when no more tokens come."""
        held, self._held = self._held, ""
        return self._hand_out(held)

    def _hand_out(self, text: str) -> str:
        self.text += text
        return text

    def _overlap(self, text: str) -> int:
        """Characters at the end of `text` that begin some stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
