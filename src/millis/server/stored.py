"""Responses that clients asked to have kept: in memory, within bounds, each API key's apart; gone with the process."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from millis.server.api.fields import compact
from millis.server.api.writer import to_json

OVERHEAD_BYTES = 1024  # of a kept response, beside its JSON
PREFIXES = {"message": "msg", "reasoning": "rs"}  # of an item's id, by its type; of a call and its output, fc


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, and what it answers: its own input, behind the response before it. Both are JSON."""

    id: str
    response: bytes
    input: bytes
    previous: str | None
    items: tuple[str, ...]  # ids, of its input and of its output

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.response) + len(self.input) + OVERHEAD_BYTES

    def output(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.response)["output"]
        return found


@dataclass(slots=True)
class _Shelf:
    """One key's, the one that was not used for longest first."""

    kept: dict[str, Kept] = field(default_factory=dict)
    items: dict[str, str] = field(default_factory=dict)  # the id of an item → that of its response
    size: int = 0

    def put(self, one: Kept) -> None:
        self.kept[one.id] = one
        self.items.update(dict.fromkeys(one.items, one.id))
        self.size += one.size

    def drop(self, response_id: str) -> None:
        one = self.kept.pop(response_id)
        self.size -= one.size
        for item in one.items:
            if self.items.get(item) == response_id:
                del self.items[item]


class Stored:
    """The responses of all keys: at most `most`, of `most_bytes` together. Any thread may ask.

    Where there is no room, the key that has the most loses what it has not used for longest.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._shelves: dict[str, _Shelf] = {}
        self._lock = threading.Lock()

    def keep(self, tenant: str, one: Kept) -> None:
        with self._lock:
            self._shelves.setdefault(tenant, _Shelf()).put(one)
            while self._count() > self.most or self._size() > self.most_bytes:
                name, shelf = max(self._shelves.items(), key=lambda one: one[1].size)
                shelf.drop(next(iter(shelf.kept)))
                if not shelf.kept:
                    del self._shelves[name]

    def chain(self, tenant: str, response_id: str) -> list[Kept]:
        """The response and all before it, the oldest first. KeyError: the id of one that is not there."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            found: list[Kept] = []
            at: str | None = response_id
            while at is not None:
                found.insert(0, shelf.kept[at])
                at = found[0].previous
            for one in found:  # used just now
                shelf.kept[one.id] = shelf.kept.pop(one.id)
            return found

    def get(self, tenant: str, response_id: str) -> Kept | None:
        with self._lock:
            return self._shelves.get(tenant, _Shelf()).kept.get(response_id)

    def holder(self, tenant: str, item_id: str) -> Kept | None:
        """The response in whose input or output an item stands."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            return shelf.kept.get(shelf.items.get(item_id, ""))

    def remove(self, tenant: str, response_id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            shelf = self._shelves.get(tenant)
            if shelf is None or response_id not in shelf.kept:
                return False
            shelf.drop(response_id)
            return True

    def size(self, tenant: str) -> int:
        """Bytes of a key's."""
        with self._lock:
            return self._shelves.get(tenant, _Shelf()).size

    def _count(self) -> int:
        return sum(len(shelf.kept) for shelf in self._shelves.values())

    def _size(self) -> int:
        return sum(shelf.size for shelf in self._shelves.values())


@dataclass(frozen=True, slots=True)
class Past:
    """What one key may ask of it, as api/responses.py does."""

    stored: Stored
    tenant: str

    @property
    def size(self) -> int:
        """Bytes that may have to be read."""
        return self.stored.size(self.tenant)

    def conversation(self, response_id: str) -> list[dict[str, Any]]:
        """The items of a response and of all before it. KeyError: the id of one that is not there."""
        return [
            item
            for one in self.stored.chain(self.tenant, response_id)
            for item in [*json.loads(one.input), *one.output()]
        ]

    def input(self, response_id: str) -> list[dict[str, Any]]:
        """The items that a response answers. KeyError as above."""
        last = self.stored.chain(self.tenant, response_id)[-1]
        before = [] if last.previous is None else self.conversation(last.previous)
        return [*before, *json.loads(last.input)]

    def items(self, ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """Those of these items that are there, of any responses; each of these is read once."""
        held = [self.stored.holder(self.tenant, item_id) for item_id in set(ids)]
        read = {one.id: one for one in held if one is not None}
        found = [item for one in read.values() for item in [*json.loads(one.input), *one.output()]]
        return {item["id"]: item for item in found if item["id"] in ids}

    def keep(self, items: Sequence[Mapping[str, Any]], previous: str | None, response: Mapping[str, Any]) -> None:
        """Keeps a response whole; items of its input that have no id get one."""
        bare = response["id"].removeprefix("resp_")
        named = [
            {**item, "id": item.get("id") or f"{PREFIXES.get(item['type'], 'fc')}_{bare}in{i:02x}"}
            for i, item in enumerate(items)
        ]
        ids = tuple(item["id"] for item in [*named, *response["output"]])
        text = to_json(response, allow_nan=True).encode("utf-8", "replace")
        self.stored.keep(self.tenant, Kept(response["id"], text, compact(named).encode(), previous, ids))
