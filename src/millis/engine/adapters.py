"""The adapters of an engine: known by name, packed while there is room for them, read again when they are asked for."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millis.engine.turn import Lock
from millis.models.adapter import AdapterWeights
from millis.types import OverloadError, RequestError

MOST_KNOWN = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(eq=False, slots=True)
class Adapter:
    """A packed adapter. Whoever computes with it holds it; its memory is free when nobody does."""

    name: str
    native: Any  # what the runner made of it
    nbytes: int
    number: int  # of its load: what one load computed is not cached for the next
    users: int = 0  # requests that wait or run with it; the engine counts them under its lock


class Adapters:
    """Any thread may call it; a step under way is not held up.

    read: a path → its checked weights. pack: those → what the runner computes with, `nbytes` large. most: packed at
    once; for one more, the one goes that was not asked for longest and that no request uses.
    """

    def __init__(
        self, read: Callable[[Path], AdapterWeights], pack: Callable[[AdapterWeights], Any], most: int
    ) -> None:
        self._read, self._pack, self._most = read, pack, most
        self._paths: dict[str, Path] = {}
        self._packed: OrderedDict[str, Adapter] = OrderedDict()  # the one asked for last comes last
        self._lock = Lock()
        self._loading = Lock()
        self._count = 0

    @property
    def names(self) -> list[str]:
        """Those that requests may name, in order of their coming."""
        with self._lock:
            return list(self._paths)

    @property
    def nbytes(self) -> int:
        """Of all that are packed now."""
        with self._lock:
            return sum(adapter.nbytes for adapter in self._packed.values())

    def close(self) -> None:
        """Gives back all that is packed; what requests compute with is theirs until they end."""
        with self._loading, self._lock:
            self._packed.clear()

    def add(self, name: str, path: Path, *, load: bool = True) -> None:
        """Makes an adapter known, and packs it. load=False: it is read when it is first asked for.

        RequestError: a bad name, or one that is taken. ModelError: it cannot be read or does not fit the model.
        OverloadError: no room for it, because requests use all the others.
        """
        check_name(name)
        with self._lock:
            if name in self._paths:
                raise RequestError(f"there is an adapter {name!r} already; unload it first")
            if len(self._paths) >= MOST_KNOWN:
                raise RequestError(f"there are {MOST_KNOWN} adapters already; unload some first")
            self._paths[name] = Path(path)
        try:
            if load:
                self.use(name)
        except BaseException:
            with self._lock:
                self._paths.pop(name, None)
            raise

    def remove(self, name: str) -> None:
        """Forgets an adapter; requests that run with it end with it. RequestError: there is none of that name."""
        with self._lock:
            self._known(name)
            del self._paths[name]
            self._packed.pop(name, None)

    def ready(self, name: str | None) -> bool:
        """Whether `use` would return at once."""
        with self._lock:
            return name is None or name in self._packed or name not in self._paths

    def use(self, name: str) -> Adapter:
        """The adapter, read and packed if it is not. Raises as `add` does; RequestError: there is none of that name."""
        found = self._find(name)
        if found is not None:
            return found
        with self._loading:  # one at a time
            found = self._find(name)
            if found is not None:
                return found
            with self._lock:
                path = self._known(name)
                self._make_room()
            weights = self._read(path)
            native = self._pack(weights)
            with self._lock:
                self._known(name)  # it may have been removed meanwhile
                self._count += 1
                adapter = self._packed[name] = Adapter(name, native, native.nbytes, self._count)
            return adapter

    def _find(self, name: str) -> Adapter | None:
        with self._lock:
            self._known(name)
            if name in self._packed:
                self._packed.move_to_end(name)
            return self._packed.get(name)

    def _known(self, name: str) -> Path:
        if name not in self._paths:
            raise RequestError(f"there is no adapter {name!r:.100}; {listed(self._paths)}")
        return self._paths[name]

    def _make_room(self) -> None:
        while len(self._packed) >= self._most:
            idle = next((name for name, adapter in self._packed.items() if not adapter.users), None)
            if idle is None:
                raise OverloadError(
                    f"requests use all {self._most} adapters that are loaded; try again, or raise max_adapters",
                    retry_after_s=1.0,
                )
            del self._packed[idle]


def check_name(name: str) -> None:
    """RequestError where no adapter may be called so."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"an adapter's name has up to 100 letters, digits, '.', '_' and '-', unlike {name!r:.60}")


def listed(names: Iterable[str]) -> str:
    """What there is, for an error."""
    known = list(names)
    if not known:
        return "none is loaded"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"there are {', '.join(known[:20])}{more}"


def named(text: str) -> tuple[str, str]:
    """(name, path) of `NAME=PATH`, or of a path, whose last part is the name. RequestError."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).resolve().name.removesuffix(".gguf"), text
    check_name(name)
    if not path:
        raise RequestError(f"give an adapter as NAME=PATH, not {text!r:.100}")
    return name, path


def natives(adapters: Sequence[Adapter | None]) -> list[Any] | None:
    """What a batch says of its sequences' adapters; None where there is none."""
    return [adapter and adapter.native for adapter in adapters] if any(adapters) else None
