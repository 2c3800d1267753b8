"""SentencePiece's own files (tokenizer.model, spiece.model, source.spm): what of them says how a text becomes pieces.

They are protocol buffers (sentencepiece_model.proto): ModelProto {1: pieces, 2: trainer, 3: normalizer}, read here
field by field, because a dozen of them are needed. A file is hostile until this module has read it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millis.tokenizer.vocabulary import MAX_ENTRIES, Kind
from millis.types import FormatError

_MAX_FILE_BYTES = 64 << 20
_MODELS: dict[int | bytes, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}  # TrainerSpec.ModelType
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
Value = int | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpmFile:
    """`model`: unigram (Kudo, 2018), or bpe, by score (Kudo and Richardson, 2018)."""

    model: Literal["unigram", "bpe"]
    pieces: list[str]
    scores: list[float]
    kinds: list[int]  # Kind
    unknown: int
    charsmap: bytes  # of the normalizer, empty for none
    prefix: bool  # a space is put before a text
    collapse: bool  # spaces at the ends go, runs of them become one
    bos: str  # the pieces that begin and end a text, where there are such
    eos: str


def read_spm(path: Path) -> SpmFile:
    """The model in a file; FormatError names what is malformed or not supported."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise FormatError(f"{path.name} is larger than {_MAX_FILE_BYTES} bytes")
        return parse_spm(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None


def parse_spm(data: bytes) -> SpmFile:
    """The same from a file's bytes."""
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(data):
        if number == 1:
            piece, score, kind = _piece(_as_bytes(value))
            pieces.append(piece)
            scores.append(score)
            kinds.append(kind)
            if len(pieces) > MAX_ENTRIES:
                raise FormatError(f"it holds more than {MAX_ENTRIES} pieces")
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not pieces or len(set(pieces)) != len(pieces):
        raise FormatError("its pieces must be there, each of them once")
    model = _MODELS.get(trainer.get(3, 1))
    if model is None:
        raise FormatError("Millis reads SentencePiece models of the kinds unigram and BPE; save a tokenizer.json")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise FormatError("white space behind words, or left as it is, is not supported; save a tokenizer.json")
    unknown = [i for i, kind in enumerate(kinds) if kind == Kind.UNKNOWN]
    if len(unknown) != 1:
        raise FormatError(f"it must have one unknown piece, not {len(unknown)}")
    return SpmFile(
        model=model,
        pieces=pieces,
        scores=scores,
        kinds=kinds,
        unknown=unknown[0],
        charsmap=_as_bytes(normalizer.get(2, b"")),
        prefix=bool(normalizer.get(3, 1)),
        collapse=bool(normalizer.get(4, 1)),
        bos=_as_bytes(trainer.get(46, b"<s>")).decode(errors="replace"),
        eos=_as_bytes(trainer.get(47, b"</s>")).decode(errors="replace"),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    found = dict(_fields(data))
    try:
        text = _as_bytes(found.get(1, b"")).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("a piece is not UTF-8") from None
    (score,) = struct.unpack("<f", _as_bytes(found.get(2, bytes(4))))
    kind = found.get(3, int(Kind.NORMAL))
    if not text or not math.isfinite(score) or not isinstance(kind, int) or not 1 <= kind <= 6:
        raise FormatError(f"the piece {text!r:.40} has no text, no finite score or no known type")
    return text, score, kind


def _as_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise FormatError("a field is a number where a message is expected: no SentencePiece file")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message; floats and doubles as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_DOUBLE, _FLOAT):
            size = 8 if kind == _DOUBLE else 4
        else:
            raise FormatError("a field of an unknown kind: no SentencePiece file")
        if size > len(data) - at:
            raise FormatError("the file ends early, inside a field; pull it again")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise FormatError("a number has no end: no SentencePiece file, or one that ends early")
