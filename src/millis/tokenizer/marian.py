"""Marian's tokenizer folder: source.spm to split a text, vocab.json for the ids, target side read by the pieces' text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millis.tokenizer.detokenize import Spelling
from millis.tokenizer.folder import Folder, content, read_object
from millis.tokenizer.special import Matcher
from millis.tokenizer.spm_file import read_spm
from millis.tokenizer.unigram import MarianEncoder
from millis.tokenizer.vocabulary import MAX_ENTRIES
from millis.types import FormatError

_NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def is_marian(path: Path) -> bool:
    """Whether a folder's tokenizer is one of these."""
    return (path / "source.spm").is_file() and not (path / "tokenizer.json").is_file()


def read_marian(path: Path) -> Folder:
    """Read the tokenizer files of folder `path`; FormatError names the file that is missing or malformed."""
    config = read_object(path / "tokenizer_config.json")
    if config.get("separate_vocabs"):
        raise FormatError("tokenizer_config.json: a vocabulary for each language is not supported")
    vocabulary = _vocabulary(path / "vocab.json")
    found = {key: content(config.get(key)) or name for key, name in _NAMES.items()}
    for key, token in found.items():
        if not isinstance(token, str) or token not in vocabulary:
            raise FormatError(f"vocab.json has no token {token!r:.40}, which is the {key}")
    end, unknown, pad = (vocabulary[found[key]] for key in _NAMES)
    control = {token: number for token, number in vocabulary.items() if number in (end, pad)}
    tokens = [""] * len(vocabulary)
    for token, number in vocabulary.items():
        tokens[number] = token
    codes = [i for i, token in enumerate(tokens) if token.startswith(">>") and token.endswith("<<")]
    return Folder(
        encoder=MarianEncoder(read_spm(path / "source.spm"), vocabulary, unknown),
        spelling=Spelling(
            tokens=tokens,
            style="sentencepiece",
            control={end, pad, unknown, *codes},
            values={},
            unknown={unknown},
            drop_space=True,
            size=len(tokens),
        ),
        control=Matcher(control),
        control_tokens=control,
        prefix=[],
        suffix=[end],
        bos=None,
        ends=frozenset({end}),
        special={},
        template=None,
    )


def _vocabulary(path: Path) -> Mapping[str, Any]:
    found = read_object(path)
    if not found:
        raise FormatError(f"{path} is missing or empty; Marian's ids are there")
    if len(found) > MAX_ENTRIES or not all(type(number) is int for number in found.values()):
        raise FormatError(f"{path.name} must give each of at most {MAX_ENTRIES} tokens a whole number")
    if sorted(found.values()) != list(range(len(found))):
        raise FormatError(f"{path.name} must number its tokens from 0 on, each once")
    return found
