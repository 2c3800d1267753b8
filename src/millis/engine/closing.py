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
LONG = 128  # tokens; a longer text is tried by runs
RUN = 16  # tokens, behind which a mask gives the lexer new steps
MOST_FILLED = 4_096  # of one filler in a row
FUEL = 3_000_000  # tokens that a search may try in all, about a quarter of a second
STATE_FUEL = 1_000  # what looking at one more state counts as
MAX_LEVELS = 128  # bytes between two places where something may end
PROBED = 40  # levels of the first look, one state wide
WIDTH = 8  # states kept a level
HALF = 5  # bytes that may lack of a character or an escape, behind which a string can end as if it were begun
NARROWED = 32  # hints that are tried for what may follow them
FEW = 64  # bytes; where more may follow, the text is free
FREE = 512  # where more tokens than this may follow, it is free text: fillers do
FILLERS = b" .a0A-:/@_"
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
        return self.closers[-1:] + b"," if self.closers else b""


@dataclass(frozen=True, slots=True)
class Hints:
    """Token ids of texts that are worth trying, best first."""

    strings: Sequence[Sequence[int]] = ()  # what a string in JSON may need before it can end
    answers: Sequence[Sequence[int]] = ()  # what the answer itself may need


class NoFuelError(Exception):
    """A search has cost what it may."""


@dataclass(slots=True)
class Fuel:
    """What searches may still cost. Counted and not timed: a busy machine finds what an idle one finds."""

    left: int = FUEL
    met_limit: bool = False  # of the lexer, which ended the search

    def burn(self, amount: int) -> None:
        """NoFuelError: there is not so much left."""
        self.left -= amount
        if self.left < 0:
            raise NoFuelError


@dataclass(slots=True)
class _State:
    native: Any
    tokens: list[int]
    place: Place | None  # of an answer that is JSON
    fuel: Fuel

    @property
    def in_string(self) -> bool:
        """Whether characters of a string may stand here."""
        return self.place is not None and self.place.in_string and not self.place.escaped

    def valid(self, tokens: list[int]) -> int:
        """How many of these tokens may follow."""
        count = int(self.native.validate_tokens(tokens))
        self.fuel.burn(count + 1)
        return count

    def fits(self, tokens: list[int]) -> bool:
        """Whether all of these may follow."""
        if len(tokens) <= LONG:
            return self.valid(tokens) == len(tokens)
        copy = _State(self.native.deep_copy(), [], None, self.fuel)
        runs = (tokens[at : at + RUN] for at in range(0, len(tokens), RUN))
        return all(copy.native.try_consume_tokens(run) == len(run) and copy.mask() for run in runs)

    def mask(self) -> bytes:
        """The tokens that may follow. NoFuelError: the lexer has met a limit."""
        self.fuel.burn(STATE_FUEL)
        mask: bytes = self.native.compute_bitmask()
        if self.native.is_error():
            self.fuel.met_limit = True
            raise NoFuelError
        return mask


NO_HINTS = Hints()


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
        self._bytes = np.array(list(self._single.values()), np.uint32)
        self._fillers = [self._single[byte] for byte in FILLERS if byte in self._single]

    def spelling(self, token: int) -> bytes:
        """The text of a token; none for control tokens."""
        return b"" if token in self._silent or token >= len(self._tokens) else self._tokens[token]

    def spelled(self, text: bytes) -> list[int]:
        """The ids of a text, byte by byte; empty where the vocabulary lacks one."""
        ids = [self._single.get(byte, -1) for byte in text]
        return [] if -1 in ids else ids

    def close(
        self, native: Any, text: bytes | None, hints: Hints = NO_HINTS, fuel: Fuel | None = None
    ) -> list[int] | None:
        """Tokens that end the answer from `native`'s place on; None where none were found. `native` is used up.

        text: the answer so far where it is JSON, or holds some. fuel: what the search may cost, FUEL where nothing is
        said; several may share one.
        """
        place = None if text is None else Place().after(text)
        try:
            return self._close(_State(native, [], place, fuel or Fuel()), hints)
        except NoFuelError:
            return None

    def _close(self, state: _State, hints: Hints) -> list[int] | None:
        native = state.native
        while not native.is_accepting():
            if len(state.tokens) > MAX_TOKENS or native.is_error():
                return None
            step = native.compute_ff_tokens() or self._last(state, hints) or self._ending(state)
            step = step or self._hinted(state, hints) or self._filled(state) or self._narrowed(state, hints)
            for levels, width in ((PROBED if state.place else 0, 1), (MAX_LEVELS, WIDTH)):
                step = step or self._search(state, hints, levels, width)
            if not step or not self._advance(state, step):
                return None
        return state.tokens

    def _advance(self, state: _State, tokens: Sequence[int]) -> bool:
        state.tokens += tokens
        if state.place:
            state.place = state.place.after(b"".join(map(self.spelling, tokens)))
        return bool(state.native.consume_tokens(list(tokens)))

    def _last(self, state: _State, hints: Hints) -> list[int]:
        """The first hint behind which the answer may end."""
        return next((list(hint) for hint in hints.answers if state.fits([*hint]) and self._whole(state, hint)), [])

    def _whole(self, state: _State, tokens: Sequence[int]) -> bool:
        """Whether the answer may end behind these."""
        state.fuel.burn(STATE_FUEL)
        native = state.native.deep_copy()
        return bool(native.consume_tokens(list(tokens)) and native.is_accepting())

    def _narrowed(self, state: _State, hints: Hints) -> list[int]:
        """The first hint behind which fewer bytes may follow, or as few; in free text, one whose first byte ends it."""
        before, as_few = self._open(state), list[int]()
        for hint in [hint for hint in hints.answers if state.fits([*hint])][:NARROWED]:
            state.fuel.burn(STATE_FUEL)
            following = _State(state.native.deep_copy(), [], None, state.fuel)
            self._advance(following, hint if before <= FEW else hint[:1])
            if (after := self._open(following)) < before:
                return list(hint)
            if after == before <= FEW:
                as_few = as_few or list(hint)
        return as_few

    def _ending(self, state: _State) -> list[int]:
        """The token that ends something here, if one may stand here."""
        for byte in state.place.ends if state.place else b"":
            token = self._single.get(byte)
            if token is not None and state.fits([token]):
                return [token]
        return []

    def _hinted(self, state: _State, hints: Hints) -> list[int]:
        """The first hint behind which a string may end."""
        quote = self._single.get(ord('"'))
        if quote is not None and state.in_string:
            for hint in hints.strings:
                if state.fits([*hint, quote]):
                    return [*hint, quote]
        return []

    def _filled(self, state: _State) -> list[int]:
        """The shortest run of one filler behind which a string may end."""
        quote = self._single.get(ord('"'))
        if quote is None or not state.in_string:
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
                    low, high = (low, middle) if state.valid(run(filler, middle)) > middle else (middle, high)
                return run(filler, high)
        return []

    def _search(self, start: _State, hints: Hints, levels: int, width: int) -> list[int]:
        """The tokens up to the next place where something may end; none where it was not found."""
        level = [_State(start.native, [], start.place, start.fuel)]
        leaders = list(dict.fromkeys(hint[0] for hint in hints.answers))
        for depth in range(levels):
            seen: dict[bytes, _State] = {}
            for state in level:
                for token in self._candidates(state.native, leaders)[: 1 if width == 1 else None]:
                    start.fuel.burn(STATE_FUEL)
                    following = _State(state.native.deep_copy(), list(state.tokens), state.place, start.fuel)
                    if not self._advance(following, [token]) or not self._run(following):
                        continue
                    if following.native.is_accepting() or self._ending(following):
                        return following.tokens
                    if depth < HALF or _strings(following) != _strings(start):
                        if self._hinted(following, hints) or self._filled(following):
                            return following.tokens
                    seen.setdefault(following.mask(), following)
            level = sorted(seen.values(), key=self._open)[:width]
            for state in level:
                if self._last(state, hints):
                    return state.tokens
        return []

    def _run(self, state: _State) -> bool:
        """Takes what is forced."""
        forced = state.native.compute_ff_tokens()
        return not forced or self._advance(state, forced)

    def _open(self, state: _State) -> int:
        """How much is open in JSON; elsewhere how many bytes may follow, which are fewer behind an end."""
        if state.place:
            return len(state.place.closers)
        mask = np.frombuffer(state.native.compute_bitmask(), np.uint8)
        return int((mask[self._bytes >> 3] >> (self._bytes & 7) & 1).sum())

    def _candidates(self, native: Any, leaders: Sequence[int]) -> list[int]:
        """Single bytes that may follow, in the order in which they are worth trying."""
        bits = np.unpackbits(np.frombuffer(native.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [token for token in self._order if bits[token]]
        if int(bits.sum()) > FREE:
            return [token for token in (*leaders, *self._fillers) if bits[token]] or allowed[:WIDTH]
        return allowed


def _strings(state: _State) -> int:
    return state.place.strings if state.place else 0
