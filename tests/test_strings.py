"""Arrays of strings read natively: what GGUF's layout says, and bytes that lie about their lengths."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from millis import _native
from millis.models.gguf_values import StringArray
from millis.types import FormatError

TEXTS = ["", "a", "naïve", "秋天", "\u0000", "🙂" * 100]


def layout(texts: list[bytes]) -> np.ndarray:
    """Each string as the specification stores it: its length in 8 bytes, then its bytes."""
    return np.frombuffer(b"".join(struct.pack("<Q", len(text)) + text for text in texts), np.uint8)


def places_of(texts: list[bytes]) -> list[int]:
    return np.cumsum([0, *(8 + len(text) for text in texts)])[:-1].tolist()


@pytest.mark.parametrize("before", [0, 1, 13])
def test_strings_are_found_and_read(before: int) -> None:
    encoded = [text.encode() for text in TEXTS]
    data = np.concatenate([np.full(before, 255, np.uint8), layout(encoded), np.full(9, 255, np.uint8)])
    places = _native.string_places(data, before, len(TEXTS))
    assert places.tolist() == [before + place for place in places_of(encoded)]
    assert _native.strings(data, places) == TEXTS
    assert _native.strings(data, np.ascontiguousarray(places[::-2])) == TEXTS[::-2]


def test_nothing_to_read() -> None:
    empty = np.zeros(0, np.uint8)
    assert _native.string_places(empty, 0, 0).tolist() == _native.string_places(empty, 0, 5).tolist() == []
    assert _native.strings(empty, np.zeros(0, np.uint64)) == []


@pytest.mark.parametrize("cut", range(1, 24))
def test_data_that_ends_inside_a_string(cut: int) -> None:
    encoded = [b"first", b"second", b"third"]
    data = layout(encoded)[:-cut]
    whole = [
        place for place, text in zip(places_of(encoded), encoded, strict=True) if place + 8 + len(text) <= len(data)
    ]
    assert _native.string_places(data, 0, 3).tolist() == whole
    assert _native.strings(data, np.array(places_of(encoded), np.uint64)) == ["first", "second", "third"][: len(whole)]


@pytest.mark.parametrize("length", [2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 9, 2**64 - 8, 2**64 - 1])
def test_lengths_that_cannot_be(length: int) -> None:
    data = np.frombuffer(struct.pack("<Q", 1) + b"a" + struct.pack("<Q", length) + b"b", np.uint8)
    assert _native.string_places(data, 0, 2**63).tolist() == [0]
    assert _native.strings(data, np.array([0, 9, 0], np.uint64)) == ["a"]


@pytest.mark.parametrize("place", [18, 17, 11, 2**32, 2**63, 2**64 - 8, 2**64 - 1])
def test_places_outside_the_data(place: int) -> None:
    data = layout([b"a", b"b"])
    assert _native.strings(data, np.array([9, place], np.uint64)) == ["b"]
    assert _native.string_places(data, place, 1).tolist() == []


def test_bytes_that_are_not_utf8_are_named() -> None:
    data = layout([b"good", b"\xff\xfe", b"good"])
    places = _native.string_places(data, 0, 3)
    assert _native.strings(data, places) == ["good"]
    strings = StringArray("some.key", data, places)
    assert (len(strings), strings[0], strings[2]) == (3, "good", "good")
    assert list(strings[::2]) == ["good", "good"]
    with pytest.raises(FormatError, match="a string of 'some.key' is not UTF-8, at byte 20"):
        list(strings)
