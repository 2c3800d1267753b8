"""Tokenizers of folders that have SentencePiece's files and no tokenizer.json: T5's spiece.model, Marian's source.spm.

T5's ids are the numbers of its pieces, and behind them those of a hundred tokens that stand for gaps. Marian's are in
vocab.json, for both languages; what it writes is read by the pieces' text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millis.tokenizer.detokenize import Spelling
from millis.tokenizer.folder import Folder, content, ends_of, read_object
from millis.tokenizer.special import Matcher
from millis.tokenizer.spm_file import SpmFile, read_spm
from millis.tokenizer.unigram import Unigram
from millis.tokenizer.vocabulary import MAX_ENTRIES, Kind
from millis.types import FormatError, RequestError

T5, MARIAN = "spiece.model", "source.spm"
_EXTRA_IDS = 100  # T5's gaps: the last one first
_NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def has_spm(path: Path) -> bool:
    """Whether a folder's tokenizer is one of these."""
    return not (path / "tokenizer.json").is_file() and any((path / name).is_file() for name in (T5, MARIAN))


def read_spm_folder(path: Path) -> Folder:
    """Read the tokenizer files of folder `path`; FormatError names the file that is missing or malformed."""
    config = read_object(path / "tokenizer_config.json")
    named = {key: content(config.get(key)) or name for key, name in _NAMES.items()}
    read = _marian if (path / MARIAN).is_file() else _t5
    encoder, tokens, control, fallback = read(path, config, named)
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    for key, token in named.items():
        if not isinstance(token, str) or token not in ids:
            raise FormatError(f"the vocabulary has no token {token!r:.40}, which is the {key}")
    end, unknown, pad = (ids[named[key]] for key in _NAMES)
    hidden = {end, unknown, pad, *control}
    spoken = {tokens[i]: i for i in sorted(hidden) if tokens[i]}
    return Folder(
        encoder=encoder,
        spelling=Spelling(
            tokens=tokens,
            style="sentencepiece",
            control=hidden,
            values={i: byte for byte in range(256) if fallback and (i := ids.get(f"<0x{byte:02X}>", -1)) >= 0},
            drop_space=True,
            size=len(tokens),
        ),
        control=Matcher(spoken),
        control_tokens=spoken,
        prefix=[],
        suffix=[end],
        bos=None,
        ends=ends_of(path, end, {}, len(tokens)),
        special={},
        template=None,
    )


_Read = tuple["_Encoder", list[str], set[int], bool]  # tokens by id, ids that are no text, whether some are bytes


def _t5(path: Path, config: Mapping[str, Any], named: Mapping[str, Any]) -> _Read:
    file = read_spm(path / T5)
    extra = config.get("extra_ids", _EXTRA_IDS)
    if type(extra) is not int or not 0 <= extra <= MAX_ENTRIES:
        raise FormatError(f"tokenizer_config.json: extra_ids must be a whole number, not {extra!r:.40}")
    tokens = [*file.pieces, *(f"<extra_id_{i}>" for i in reversed(range(extra)))]
    control = {i for i, kind in enumerate(file.kinds) if kind in (Kind.CONTROL, Kind.UNKNOWN)}
    control.update(range(len(file.pieces), len(tokens)))
    numbers = {piece: i for i, piece in enumerate(file.pieces)}
    return _Encoder(_unigram(file, T5), file.pieces, numbers, file.unknown), tokens, control, Kind.BYTE in file.kinds


def _marian(path: Path, config: Mapping[str, Any], named: Mapping[str, Any]) -> _Read:
    if config.get("separate_vocabs"):
        raise FormatError("tokenizer_config.json: a vocabulary for each language is not supported")
    vocabulary = _vocabulary(path / "vocab.json")
    tokens = [""] * len(vocabulary)
    for token, number in vocabulary.items():
        tokens[number] = token
    file = read_spm(path / MARIAN)
    codes = {token: i for i, token in enumerate(tokens) if token.startswith(">>") and token.endswith("<<")}
    unknown = vocabulary.get(str(named["unk_token"]), 0)
    encoder = _Encoder(_unigram(file, MARIAN), file.pieces, vocabulary, unknown, codes)
    return encoder, tokens, set(), False


def _unigram(file: SpmFile, name: str) -> Unigram:
    try:
        return Unigram(file)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


class _Encoder:
    """Text → ids. With `codes`, a text may begin with the language it is to be translated to, as >>fra<<."""

    def __init__(
        self,
        unigram: Unigram,
        pieces: list[str],
        ids: Mapping[str, int],
        unknown: int,
        codes: Mapping[str, int] | None = None,
    ) -> None:
        self._unigram, self._unknown, self._codes = unigram, unknown, codes or {}
        self._ids = ids
        self._of_piece = [ids.get(piece, unknown) for piece in pieces]

    def __call__(self, text: str) -> list[int]:
        code: list[int] = []
        if self._codes and text.startswith(">>") and (end := text.find("<<")) != -1:
            name, text = text[: end + 2], text[end + 2 :]
            if name not in self._codes:
                raise RequestError(f"the model has no language {name:.40}; it has {' '.join(list(self._codes)[:40])}")
            code = [self._codes[name]]
        return code + [
            self._ids.get(part, self._unknown) if isinstance(part, str) else self._of_piece[part]
            for part in self._unigram(text)
        ]


def _vocabulary(path: Path) -> dict[str, int]:
    found = read_object(path)
    if not found:
        raise FormatError(f"{path} is missing or empty; Marian's ids are there")
    if len(found) > MAX_ENTRIES or not all(type(number) is int for number in found.values()):
        raise FormatError(f"{path.name} must give each of at most {MAX_ENTRIES} tokens a whole number")
    if sorted(found.values()) != list(range(len(found))):
        raise FormatError(f"{path.name} must number its tokens from 0 on, each once")
    return found
