"""A folder's tokenizer as the tokenizer section of a GGUF file: tokenizer.json's byte-level BPE or SentencePiece's.

What GGUF has no name for, a pre-tokenizer or an order of merges, is refused, so that no file splits texts otherwise
than the folder did. The same ids for every text; what is left of differences for SentencePiece stands in
spm_merges.py, and one more: runs of spaces that are longer than any token of spaces, in a folder that merges those.
Key names: the GGUF specification (tokenizer.ggml.*).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millis.tokenizer.detokenize import BYTES
from millis.tokenizer.folder import Folder, read_folder
from millis.tokenizer.model_folder import MODEL, folder_of, has_model, read_model
from millis.tokenizer.pre import FORMS, Form
from millis.tokenizer.spm import SPACE
from millis.tokenizer.spm_merges import scores_of
from millis.tokenizer.vocabulary import END_NAMES, PREFIX, Kind
from millis.types import FormatError

_REMEDY = "give a GGUF file of this model instead"


def tokenizer_metadata(path: Path, vocab: int) -> dict[str, Any]:
    """tokenizer.* of the folder `path` for a model whose embedding has `vocab` rows.

    FormatError: a malformed folder, or a tokenizer that a GGUF file cannot stand for.
    """
    folder, found = (_of_model if has_model(Path(path)) else _of_json)(Path(path), vocab)
    metadata = {PREFIX + key: value for key, value in found.items()}
    return metadata | ({} if folder.template is None else {"tokenizer.chat_template": folder.template})


def _of_json(path: Path, vocab: int) -> tuple[Folder, dict[str, Any]]:
    """What a folder's tokenizer.json says, under GGUF's names without their beginning."""
    folder = read_folder(path)
    content = json.loads((path / "tokenizer.json").read_bytes())
    model = content["model"]
    if model.get("type") != "BPE" or folder.spelling.style == "wordpiece":
        raise FormatError(f"tokenizer.json: only BPE can be written to a GGUF file, not {model.get('type')}; {_REMEDY}")
    if not model.get("merges"):
        raise FormatError(f"tokenizer.json: it has no merges, without which readers refuse a GGUF file; {_REMEDY}")
    tokens, kinds = _tokens(folder, content, vocab)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    found = {"tokens": tokens, "token_type": kinds, **_special(folder, "tokenizer.json")}
    if folder.spelling.style == "byte-level" and not model.get("byte_fallback"):
        found |= {"model": "gpt2", "pre": _pre(content), "merges": [" ".join(merge) for merge in merges]}
    else:
        pieces = {token: i for i, token in enumerate(tokens) if kinds[i] == Kind.NORMAL}
        found |= {"model": "llama", "pre": "default", "add_space_prefix": _space_prefix(folder, content)}
        _refuse_late(content, merges, pieces)
        found |= {"scores": _scores(merges, pieces, vocab)}
        if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
            found["unknown_token_id"] = unknown
    return folder, found


def _of_model(path: Path, vocab: int) -> tuple[Folder, dict[str, Any]]:
    """The same of a folder with a tokenizer.model, whose scores a GGUF file holds as they are."""
    vocabulary, edges, file = read_model(path)
    folder = folder_of(path, vocabulary, edges, file)
    more = vocab - len(vocabulary.tokens)
    fault = (
        "it is no BPE model" if file.model != "bpe"
        else f"its special token {next(iter(edges))!r:.60} reaches over spaces" if edges
        else "it puts a space before the first word only (\"legacy\": false)" if folder.later is not None
        else None
    )  # fmt: skip
    if fault is not None:
        raise FormatError(f"{MODEL}: {fault}, for which GGUF has no name; {_REMEDY}")
    if more < 0:
        raise FormatError(f"{MODEL} has {len(vocabulary.tokens)} tokens, the model's embedding {vocab} rows")
    found = {
        "model": "llama",
        "pre": "default",
        "tokens": vocabulary.tokens + [f"[PAD{token}]" for token in range(vocab - more, vocab)],
        "token_type": vocabulary.kinds + [int(Kind.UNUSED)] * more,
        "scores": vocabulary.scores + [0.0] * more,
        "add_space_prefix": vocabulary.add_space_prefix,
        "unknown_token_id": vocabulary.unknown,
        **_special(folder, MODEL),
    }
    return folder, found


def _tokens(folder: Folder, content: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; rows of the embedding that no token has become unused tokens."""
    spelling = folder.spelling
    if spelling.size > vocab:
        raise FormatError(f"tokenizer.json has {spelling.size} tokens, the model's embedding {vocab} rows")
    spaced = spelling.style == "sentencepiece"
    added = {token["id"] for token in content.get("added_tokens") or ()}
    unknown = content["model"].get("unk_token") if spaced else None
    tokens, kinds = list(spelling.tokens), []
    for token, text in enumerate(tokens):
        if token in spelling.control:
            kinds.append(Kind.CONTROL)
        elif token in added:
            kinds.append(Kind.USER_DEFINED)
            tokens[token] = text.replace(SPACE, " ") if spaced else text  # as readers look for it
        elif token in spelling.values:
            kinds.append(Kind.BYTE)
        elif text and text == unknown:
            kinds.append(Kind.UNKNOWN)
        else:
            kinds.append(Kind.NORMAL if text else Kind.UNUSED)
    tokens += [""] * (vocab - len(tokens))
    kinds += [Kind.UNUSED] * (vocab - len(kinds))
    tokens = [text or f"[PAD{token}]" for token, text in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise FormatError("tokenizer.json: an added token has the text of another; a GGUF file needs unique texts")
    return tokens, [int(kind) for kind in kinds]


def _refuse_late(content: Mapping[str, Any], merges: list[Any], pieces: Mapping[str, int]) -> None:
    """FormatError: an added token with spaces is made after others are, where a GGUF file's readers look for it first.

    Gemma's tokens of spaces in a row are made by its first merges.
    """
    added = [token for token in content.get("added_tokens") or () if not (token["special"] or token["normalized"])]
    spaced = [token["content"] for token in added if SPACE in token["content"]]
    made = [left + right for left, right in merges]
    first = next((i for i, token in enumerate(made) if SPACE in token and token in pieces), len(made))
    early = set(made[:first])
    if late := [token for token in spaced if token not in early]:
        raise FormatError(
            f"tokenizer.json: its added token {late[0]!r:.60} is found after others are merged; {_REMEDY}"
        )


def _scores(merges: list[Any], pieces: Mapping[str, int], vocab: int) -> list[float]:
    """Of every token; those that no merge makes have one that is never asked for."""
    try:
        found = scores_of(merges, pieces)
    except FormatError as error:
        raise FormatError(f"tokenizer.json: {error}, so no scores of tokens say the same; {_REMEDY}") from None
    scores = [0.0] * vocab
    for token, score in found.items():
        scores[pieces[token]] = score
    return scores


def _space_prefix(folder: Folder, content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text. FormatError where texts are prepared otherwise than SentencePiece does."""
    model = content["model"]
    normalizer, pre_tokenizer = (_steps(content, *names) for names in _STEPS)
    prefix = next((prefix for prefix, wanted in _SPACES if wanted == (normalizer, pre_tokenizer)), None)
    if prefix is None or prefix != folder.spelling.drop_space:
        raise FormatError(
            "tokenizer.json: its normalizer, pre-tokenizer and decoder are not those of Llama 2 or Gemma, and GGUF has "
            f"no name for them; {_REMEDY}"
        )
    bytes_known = len(folder.spelling.values) == 256 if model.get("byte_fallback") else not folder.spelling.values
    spelled = model.get("byte_fallback") or model.get("unk_token") and model.get("fuse_unk")
    odd = any(model.get(key) for key in (*_ODD, "ignore_merges"))
    if not bytes_known or not spelled or odd or any(map(_has_edges, content.get("added_tokens") or ())):
        raise FormatError(f"tokenizer.json: its BPE works otherwise than a GGUF file's llama; {_REMEDY}")
    return prefix


def _steps(content: Mapping[str, Any], name: str, parts: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, one or many."""
    given = content.get(name)
    if given is None:
        return []
    return list(given[parts]) if given.get("type") == "Sequence" else [given]


def _special(folder: Folder, name: str) -> dict[str, Any]:
    """Ids of special tokens, and whether they begin and end every text."""
    eos = folder.control_tokens.get(str(folder.special.get("eos_token")))
    others = sorted(folder.ends - {eos} - {folder.control_tokens.get(name) for name in END_NAMES})
    keys = ["eos_token_id", "eot_token_id", "eom_token_id"][eos is not None :]
    if len(others) > len(keys):
        raise FormatError(f"{len(folder.ends)} tokens end an answer, more than a GGUF file can name")
    if ordinary := [token for token in others if token not in folder.spelling.control]:
        raise FormatError(f"eos_token_id names token {ordinary[0]}, which is ordinary text in {name}")
    found: dict[str, Any] = {} if eos is None else {"eos_token_id": eos}
    found |= dict(zip(keys, others, strict=False))
    if folder.bos is not None:
        found["bos_token_id"] = folder.bos
    if folder.prefix not in ([], [folder.bos]) or folder.suffix not in ([], [eos]):
        raise FormatError(f"{name}: what it puts around a text is more than BOS and EOS; {_REMEDY}")
    return found | {"add_bos_token": bool(folder.prefix), "add_eos_token": bool(folder.suffix)}


def _pre(content: Mapping[str, Any]) -> str:
    """GGUF's name of how texts are split before merging."""
    normalizer, pre_tokenizer = (_steps(content, *names) for names in _STEPS)
    steps = [_bare(step) for step in pre_tokenizer]
    nfc = [step["type"] for step in normalizer] == ["NFC"]
    alike = [name for name, form in FORMS.items() if form.nfc == nfc and _published(form) == steps]
    if not alike or normalizer and not nfc:
        raise FormatError(f"tokenizer.json: GGUF has no name for its pre-tokenizer and normalizer; {_REMEDY}")
    whole = bool(content["model"].get("ignore_merges"))
    name = next((name for name in alike if FORMS[name].ignore_merges == whole), None)
    if name is None or not _plain_bpe(content["model"]) or any(map(_has_edges, content.get("added_tokens") or ())):
        raise FormatError(f"tokenizer.json: its BPE works otherwise than a GGUF file's {name or alike[0]}; {_REMEDY}")
    return name


def _plain_bpe(model: Mapping[str, Any]) -> bool:
    """Whether merging depends on the merges alone; where every byte is known, a token for the unknown has no part."""
    known = not model.get("unk_token") or all(character in model["vocab"] for character in BYTES)
    return known and not any(model.get(key) for key in _ODD)


def _has_edges(added: Mapping[str, Any]) -> bool:
    return any(added.get(key) for key in ("lstrip", "rstrip", "single_word"))


def _bare(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what has no bearing on the ids: a pattern may keep its matches, where they are the whole text."""
    bare = {key: value for key, value in step.items() if key != "trim_offsets"}
    kept = bare.get("behavior") == "Removed" and bare.get("invert") is True
    return bare | _ISOLATED if kept and bare.get("pattern", {}).get("Regex") in _WHOLE else bare


def _published(form: Form) -> list[dict[str, Any]]:
    """The steps of a form as tokenizer.json has them."""
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, **_ISOLATED} for pattern in form.splits]
    digits = [{"type": "Digits", "individual_digits": True}] if form.digits else []
    return [*splits, *digits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not form.splits}]


_STEPS = (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
_ISOLATED = {"behavior": "Isolated", "invert": False}
_WHOLE = {form.splits[0] for form in FORMS.values() if len(form.splits) == 1 and not form.digits}  # every text matches
_ODD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_ESCAPE_LATER = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
# Whether a space is put before a text: normalizer and pre-tokenizer. No space is left for Gemma's to split at.
_SPACES: list[tuple[bool, tuple[list[Any], list[Any]]]] = [
    (True, ([{"type": "Prepend", "prepend": SPACE}, _ESCAPE], [])),
    (False, ([_ESCAPE], [])),
    (False, ([_ESCAPE], [_NO_SPLIT])),
    (False, ([], [_ESCAPE_LATER])),
]
