"""`truncation: "auto"`: a conversation without its oldest turns, so that what is left fits. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANSWER_SHARE = 4  # of the context, one part in so many is left for an answer whose length was not said


def answer_room(context: int, max_tokens: int | None) -> int:
    """Tokens that a prompt may have where a sequence may have `context` of them."""
    return context - (context // ANSWER_SHARE if max_tokens is None else max_tokens)


def fitting(
    messages: Sequence[Mapping[str, Any]], encode: Callable[[Sequence[Mapping[str, Any]]], list[int]], room: int
) -> list[int]:
    """The ids of the conversation without as few of its oldest turns as leave `room` tokens or fewer.

    Where nothing may be left out any more, those of what is left: system messages, the last one of the user and, behind
    it, the last step of the model.
    """
    ids = encode(messages)
    starts = _starts(messages)
    if len(ids) <= room or not starts:
        return ids

    def rest(i: int) -> list[int]:
        return encode(_from(messages, starts[i]))

    found = bisect_left(range(len(starts) - 1), True, key=lambda i: len(rest(i)) <= room)
    return rest(found)


def _starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where a conversation may begin that has lost its oldest turns, a call and its result always together."""
    last = _last_of_user(messages)
    return [i for i, one in enumerate(messages) if one["role"] == ("user" if i <= last else "assistant")]


def _from(messages: Sequence[Mapping[str, Any]], start: int) -> list[Mapping[str, Any]]:
    last = _last_of_user(messages)
    return [one for i, one in enumerate(messages) if i >= start or i == last or one["role"] == "system"]


def _last_of_user(messages: Sequence[Mapping[str, Any]]) -> int:
    return max((i for i, one in enumerate(messages) if one["role"] == "user"), default=-1)
