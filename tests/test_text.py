"""TextStream: pieces that join to the text before the first stop string, wherever tokens begin and end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millis.tasks.text import TextStream


class Table:
    """A detokenizer whose token t is the t-th string of bytes."""

    def __init__(self, tokens: Sequence[bytes | str]) -> None:
        self._tokens = [token.encode() if isinstance(token, str) else token for token in tokens]
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokens[token])


def pieces(tokens: Sequence[bytes | str], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What comes out token by token, until it stops, and then the rest."""
    stream = TextStream(Table(tokens), stop)
    out = []
    for token in range(len(tokens)):
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


def plain(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The rule, read one character at a time: where a stop string first ends, the text goes up to its beginning."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_without_stop_strings_every_token_comes_at_once() -> None:
    assert pieces(["Hello", ",", " world"])[0] == ["Hello", ",", " world", ""]


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        (["one END two"], ["END"], "one "),
        (["one E", "N", "D two"], ["END"], "one "),
        (["one E", "N", "d two"], ["END"], "one ENd two"),
        (["one EEN", "D"], ["END"], "one E"),
        (["\n", "\n", "x"], ["\n\n"], ""),
        (["a", "b", "c"], ["abc", "b"], "a"),
        (["abcd"], ["bcd", "c"], "ab"),
        (["xEN"], ["END"], "xEN"),
        (["说完", "了。", "好"], ["了。好"], "说完"),
    ],
)
def test_stop_strings(tokens: list[str], stop: list[str], text: str) -> None:
    out, stream = pieces(tokens, stop)
    assert "".join(out) == stream.text == text


def test_what_may_begin_a_stop_string_is_held_back_and_no_more() -> None:
    assert pieces(["one E", "N", "d"], ["END"])[0] == ["one ", "", "ENd", ""]
    assert pieces(["one E", "N"], ["END"])[0] == ["one ", "", "EN"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_characters_come_whole(cut: int) -> None:
    whole = "天🙂".encode()
    out, _ = pieces([whole[:cut], whole[cut:4], whole[4:]])
    assert "".join(out) == "天🙂"
    assert all("\ufffd" not in piece for piece in out)


def test_an_answer_cut_inside_a_character_ends_before_it() -> None:
    out, stream = pieces(["好", "天".encode()[:2]])
    assert "".join(out) == stream.text == "好"


@given(
    text=st.text("ab天\n", max_size=24),
    stop=st.lists(st.text("ab天\n", min_size=1, max_size=4), max_size=3),
    borders=st.lists(st.integers(0, 80), max_size=12),
)
def test_the_text_does_not_depend_on_where_tokens_end(text: str, stop: list[str], borders: list[int]) -> None:
    data = text.encode()
    cuts = [0, *sorted(min(border, len(data)) for border in borders), len(data)]
    out, stream = pieces([data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)], stop)
    assert ("".join(out), stream.stopped) == plain(text, stop)
    assert stream.stopped == (stream.stopped_by is not None)
    if stream.stopped_by is not None:
        assert text.startswith(stream.text + stream.stopped_by) and stream.stopped_by in stop
    assert stream.text == "".join(out)
