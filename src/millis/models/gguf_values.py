"""GGUF's key-values, read from mapped bytes by a cursor that trusts no length.

Scalars become int, float, bool or str; an array of numbers becomes a NumPy view of the file, an array of strings a
`StringArray`. So what parsing allocates stays below the file's size, whatever the file claims.
Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.types import FormatError

_MAX_KEYS = 1 << 14
_MAX_KEY_BYTES = 65535  # the specification's
_MAX_TEXT_BYTES = 1 << 26  # of all strings outside arrays together
_STRING, _ARRAY = 8, 9
_NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")  # by value type


class StringArray(Sequence[str]):
    """Strings that stay in the file until asked for; one that is not UTF-8 raises FormatError then."""

    __slots__ = ("_data", "_key", "_places")

    def __init__(self, key: str, data: NDArray[np.uint8], places: NDArray[np.uint64]) -> None:
        """`places`: where in `data` each string's 8-byte length lies."""
        self._key = key
        self._data = data
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> StringArray: ...
    def __getitem__(self, index: int | slice) -> str | StringArray:
        if isinstance(index, slice):
            return StringArray(self._key, self._data, np.ascontiguousarray(self._places[index]))
        return self._text(int(self._places[index]))

    def __iter__(self) -> Iterator[str]:
        texts = _native.strings(self._data, self._places)
        for place in self._places[len(texts) :]:
            texts.append(self._text(int(place)))  # raises, and says where
        return iter(texts)

    def _text(self, place: int) -> str:
        start = place + 8
        bytes = self._data.data
        end = start + int.from_bytes(bytes[place:start], "little")
        try:
            return str(bytes[start:end], "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"a string of {self._key!r:.80} is not UTF-8, at byte {start}") from None


class Cursor:
    """A position in the file's bytes; every read names what it reads, for the error when the file ends inside it."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        self.bytes = data.data
        self.at = 0
        self._text_bytes = 0

    @property
    def left(self) -> int:
        """Bytes from here to the end."""
        return len(self.bytes) - self.at

    def skip(self, count: int, what: str) -> int:
        """Moves past `count` bytes of `what`; returns where they start."""
        if count > self.left:
            raise FormatError(f"the file ends inside {what}, at byte {len(self.bytes)}; pull it again")
        start, self.at = self.at, self.at + count
        return start

    def number(self, format: str, what: str) -> Any:
        """One little-endian number of a `struct` format."""
        return struct.unpack_from("<" + format, self.bytes, self.skip(struct.calcsize("<" + format), what))[0]

    def text(self, what: str, limit_bytes: int = _MAX_TEXT_BYTES) -> str:
        """A string: its length in 8 bytes, then UTF-8."""
        length = self.number("Q", f"the length of {what}")
        self._text_bytes += length
        if length > limit_bytes or self._text_bytes > _MAX_TEXT_BYTES:
            raise FormatError(f"{what} is {length} bytes long, beyond what Millis reads")
        start = self.skip(length, what)
        try:
            return str(self.bytes[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{what} is not UTF-8") from None


def read_key_values(cursor: Cursor, count: int, exact: bool = False) -> dict[str, Any]:
    """`count` key-values, in the file's order; `exact`: numbers as NumPy scalars of the file's type. FormatError."""
    if count > _MAX_KEYS or count * 13 > cursor.left:  # 13 bytes: an empty key and a value of one byte
        raise FormatError(f"the header claims {count} key-values, more than it can hold; pull it again")
    found: dict[str, Any] = {}
    for index in range(count):
        key = cursor.text(f"key {index}", _MAX_KEY_BYTES)
        if key in found:
            raise FormatError(f"the key {key!r:.80} appears twice")
        value = _value(cursor, key)
        found[key] = value.item() if isinstance(value, np.generic) and not exact else value
    return found


def _value(cursor: Cursor, key: str) -> Any:
    what = f"the value of {key!r:.80}"
    kind = cursor.number("I", f"the type of {key!r:.80}")
    if kind == _STRING:
        return cursor.text(what)
    if kind == _ARRAY:
        return _array(cursor, key)
    return _numbers(cursor, kind, 1, key)[0]


def _array(cursor: Cursor, key: str) -> NDArray[Any] | StringArray:
    kind = cursor.number("I", f"the element type of {key!r:.80}")
    count = cursor.number("Q", f"the element count of {key!r:.80}")
    if kind == _ARRAY:
        raise FormatError(f"{key!r:.80} is an array of arrays, which Millis does not read")
    return _strings(cursor, count, key) if kind == _STRING else _numbers(cursor, kind, count, key)


def _numbers(cursor: Cursor, kind: int, count: int, key: str) -> NDArray[Any]:
    """`count` numbers [count]: a view of the file."""
    if not (kind < len(_NUMBERS) and _NUMBERS[kind]):
        raise FormatError(f"{key!r:.80} has the value type {kind}, which the GGUF specification does not define")
    dtype = np.dtype(_NUMBERS[kind])
    start = cursor.skip(count * dtype.itemsize, f"the {count} numbers of {key!r:.80}")
    raw = cursor.data[start : cursor.at]
    if dtype == np.bool_ and raw.size and raw.max() > 1:
        raise FormatError(f"{key!r:.80} holds a truth value that is neither 0 nor 1")
    return raw.view(dtype)


def _strings(cursor: Cursor, count: int, key: str) -> StringArray:
    """Finds where each string lies without reading any: a vocabulary may hold a quarter of a million."""
    if count * 8 > cursor.left:
        raise FormatError(f"the file ends inside the {count} strings of {key!r:.80}; pull it again")
    places = _native.string_places(cursor.data, cursor.at, count)
    if len(places) < count:
        raise FormatError(f"the file ends inside string {len(places)} of {key!r:.80}; pull it again")
    if count:
        cursor.at = int(places[-1])
        cursor.skip(cursor.number("Q", "a length"), "a string")
    return StringArray(key, cursor.data, places)
