"""From token ids to the text a reader may see: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns ids into text as they come; see millis.tokenizer."""

    def push(self, token: int) -> str:
        """The new whole characters that `token` completes."""
        ...

    def flush(self) -> str:
        """What was held back for an unfinished character."""
        ...


class TextStream:
    """Assembles an answer's text. What could be the beginning of a stop string is held back until it is not."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""  # all that was handed out
        self.stopped = False
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` makes visible, maybe none; sets `stopped` once a stop string is complete."""
        return self._release(self._held + self._detokenizer.push(token), last=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self.stopped else self._release(self._held + self._detokenizer.flush(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep, self._held = min(found), ""
        else:
            keep = len(text) if last else len(text) - self._overlap(text)
            self._held = text[keep:]
        self.text += text[:keep]
        return text[:keep]

    def _overlap(self, text: str) -> int:
        """Characters at the end of `text` that begin some stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
