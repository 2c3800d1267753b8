"""A chat's bounded memory: the oldest turns go whole, and a message that cannot fit is refused."""

from __future__ import annotations

from typing import Any

import pytest

from millis.tasks.memory import fitting, transcript
from millis.types import RequestError


def count(messages: list[dict[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_the_oldest_turns_go_whole() -> None:
    opening = [turn("system", "ss")]
    turns = [
        turn("user", "aaaa"),
        turn("assistant", "bbbb"),
        turn("user", "cc"),
        turn("assistant", "d"),
        turn("user", "e"),
    ]
    assert fitting(opening, turns, 14, count) == (turns, [])
    assert fitting(opening, turns, 13, count) == (turns[2:], turns[:2])
    assert fitting(opening, turns, 5, count) == (turns[4:], turns[:4])
    with pytest.raises(RequestError, match="does not fit a memory of 2 tokens"):
        fitting(opening, turns, 2, count)


def test_a_long_conversation_is_not_counted_turn_by_turn() -> None:
    asked = 0

    def counted(messages: list[dict[str, Any]]) -> int:
        nonlocal asked
        asked += 1
        return count(messages)

    turns = [turn(role, "aaaa") for _ in range(500) for role in ("user", "assistant")]
    kept, gone = fitting([], [*turns, turn("user", "b")], 50, counted)
    assert (len(kept), len(gone), asked) == (13, 988, pytest.approx(11, abs=1))


def test_a_transcript_says_who_spoke() -> None:
    assert transcript([turn("user", "hi"), turn("assistant", "yes?")]) == "user: hi\nassistant: yes?"
