"""A folder's tokenizer.json as the tokenizer section of a GGUF file: byte-level BPE only, the same ids for every text.

A pre-tokenizer that GGUF has no name for is refused, so that no file splits texts otherwise than the folder did.
Key names: the GGUF specification (tokenizer.ggml.*).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millis.tokenizer.bpe import SPLITS
from millis.tokenizer.detokenize import BYTES
from millis.tokenizer.folder import Folder, read_folder
from millis.tokenizer.vocabulary import END_NAMES, PREFIX, Kind
from millis.types import FormatError

_REMEDY = "give a GGUF file of this model instead"


def tokenizer_metadata(path: Path, vocab: int) -> dict[str, Any]:
    """tokenizer.* of the folder `path` for a model whose embedding has `vocab` rows.

    FormatError: a malformed folder, or a tokenizer that a GGUF file cannot stand for.
    """
    folder = read_folder(Path(path))
    content = json.loads((Path(path) / "tokenizer.json").read_bytes())
    model = content["model"]
    if model.get("type") != "BPE" or folder.spelling.style != "byte-level" or model.get("byte_fallback"):
        raise FormatError(f"tokenizer.json: only byte-level BPE can be written to a GGUF file; {_REMEDY}")
    if not model.get("merges"):
        raise FormatError(f"tokenizer.json: it has no merges, without which readers refuse a GGUF file; {_REMEDY}")
    tokens, kinds = _tokens(folder, vocab)
    found = {
        "model": "gpt2",
        "pre": _pre(content),
        "tokens": tokens,
        "token_type": kinds,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        **_special(folder, content),
    }
    metadata = {PREFIX + key: value for key, value in found.items()}
    return metadata | ({} if folder.template is None else {"tokenizer.chat_template": folder.template})


def _tokens(folder: Folder, vocab: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; rows of the embedding that no token has become unused tokens."""
    spelling = folder.spelling
    if spelling.size > vocab:
        raise FormatError(f"tokenizer.json has {spelling.size} tokens, the model's embedding {vocab} rows")
    tokens, kinds = list(spelling.tokens), []
    for token, text in enumerate(tokens):
        if token in spelling.control:
            kinds.append(Kind.CONTROL)
        elif token in spelling.literal:
            kinds.append(Kind.USER_DEFINED)
        else:
            kinds.append(Kind.NORMAL if text else Kind.UNUSED)
    tokens += [""] * (vocab - len(tokens))
    kinds += [Kind.UNUSED] * (vocab - len(kinds))
    tokens = [text or f"[PAD{token}]" for token, text in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise FormatError("tokenizer.json: an added token has the text of another; a GGUF file needs unique texts")
    return tokens, [int(kind) for kind in kinds]


def _special(folder: Folder, content: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens, and whether they begin and end every text."""
    eos = folder.control_tokens.get(str(folder.special.get("eos_token")))
    others = sorted(folder.ends - {eos} - {folder.control_tokens.get(name) for name in END_NAMES})
    keys = ["eos_token_id", "eot_token_id", "eom_token_id"][eos is not None :]
    if len(others) > len(keys):
        raise FormatError(f"{len(folder.ends)} tokens end an answer, more than a GGUF file can name")
    if ordinary := [token for token in others if token not in folder.spelling.control]:
        raise FormatError(f"eos_token_id names token {ordinary[0]}, which is ordinary text in tokenizer.json")
    found: dict[str, Any] = {} if eos is None else {"eos_token_id": eos}
    found |= dict(zip(keys, others, strict=False))
    if folder.bos is not None:
        found["bos_token_id"] = folder.bos
    if folder.prefix not in ([], [folder.bos]) or folder.suffix not in ([], [eos]):
        raise FormatError(f"tokenizer.json: what it puts around a text is more than BOS and EOS; {_REMEDY}")
    return found | {"add_bos_token": bool(folder.prefix), "add_eos_token": bool(folder.suffix)}


def _pre(content: Mapping[str, Any]) -> str:
    """GGUF's name of how texts are split before merging."""
    given = content.get("pre_tokenizer") or {}
    steps = given["pretokenizers"] if given.get("type") == "Sequence" else [given]
    name = next((name for name, wanted in _PRE.items() if [_bare(step) for step in steps] == wanted), None)
    normalizer = (content.get("normalizer") or {}).get("type")
    if name is None or normalizer not in (None, "NFC") or (normalizer == "NFC") != (name == "qwen2"):
        raise FormatError(f"tokenizer.json: GGUF has no name for its pre-tokenizer and normalizer; {_REMEDY}")
    if not _plain_bpe(content["model"], name) or any(map(_has_edges, content.get("added_tokens") or ())):
        raise FormatError(f"tokenizer.json: its BPE works otherwise than a GGUF file's {name}; {_REMEDY}")
    return name


def _plain_bpe(model: Mapping[str, Any], pre: str) -> bool:
    """Whether merging depends on the merges alone; where every byte is known, a token for the unknown has no part."""
    known = not model.get("unk_token") or all(character in model["vocab"] for character in BYTES)
    odd = any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return known and not odd and bool(model.get("ignore_merges")) == (pre == "llama-bpe")


def _has_edges(added: Mapping[str, Any]) -> bool:
    return any(added.get(key) for key in ("lstrip", "rstrip", "single_word"))


def _bare(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what has no bearing on the ids."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(name: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": SPLITS[name]}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


_PRE: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    **{name: _split(name) for name in SPLITS},
}
