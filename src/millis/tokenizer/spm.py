"""SentencePiece BPE by score, as Llama 2 and Gemma use it (Kudo and Richardson, 2018).

Spaces become U+2581. Adjacent symbols whose concatenation is a token merge, best score first and leftmost on a
tie, until none can; user-defined tokens stand before any merge; a character without a token becomes its UTF-8
bytes. Written here rather than on the `tokenizers` library, whose BPE ranks pairs, not results: it would need half
a million pairs at load and still resolve ties differently.
"""

from __future__ import annotations

import heapq
import re

from millis.tokenizer.special import Matcher
from millis.tokenizer.vocabulary import PREFIX, Kind, Vocabulary
from millis.types import FormatError

SPACE = "\u2581"
_CACHED_WORDS = 50_000
_CACHED_CHARACTERS = 32  # longer words are rare: not worth the memory


class SpmEncoder:
    """Text → ids; user-defined tokens are found in any text, control tokens never."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.scores:
            raise FormatError(f"{PREFIX}scores is missing; a SentencePiece model needs it")
        self._unused = vocabulary.of_kind(Kind.UNUSED)
        # GGUF writers spell the spaces of user-defined tokens as spaces, SentencePiece as U+2581.
        user_defined = {t.replace(" ", SPACE): i for t, i in vocabulary.of_kind(Kind.USER_DEFINED).items()}
        self._user_defined = Matcher(user_defined)
        self._pieces = vocabulary.of_kind(Kind.NORMAL, Kind.UNUSED) | user_defined
        self._costs = [-score for score in vocabulary.scores]
        self._bytes = byte_tokens(vocabulary)
        self._unknown = unknown_token(vocabulary, self._bytes)
        self._prefix = SPACE if vocabulary.add_space_prefix else ""
        self._words = _word_pattern(self._pieces)
        self._cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = []
        for part in self._user_defined.split(self._prefix + text.replace(" ", SPACE)):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in self._words.findall(part):
                    self._extend(ids, self._word(word))
        return ids

    def _extend(self, ids: list[int], more: list[int]) -> None:
        """Append, letting a run of unknown characters be one unknown token, as SentencePiece does."""
        for token in more:
            if token != self._unknown or not ids or ids[-1] != token:
                ids.append(token)

    def _word(self, word: str) -> list[int]:
        found = self._cache.get(word)
        if found is None:
            found = self._segment(word)
            if len(word) <= _CACHED_CHARACTERS:
                if len(self._cache) >= _CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = found
        return found

    def _segment(self, word: str) -> list[int]:
        """Merge the characters of `word`; symbol i covers word[i : ends[i]], and is gone once ends[i] is 0."""
        count = len(word)
        ends = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        parts: dict[str, tuple[str, str]] = {}  # an unused token → what it was merged from
        heap: list[tuple[float, int, int, int]] = []  # cost, left symbol, right symbol, end
        for i in range(count - 1):
            self._offer(word, i, i + 1, i + 2, heap, parts)
        while heap:
            _, left, right, end = heapq.heappop(heap)
            if ends[left] != right or ends[right] != end:
                continue  # one of the two has merged with another since
            ends[left], ends[right] = end, 0
            if end < count:
                before[end] = left
                self._offer(word, left, end, ends[end], heap, parts)
            if before[left] >= 0:
                self._offer(word, before[left], left, end, heap, parts)
        return self._tokens(word, ends, parts)

    def _offer(
        self,
        word: str,
        left: int,
        right: int,
        end: int,
        heap: list[tuple[float, int, int, int]],
        parts: dict[str, tuple[str, str]],
    ) -> None:
        """Queue the merge of two adjacent symbols, if it makes a token."""
        piece = word[left:end]
        token = self._pieces.get(piece)
        if token is None:
            return
        heapq.heappush(heap, (self._costs[token], left, right, end))
        if piece in self._unused:
            parts[piece] = (word[left:right], word[right:end])

    def _tokens(self, word: str, ends: list[int], parts: dict[str, tuple[str, str]]) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(word):
            self._resolve(word[start : ends[start]], parts, ids)
            start = ends[start]
        return ids

    def _resolve(self, piece: str, parts: dict[str, tuple[str, str]], ids: list[int]) -> None:
        """Append the ids of one symbol: an unused token falls apart again, an unknown character into bytes."""
        waiting = [piece]
        while waiting:
            piece = waiting.pop()
            if piece in parts:
                waiting.extend(reversed(parts[piece]))
            elif piece in self._pieces:
                ids.append(self._pieces[piece])
            elif self._bytes:
                ids.extend(self._bytes[byte] for byte in piece.encode())
            else:
                ids.append(self._unknown)


def byte_tokens(vocabulary: Vocabulary) -> list[int]:
    """The ids of <0x00> to <0xFF>, or none; FormatError where only some exist."""
    found = vocabulary.of_kind(Kind.BYTE)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if found and found.keys() != set(names):
        raise FormatError(f"{PREFIX}tokens must hold all of <0x00> to <0xFF> as byte tokens, or none")
    return [found[name] for name in names] if found else []


def unknown_token(vocabulary: Vocabulary, fallback: list[int]) -> int:
    """The id of characters without a token, -1 where the byte tokens `fallback` do without; FormatError."""
    if vocabulary.unknown is not None:
        return vocabulary.unknown
    found = list(vocabulary.of_kind(Kind.UNKNOWN).values())
    if not found and not fallback:
        raise FormatError(f"{PREFIX}tokens holds neither byte tokens nor an unknown token")
    return found[0] if found else -1


def _word_pattern(pieces: dict[str, int]) -> re.Pattern[str]:
    """A pattern whose matches can be merged apart from each other, and partition any text.

    Text may be cut before a space mark that follows character c if no token holds c and a space mark in a row, for
    then no merge can reach across. Gemma has one such token, so only its c is exempt.
    """
    suspects = (piece for piece in pieces if piece.rfind(SPACE) > 0)
    bound = {c for piece in suspects for c in re.findall(rf"[^{SPACE}](?={SPACE})", piece, re.DOTALL)}
    kept = "".join(map(re.escape, sorted(bound)))
    onwards = rf"(?:(?<=[{kept}]){SPACE}+[^{SPACE}]*)*" if kept else ""
    return re.compile(rf"{SPACE}*[^{SPACE}]+{onwards}|{SPACE}+")
