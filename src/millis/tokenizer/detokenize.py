"""Token ids → text, whole or as they are generated.

A text is the concatenation of its tokens' bytes, read as UTF-8 with U+FFFD for invalid bytes; control tokens are
skipped unless asked for. The incremental form holds back the bytes of an unfinished character, so that the pieces
of any sequence, joined, are the whole text.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from millis.tokenizer.vocabulary import Kind, Vocabulary
from millis.types import RequestError

_SPACE = "\u2581"
_UNKNOWN = " \u2047 "  # what SentencePiece prints for its unknown token


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al., 2019): itself where printable, else U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_characters()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How the ids of one vocabulary become bytes."""

    tokens: Sequence[str]  # id → the file's spelling
    style: Literal["byte-level", "sentencepiece", "wordpiece"]
    control: Container[int]  # ids that are skipped
    literal: Container[int] = ()  # ids spelled as their text is, whatever the style
    silent: Container[int] = ()  # ids without text
    values: Mapping[int, int]  # byte tokens: id → byte
    unknown: Container[int] = ()
    drop_space: bool = False  # the first token loses the space that encoding puts before a text
    size: int  # ids are valid in [0, size); those past `tokens` have no text

    def padded(self, size: int) -> Spelling:
        """The same for a model with `size` rows in its embedding."""
        return replace(self, size=max(size, self.size))

    def raw(self, token: int) -> bytes:
        """The raw bytes of one token; RequestError if there is no such id."""
        if not 0 <= token < self.size:
            raise RequestError(f"token id {token} is outside the vocabulary of {self.size}")
        if token in self.values:
            return bytes((self.values[token],))
        if token >= len(self.tokens) or token in self.silent:
            return b""
        text = self.tokens[token]
        if token in self.literal:
            return text.encode()
        if token in self.unknown:
            return _UNKNOWN.encode()
        return self._styled(text)

    def _styled(self, text: str) -> bytes:
        if self.style == "byte-level":
            try:
                return bytes([BYTES[character] for character in text])
            except KeyError:
                return text.encode()
        if self.style == "sentencepiece":
            return text.replace(_SPACE, " ").encode()
        return (text[2:] if text.startswith("##") else " " + text).encode()

    def first_bytes(self, token: int) -> bytes:
        """The bytes of a token that begins a text."""
        data = self.raw(token)
        if self.drop_space and data[:1] == b" " and token not in self.values and token not in self.unknown:
            return data[1:]
        return data


def gguf_spelling(vocabulary: Vocabulary) -> Spelling:
    """The spelling of a GGUF vocabulary; byte tokens are read from their names <0x00> to <0xFF>."""
    by_kind: dict[int, set[int]] = {kind: set() for kind in Kind}
    normal = int(Kind.NORMAL)  # plain integers compare several times faster
    for token, kind in enumerate(vocabulary.kinds):
        if kind != normal:
            by_kind[kind].add(token)
    sentencepiece = vocabulary.model == "llama"
    return Spelling(
        tokens=vocabulary.tokens,
        style="sentencepiece" if sentencepiece else "byte-level",
        control=by_kind[Kind.CONTROL],
        literal=by_kind[Kind.CONTROL] if sentencepiece else by_kind[Kind.CONTROL] | by_kind[Kind.USER_DEFINED],
        silent=() if sentencepiece else by_kind[Kind.UNUSED],
        values={i: int(vocabulary.tokens[i][3:5], 16) for i in by_kind[Kind.BYTE]} if sentencepiece else {},
        unknown=by_kind[Kind.UNKNOWN],
        drop_space=sentencepiece and vocabulary.add_space_prefix,
        size=len(vocabulary.tokens),
    )


class Detokenizer:
    """One text as it is generated: `push` each id, then `flush` once."""

    def __init__(self, spelling: Spelling, *, skip_special: bool = True, continues: bool = False) -> None:
        self._spelling = spelling
        self._skip_special = skip_special
        self._first = not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, possibly none."""
        if self._skip_special and token in self._spelling.control:
            return ""
        if not self._first:
            return self._decoder.decode(self._spelling.raw(token))
        self._first = not self._spelling.raw(token)
        return self._decoder.decode(self._spelling.first_bytes(token))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the detokenizer then begins a new stretch of text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
