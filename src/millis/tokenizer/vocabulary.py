"""The tokenizer section of a GGUF file, checked: every id in range, every list of the right length and type.

Key names and token types are those of the GGUF specification (tokenizer.ggml.*). The file is hostile until this
module has read it; whatever is wrong ends in a FormatError that names the key.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import compress, count
from typing import Any

from millis.tokenizer.pre import form_of
from millis.types import FormatError

MAX_ENTRIES = 4_000_000  # of any list; the largest published vocabularies have 262,144 tokens
PREFIX = "tokenizer.ggml."
# Tokens that end an answer, whatever the file's eos id says; used where they are control tokens.
END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Kind(IntEnum):
    """Token types, numbered as in the GGUF specification and in SentencePiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the metadata says, with lists of equal length indexed by token id."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    kinds: list[int]  # Kind
    scores: list[float]  # empty where the file has none
    merges: list[str]  # empty where the file has none
    bos: int | None
    unknown: int | None
    ends: frozenset[int]
    add_bos: bool
    add_eos: bool
    eos: int | None
    add_space_prefix: bool

    def of_kind(self, *kinds: Kind) -> dict[str, int]:
        """token → id of every token of these kinds."""
        wanted = frozenset(map(int, kinds))
        return dict(compress(zip(self.tokens, count(), strict=False), map(wanted.__contains__, self.kinds)))


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Check and collect the tokenizer keys of GGUF `metadata`; FormatError names the first that is wrong."""
    model = _text(metadata, "model", None)
    pre = _text(metadata, "pre", "default")
    tokens = _strings(metadata, "tokens", required=True)
    if not tokens:
        raise FormatError(f"{PREFIX}tokens is empty: the file carries no tokenizer")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise FormatError(f"{PREFIX}tokens holds {twice!r:.60} twice; each token must be unique")
    bos = _token_id(metadata, "bos_token_id", len(tokens))
    eos = _token_id(metadata, "eos_token_id", len(tokens))
    ids = [_token_id(metadata, key, len(tokens)) for key in _END_KEYS]
    spoken = frozenset(i for i in ids if i is not None)
    kinds = _kinds(metadata, len(tokens), {*spoken, bos} - {None})
    named = {name for name in END_NAMES if name in tokens}
    ends = spoken | {i for name in named if kinds[i := tokens.index(name)] == Kind.CONTROL}
    # SentencePiece models, Llama 3 and some more begin with BOS unless the file says otherwise, as llama.cpp has it.
    form = form_of(pre)
    begins = model == "llama" or form is not None and form.add_bos
    add_bos = _flag(metadata, "add_bos_token", bos is not None and begins)
    add_eos = _flag(metadata, "add_eos_token", False)
    for name, wanted, token in (("bos", add_bos, bos), ("eos", add_eos, eos)):
        if wanted and token is None:
            raise FormatError(f"{PREFIX}add_{name}_token is set but {PREFIX}{name}_token_id is missing")
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        scores=_scores(metadata, len(tokens)),
        merges=_strings(metadata, "merges", required=False),
        bos=bos,
        unknown=_token_id(metadata, "unknown_token_id", len(tokens)),
        ends=ends,
        add_bos=add_bos,
        add_eos=add_eos,
        eos=eos,
        add_space_prefix=_flag(metadata, "add_space_prefix", model == "llama"),
    )


def refuse_normalizer(metadata: Mapping[str, Any]) -> None:
    """FormatError if a SentencePiece model changes its text before encoding, which Llama's and Gemma's do not."""
    rewrites = _flag(metadata, "remove_extra_whitespaces", False)
    if rewrites or _list(metadata, "precompiled_charsmap"):
        key = "remove_extra_whitespaces" if rewrites else "precompiled_charsmap"
        raise FormatError(f"{PREFIX}{key} is set; Millis reads SentencePiece models without a normalizer")


def _text(metadata: Mapping[str, Any], key: str, default: str | None) -> str:
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, str):
        raise FormatError(f"{PREFIX}{key} must be a text, not {value!r:.60}")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{PREFIX}{key} must be true or false, not {value!r:.60}")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    try:
        token = operator.index(value)
    except TypeError:
        token = -1
    if isinstance(value, bool) or not 0 <= token < count:
        raise FormatError(f"{PREFIX}{key} must be a token id in [0, {count}), not {value!r:.60}")
    return token


def _list(metadata: Mapping[str, Any], key: str) -> list[Any] | None:
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    numbers = hasattr(value, "tolist") and hasattr(value, "__len__")  # NumPy arrays, without importing NumPy
    if isinstance(value, (str, bytes)) or not (numbers or isinstance(value, Sequence)):
        raise FormatError(f"{PREFIX}{key} must be an array, not {type(value).__name__}")
    if len(value) > MAX_ENTRIES:
        raise FormatError(f"{PREFIX}{key} holds {len(value)} entries; {MAX_ENTRIES} can be read")
    return list(value.tolist() if numbers else value)


def _strings(metadata: Mapping[str, Any], key: str, *, required: bool) -> list[str]:
    values = _list(metadata, key)
    if values is None:
        if required:
            raise FormatError(f"{PREFIX}{key} is missing: the file carries no tokenizer")
        return []
    try:
        texts = (
            values if set(map(type, values)) == {str} else [v.decode() if isinstance(v, bytes) else v for v in values]
        )
        "".join(texts).encode()
    except (TypeError, UnicodeError):
        raise FormatError(f"{PREFIX}{key} must hold UTF-8 texts only") from None
    return texts


def _kinds(metadata: Mapping[str, Any], count: int, special: set[int | None]) -> list[int]:
    """Token types; a token that begins or ends a sequence is a control token even where the file forgot to say so."""
    values = _list(metadata, "token_type")
    kinds = [int(Kind.NORMAL)] * count if values is None else values
    if len(kinds) != count:
        raise FormatError(f"{PREFIX}token_type holds {len(kinds)} entries for {count} tokens")
    if set(map(type, kinds)) != {int} or not 1 <= min(kinds) <= max(kinds) <= 6:
        raise FormatError(f"{PREFIX}token_type must hold integers from 1 to 6")
    for token in special:
        if token is not None and kinds[token] in (Kind.NORMAL, Kind.USER_DEFINED):
            kinds[token] = int(Kind.CONTROL)
    return kinds


def _scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    values = _list(metadata, "scores")
    if values is None:
        return []
    if len(values) != count:
        raise FormatError(f"{PREFIX}scores holds {len(values)} entries for {count} tokens")
    if not set(map(type, values)) <= {int, float} or not all(map(math.isfinite, values)):
        raise FormatError(f"{PREFIX}scores must hold finite numbers")
    return values
