"""truncation=auto: what is left of a conversation that is too long, against every way to shorten it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_support import job
from millis.server.api.truncation import answer_room, fitting

KINDS = st.lists(st.sampled_from(["u", "a", "ct", "ctt", "s"]), max_size=12)  # a call stands before its results
ROLES = {"u": "user", "a": "assistant", "c": "assistant", "t": "tool", "s": "system"}


def encode(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A token a character, which says whose it is."""
    return [one["number"] for one in messages for _ in one["content"]]


@given(KINDS, st.integers(0, 60), st.data())
def test_as_little_as_possible_is_left_out(kinds: list[str], room: int, data: st.DataObject) -> None:
    letters = "".join(kinds)
    texts = ["x" * data.draw(st.integers(1, 9)) for _ in letters]
    messages = [{"role": ROLES[c], "content": texts[i], "number": i, "kind": c} for i, c in enumerate(letters)]
    found = fitting(messages, encode, room)
    kept = [one for one in messages if one["number"] in found]
    assert found == encode(kept)
    last = letters.rfind("u")
    assert all(one in kept for i, one in enumerate(messages) if one["role"] == "system" or i == last)
    for i, one in enumerate(messages):
        if one["kind"] == "t":  # a call is left out with its results
            assert (one in kept) == (messages[i - 1] in kept)
    movable = [i for i, one in enumerate(messages) if one["role"] != "system" and i != last]
    dropped = [i for i in movable if messages[i] not in kept]
    assert dropped == movable[: len(dropped)]  # the oldest
    for count in range(len(dropped)):  # had fewer been left out, it had not fit, or not begun as a conversation may
        rest = [one for one in messages if one["number"] not in movable[:count]]
        begin = next((one for one in rest if one["number"] in movable[count:]), None)
        if count and begin is not None and begin["role"] != ("user" if begin["number"] < last else "assistant"):
            continue
        assert len(encode(rest)) > room
    if len(found) > room and dropped != movable:  # no more can be: the last step of the model
        assert sum(letters[movable[len(dropped)] :].count(kind) for kind in "ac") == 1


def test_room_is_left_for_the_answer() -> None:
    assert (answer_room(1000, 100), answer_room(1000, None)) == (900, 750)


@pytest.mark.parametrize(("value", "expected"), [("auto", True), ("disabled", False), (None, False)])
def test_a_request_says_whether(value: str | None, expected: bool) -> None:
    found = job("responses", truncation=value)
    assert found.drops_oldest == expected
    assert found.extra["truncation"] == (value or "disabled")
