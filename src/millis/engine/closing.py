"""Brings an answer to an end that its grammar accepts, without the model: by a short way that a bounded search finds.

In JSON most of it is plain: a string, list or object that may end, ends. Where none may, a beam search over single
bytes looks for the next place where one may. States that allow the same tokens after equally many steps count as one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_TOKENS = 4_096  # of a closing
MOST_FILLED = 4_096  # of one filler in a row
FUEL = 3_000_000  # tokens that a search may try in all, about a quarter of a second
STATE_FUEL = 1_000  # what looking at one more state counts as
MAX_LEVELS = 128  # bytes between two places where something may end
PROBED = 40  # levels of the first look, one state wide
WIDTH = 8  # states kept a level
HALF = 5  # bytes that may lack of a character or an escape, behind which a string can end as if it were begun
FREE = 512  # where more tokens than this may follow, it is free text: fillers do
FILLERS = b" .a0A-:/@_"
Hints = Sequence[Sequence[int]]  # texts that a string, or an answer that is no JSON, may need before it can end
FIRST = b'0123456789ntf"[{'  # what is tried first, where it may stand
_OPEN = {ord("{"): ord("}"), ord("["): ord("]")}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a JSON text stands."""

    closers: bytes = b""  # of what is open, innermost last
    in_string: bool = False
    escaped: bool = False
    strings: int = 0  # begun so far

    def after(self, text: bytes) -> Place:
        closers, in_string, escaped, strings = bytearray(self.closers), self.in_string, self.escaped, self.strings
        for byte in text:
            if escaped:
                escaped = False
            elif in_string:
                in_string, escaped = byte != ord('"'), byte == ord("\\")
            elif byte == ord('"'):
                in_string, strings = True, strings + 1
            elif byte in _OPEN:
                closers.append(_OPEN[byte])
            elif closers and byte == closers[-1]:
                closers.pop()
        return Place(bytes(closers), in_string, escaped, strings)

    @property
    def ends(self) -> bytes:
        """The bytes that would end something here, best first."""
        if self.in_string:
            return b"" if self.escaped else b'"'
        return self.closers[-1:] + b","


class NoFuelError(Exception):
    """A search has cost what it may."""


@dataclass(slots=True)
class Fuel:
    """What searches may still cost. Counted and not timed: a busy machine finds what an idle one finds."""

    left: int = FUEL

    def burn(self, amount: int) -> None:
        """NoFuelError: there is not so much left."""
        self.left -= amount
        if self.left < 0:
            raise NoFuelError


@dataclass(slots=True)
class _State:
    native: Any
    tokens: list[int]
    place: Place
    fuel: Fuel

    def valid(self, tokens: list[int]) -> int:
        """How many of these tokens may follow."""
        count = int(self.native.validate_tokens(tokens))
        self.fuel.burn(count + 1)
        return count

    def fits(self, tokens: list[int]) -> bool:
        """Whether all of these may follow."""
        return self.valid(tokens) == len(tokens)


class Closer:
    """Closes answers over one vocabulary; `tokens`: the bytes of every id."""

    def __init__(self, tokens: Sequence[bytes], ends: Collection[int], control: Collection[int]) -> None:
        self.ends = frozenset(ends)
        self._tokens = tokens
        self._silent = frozenset(control) | self.ends
        self._single: dict[int, int] = {}  # byte → id
        for token, text in enumerate(tokens):
            if len(text) == 1 and token not in self._silent:
                self._single.setdefault(text[0], token)
        order = [*FIRST, *(byte for byte in range(256) if byte not in FIRST)]
        self._order = [self._single[byte] for byte in order if byte in self._single]
        self._fillers = [self._single[byte] for byte in FILLERS if byte in self._single]

    def spelling(self, token: int) -> bytes:
        """The text of a token; none for control tokens."""
        return b"" if token in self._silent or token >= len(self._tokens) else self._tokens[token]

    def spelled(self, text: bytes) -> list[int]:
        """The ids of a text, byte by byte; empty where the vocabulary lacks one."""
        ids = [self._single.get(byte, -1) for byte in text]
        return [] if -1 in ids else ids

    def close(self, native: Any, text: bytes | None, hints: Hints = (), fuel: Fuel | None = None) -> list[int] | None:
        """Tokens that end the answer from `native`'s place on; None where none were found. `native` is used up.

        text: the answer so far where it is JSON. hints: what may be worth trying inside a string, or in an answer that
        is no JSON. fuel: what the search may cost, FUEL where nothing is said; several may share one.
        """
        state = _State(native, [], Place().after(text or b""), fuel or Fuel())
        try:
            return self._close(state, text is not None, hints)
        except NoFuelError:
            return None

    def _close(self, state: _State, is_json: bool, hints: Hints) -> list[int] | None:
        native = state.native
        while not native.is_accepting():
            if len(state.tokens) > MAX_TOKENS or native.is_error():
                return None
            forced = native.compute_ff_tokens()
            step = forced or self._ending(state, is_json) or self._hinted(state, is_json, hints) or self._filled(state)
            for levels, width in ((PROBED, 1), (MAX_LEVELS, WIDTH)):
                step = step or self._search(state, is_json, hints, levels, width)
            if not step or not self._advance(state, step):
                return None
        return state.tokens

    def _advance(self, state: _State, tokens: Sequence[int]) -> bool:
        state.tokens += tokens
        state.place = state.place.after(b"".join(map(self.spelling, tokens)))
        return bool(state.native.consume_tokens(list(tokens)))

    def _ending(self, state: _State, is_json: bool) -> list[int]:
        """The token that ends something here, if one may stand here."""
        for byte in state.place.ends if is_json else b"":
            token = self._single.get(byte)
            if token is not None and state.fits([token]):
                return [token]
        return []

    def _filled(self, state: _State) -> list[int]:
        """The shortest run of one filler behind which a string may end."""
        quote = self._single.get(ord('"'))
        if quote is None or not state.place.in_string or state.place.escaped:
            return []

        def run(filler: int, count: int) -> list[int]:
            return [*[filler] * count, quote]

        for filler in self._fillers:
            high = 1
            while (valid := state.valid(run(filler, high))) == high:  # the fillers may stand here, the end not yet
                if high >= MOST_FILLED:
                    return []  # its length is not what this string lacks
                high *= 2
            if valid > high:
                low = high // 2
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (low, middle) if state.fits(run(filler, middle)) else (middle, high)
                return run(filler, high)
        return []

    def _hinted(self, state: _State, is_json: bool, hints: Hints) -> list[int]:
        """The first hint behind which a string, or an answer that is no JSON, may end."""
        quote = self._single.get(ord('"'))
        if not is_json:
            return next((list(hint) for hint in hints if state.fits([*hint]) and self._whole(state, hint)), [])
        if quote is not None and state.place.in_string and not state.place.escaped:
            for hint in hints:
                if state.fits([*hint, quote]):
                    return [*hint, quote]
        return []

    def _whole(self, state: _State, tokens: Sequence[int]) -> bool:
        """Whether the answer may end behind these."""
        state.fuel.burn(STATE_FUEL)
        native = state.native.deep_copy()
        return bool(native.consume_tokens(list(tokens)) and native.is_accepting())

    def _search(self, start: _State, is_json: bool, hints: Hints, levels: int, width: int) -> list[int]:
        """The tokens up to the next place where something may end; none where it was not found."""
        level = [_State(start.native, [], start.place, start.fuel)]
        for depth in range(levels):
            seen: dict[bytes, _State] = {}
            for state in level:
                for token in self._candidates(state.native)[: 1 if width == 1 else None]:
                    start.fuel.burn(STATE_FUEL)
                    following = _State(state.native.deep_copy(), list(state.tokens), state.place, start.fuel)
                    if not self._advance(following, [token]) or not self._run(following):
                        continue
                    if following.native.is_accepting() or self._ending(following, is_json):
                        return following.tokens
                    entered = following.place.strings != start.place.strings
                    if depth < HALF or entered:
                        if self._hinted(following, is_json, hints) or self._filled(following):
                            return following.tokens
                    seen.setdefault(following.native.compute_bitmask(), following)
            level = sorted(seen.values(), key=lambda state: len(state.place.closers))[:width]
        return []

    def _run(self, state: _State) -> bool:
        """Takes what is forced."""
        forced = state.native.compute_ff_tokens()
        return not forced or self._advance(state, forced)

    def _candidates(self, native: Any) -> list[int]:
        """Single bytes that may follow, in the order in which they are worth trying."""
        bits = np.unpackbits(np.frombuffer(native.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [token for token in self._order if bits[token]]
        if int(bits.sum()) > FREE:
            return [token for token in self._fillers if bits[token]] or allowed[:WIDTH]
        return allowed
