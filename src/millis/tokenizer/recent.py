"""Ids of texts that were encoded of late: a system prompt and a conversation's earlier turns come again and again."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable

MOST = 1 << 20  # characters of all texts together, and of EACH for each
EACH = 64


class Recent:
    """The texts used last, up to `most` characters together, counted as MOST is. Safe to use from many threads."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._ids: OrderedDict[tuple[Hashable, str], array[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def encoder(self, encode: Callable[[str], list[int]], key: Hashable) -> Callable[[str], list[int]]:
        """`encode`, which is not called for a text that it was given under the same key of late.

        key: what else the ids depend on, and whose texts they are: that one was here before is told by the time.
        """

        def encoded(text: str) -> list[int]:
            if _size(text) > self._most // 4:
                return encode(text)
            with self._lock:
                ids = self._ids.get((key, text))
                if ids is not None:
                    self._ids.move_to_end((key, text))
                    return ids.tolist()
            found = encode(text)
            self._keep((key, text), array("i", found))
            return found

        return encoded

    def _keep(self, place: tuple[Hashable, str], ids: array[int]) -> None:
        with self._lock:
            if place not in self._ids:
                self._size += _size(place[1])
            self._ids[place] = ids
            while self._size > self._most:
                (_, text), _ = self._ids.popitem(last=False)
                self._size -= _size(text)


def _size(text: str) -> int:
    return len(text) + EACH
