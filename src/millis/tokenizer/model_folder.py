"""Tokenizers of folders that have a tokenizer.model and no tokenizer.json, as of Llama 2, Mistral and Gemma.

tokenizer.model is SentencePiece's file. Beside it: tokenizer_config.json (special tokens, added_tokens_decoder,
add_bos_token) and what older folders have in its place, special_tokens_map.json and added_tokens.json. A text gets the
ids that SentencePiece gives it, and so does a stretch of it behind a special token; but where the configuration has
"legacy": false, a space is put before the first word only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millis.tokenizer.detokenize import gguf_spelling
from millis.tokenizer.folder import Folder, content, ends_of, read_object, template_of
from millis.tokenizer.special import Edges, Matcher
from millis.tokenizer.spm import SPACE, SpmEncoder
from millis.tokenizer.spm_file import SpmFile, read_spm
from millis.tokenizer.unigram import Unigram
from millis.tokenizer.vocabulary import Kind, Vocabulary
from millis.types import FormatError

MODEL = "tokenizer.model"
_MAX_ADDED = 1 << 20  # ids behind the file's pieces
_REMEDY = "save the model with a tokenizer.json"
Added = dict[int, tuple[str, bool, Edges]]  # id → text, whether it is special, how far a match reaches


def has_model(path: Path) -> bool:
    """Whether a folder's tokenizer is one of these."""
    return not (path / "tokenizer.json").is_file() and (path / MODEL).is_file()


def read_model_folder(path: Path) -> Folder:
    """Read the tokenizer files of folder `path`; FormatError names the file that is malformed or not supported."""
    return folder_of(path, *read_model(path))


def folder_of(path: Path, vocabulary: Vocabulary, edges: dict[str, Edges], file: SpmFile) -> Folder:
    """The same of what `read_model` has read. FormatError."""
    config = read_object(path / "tokenizer_config.json")
    first_only = vocabulary.add_space_prefix and config.get("legacy") is False
    control = vocabulary.of_kind(Kind.CONTROL)
    bos, eos = vocabulary.bos, vocabulary.eos
    return Folder(
        encoder=_encoder(file, vocabulary),
        spelling=gguf_spelling(vocabulary),
        control=Matcher(control, edges),
        control_tokens=control,
        prefix=[bos] if vocabulary.add_bos and bos is not None else [],
        suffix=[eos] if vocabulary.add_eos and eos is not None else [],
        bos=bos,
        ends=ends_of(path, eos, control, len(vocabulary.tokens)),
        special={
            name: vocabulary.tokens[i] for name, i in (("bos_token", bos), ("eos_token", eos)) if i is not None
        },
        template=template_of(path, config),
        later=_encoder(file, replace(vocabulary, add_space_prefix=False)) if first_only else None,
    )  # fmt: skip


def read_model(path: Path) -> tuple[Vocabulary, dict[str, Edges], SpmFile]:
    """The vocabulary, the special tokens that reach over what is beside them, and tokenizer.model. FormatError."""
    config = read_object(path / "special_tokens_map.json") | read_object(path / "tokenizer_config.json")
    file = read_spm(path / MODEL)
    added = _added(path, config, file)
    tokens, kinds = _tokens(file, added, _named(config))
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise FormatError(f"tokenizer_config.json: the added token {twice!r:.60} has the text of another; {_REMEDY}")
    bos, eos = (_id(config, key, ids, name) for key, name in (("bos_token", file.bos), ("eos_token", file.eos)))
    for token in (bos, eos):
        if token is not None and token != file.unknown:
            kinds[token] = int(Kind.CONTROL)
    vocabulary = Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds=kinds,
        scores=file.scores + [0.0] * (len(tokens) - len(file.scores)),
        merges=[],
        bos=bos,
        unknown=file.unknown,
        ends=frozenset(),
        add_bos=_flag(config, "add_bos_token", True),
        add_eos=_flag(config, "add_eos_token", False),
        eos=eos,
        add_space_prefix=_flag(config, "add_prefix_space", file.prefix),
    )
    return vocabulary, {text: edges for text, _, edges in added.values() if edges != Edges()}, file


def _encoder(file: SpmFile, vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    try:
        return _unigram(file, vocabulary) if file.model == "unigram" else _bpe(file, vocabulary)
    except FormatError as error:
        raise FormatError(f"{MODEL}: {error}") from None


def _bpe(file: SpmFile, vocabulary: Vocabulary) -> SpmEncoder:
    changes = "precompiled_charsmap" if file.charsmap else "remove_extra_whitespaces" if file.collapse else None
    if changes is not None:
        raise FormatError(f"its normalizer has {changes}, which is not supported of BPE; {_REMEDY}")
    return SpmEncoder(vocabulary)


def _unigram(file: SpmFile, vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    if Kind.USER_DEFINED in vocabulary.kinds:
        token = vocabulary.tokens[vocabulary.kinds.index(Kind.USER_DEFINED)]
        raise FormatError(f"{token!r:.60} is an added token that is not special, not supported of unigram; {_REMEDY}")
    unigram = Unigram(replace(file, prefix=vocabulary.add_space_prefix))
    return lambda text: [file.unknown if isinstance(part, str) else part for part in unigram(text)]


def _tokens(file: SpmFile, added: Added, named: set[str]) -> tuple[list[str], list[int]]:
    """Text and type of every id; those that neither the file nor the configuration knows are unused."""
    tokens, kinds = list(file.pieces), list(file.kinds)
    more = range(len(tokens), max(added, default=-1) + 1)
    tokens += [f"[PAD{token}]" for token in more]
    kinds += [int(Kind.UNUSED)] * len(more)
    for token, (text, special, edges) in added.items():
        if not special and edges != Edges():
            raise FormatError(f"tokenizer_config.json: {text!r:.60} is not special, but reaches over spaces; {_REMEDY}")
        if token != file.unknown:
            kinds[token] = int(Kind.CONTROL if special else Kind.USER_DEFINED)
        tokens[token] = text
    for token, text in enumerate(tokens):
        if kinds[token] == Kind.USER_DEFINED:
            if text in named:
                kinds[token] = int(Kind.CONTROL)
            else:
                tokens[token] = text.replace(SPACE, " ")  # as GGUF files have it
    return tokens, kinds


def _added(path: Path, config: Mapping[str, Any], file: SpmFile) -> Added:
    """The added tokens that the files beside tokenizer.model list, most of which it holds, too."""
    name, listed = "tokenizer_config.json", config.get("added_tokens_decoder")
    if listed is None:
        name = "added_tokens.json"
        special = _named(config)
        listed = {i: {"content": t, "special": t in special} for t, i in read_object(path / name).items()}
    if not isinstance(listed, dict):
        raise FormatError(f"{name}: added_tokens_decoder must be an object, not {type(listed).__name__}")
    found: Added = {}
    for key, token in listed.items():
        text = content(token)
        number = int(key) if str(key).isdecimal() and len(str(key)) < 10 else -1
        if not isinstance(token, dict) or not isinstance(text, str) or not text:
            raise FormatError(f"{name}: the added token {str(key):.40} has no text")
        if not 0 <= number < len(file.pieces) + _MAX_ADDED:
            raise FormatError(f"{name}: the added token {text!r:.60} must have a token id, not {str(key):.40}")
        left, right, word = (token.get(flag) is True for flag in ("lstrip", "rstrip", "single_word"))
        found[number] = (text, token.get("special") is True, Edges(left=left, right=right, word=word))
    return found


def _named(config: Mapping[str, Any]) -> set[str]:
    """The tokens that the configuration names as special ones."""
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        named += more if isinstance(more, list) else []
    return {text for value in named if isinstance(text := content(value), str)}


def _id(config: Mapping[str, Any], key: str, ids: Mapping[str, int], default: str) -> int | None:
    """The id of the token that the configuration names, or else tokenizer.model, which may hold no such token."""
    if key not in config:
        return ids.get(default)
    text = content(config[key])
    if text is None:
        return None
    if not isinstance(text, str) or text not in ids:
        raise FormatError(f"tokenizer_config.json: {key} {text!r:.60} is not a token of {MODEL}")
    return ids[text]


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FormatError(f"tokenizer_config.json: {key} must be true or false, not {value!r:.60}")
    return value
