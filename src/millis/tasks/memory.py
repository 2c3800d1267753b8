"""A conversation's memory of bounded length: its oldest turns go, or are summarized, when there are too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from millis.types import RequestError

Messages = list[dict[str, Any]]


def fitting(
    opening: Messages, turns: Messages, most_tokens: int, count: Callable[[Messages], int]
) -> tuple[Messages, Messages]:
    """(the turns that are kept, those that go), so that with `opening` they are `most_tokens` at most.

    A turn is a question with its answer, and goes whole, the oldest first. RequestError: the last question alone is
    too long.
    """
    kept, gone = list(turns), []
    while count([*opening, *kept]) > most_tokens:
        end = next((i for i in range(1, len(kept)) if kept[i]["role"] == "user"), None)
        if end is None:
            raise RequestError(f"the message does not fit a memory of {most_tokens} tokens; shorten it, or allow more")
        gone += kept[:end]
        kept = kept[end:]
    return kept, gone


def transcript(turns: Sequence[dict[str, Any]]) -> str:
    """Turns as a text to be summarized."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
