"""A conversation's memory of bounded length: its oldest turns go, or are summarized, when there are too many."""

from __future__ import annotations

from bisect import bisect_left
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

    def fits(start: int) -> bool:
        return count([*opening, *turns[start:]]) <= most_tokens

    if fits(0):
        return list(turns), []
    questions = [i for i in range(1, len(turns)) if turns[i]["role"] == "user"]
    found = bisect_left(questions, True, key=fits)
    if found == len(questions):
        raise RequestError(f"the message does not fit a memory of {most_tokens} tokens; shorten it, or allow more")
    return turns[questions[found] :], turns[: questions[found]]


def transcript(turns: Sequence[dict[str, Any]]) -> str:
    """Turns as a text to be summarized."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
