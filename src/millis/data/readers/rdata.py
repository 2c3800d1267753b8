"""R's lazy-load databases (.rdx, .rdb), as far as vectors of strings go.

The index is a compressed, serialised list: names, and for each the offset and the length of its entry in the database;
an entry is its unpacked size, four bytes big-endian, and a zlib stream (R sources, src/main/serialize.c).
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from millis.types import DataError

SYMBOL, PAIRS, STRING, LOGICALS, INTEGERS, STRINGS, LIST = 1, 2, 9, 10, 13, 16, 19
NIL, REFERENCE = 254, 255
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10
LIMIT_BYTES = 1 << 26


def strings(index: bytes, base: bytes) -> dict[str, list[str]]:
    """The vectors of strings of a database by name. Raises DataError for bytes that are not one."""
    try:
        variables = _Reader(_inflate(index)).read()["variables"]
        entries = {name: base[offset + 4 : offset + size] for name, (offset, size) in variables.items()}
        return {name: _Reader(_inflate(entry)).read() for name, entry in entries.items()}
    except (zlib.error, struct.error, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the R database is damaged or of another kind ({error!r})") from error


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip: the index may be either
    plain = stream.decompress(data, LIMIT_BYTES)
    if not stream.eof:
        raise ValueError("cut short or too long")
    return plain


class _Reader:
    """R's binary serialisation (XDR), the types that such a database needs."""

    def __init__(self, data: bytes) -> None:
        version = struct.unpack_from(">i", data, 2)[0]
        if data[:2] != b"X\n" or version not in (2, 3):
            raise ValueError("not R's XDR serialisation")
        self.data, self.at, self.symbols = data, 14, []  # type: bytes, int, list[str]
        if version == 3:
            self._bytes(self._int())  # the writer's encoding

    def read(self) -> Any:
        """One object: a string, a list of strings or of integers, or a dictionary for a list with names."""
        flags = self._int()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.symbols.append(self.read())
            return self.symbols[-1]
        if kind == STRING:
            size = self._int()
            return None if size < 0 else self._bytes(size).decode("utf-8")
        if kind == PAIRS:
            return self._pairs(flags)
        return self._vector(kind, flags)

    def _vector(self, kind: int, flags: int) -> Any:
        count = self._int()
        if kind in (LOGICALS, INTEGERS):
            values: list[Any] = list(struct.unpack(f">{count}i", self._bytes(4 * count)))
        elif kind in (STRINGS, LIST):
            values = [self.read() for _ in range(count)]
        else:
            raise ValueError(f"type {kind}")
        attributes = self.read() if flags & HAS_ATTRIBUTES else {}
        names = attributes.get("names")
        return values if names is None else dict(zip(names, values, strict=True))

    def _pairs(self, flags: int) -> dict[str, Any]:
        """A pair list as a dictionary of its tags."""
        if flags & HAS_ATTRIBUTES:
            self.read()
        tag = self.read() if flags & HAS_TAG else ""
        value, rest = self.read(), self.read()
        return {tag: value, **(rest or {})}

    def _int(self) -> int:
        return int(struct.unpack(">i", self._bytes(4))[0])

    def _bytes(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError("cut short")
        self.at += count
        return self.data[self.at - count : self.at]
