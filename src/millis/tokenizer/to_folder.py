"""A GGUF file's tokenizer as a Hugging Face folder's files: byte-level BPE, the same ids for every text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millis.tokenizer.bpe import backend
from millis.tokenizer.vocabulary import PREFIX, Kind, read_vocabulary
from millis.types import FormatError


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for the tokenizer of a GGUF file.

    FormatError: malformed metadata, or a tokenizer that is not byte-level BPE.
    """
    from tokenizers import AddedToken, decoders, processors

    vocabulary = read_vocabulary(metadata)
    if vocabulary.model != "gpt2":
        raise FormatError(f"{PREFIX}model is {vocabulary.model!r:.60}; only byte-level BPE can be written to a folder")
    whole = backend(vocabulary, control=True)
    whole.decoder = decoders.ByteLevel()
    control, literal = (vocabulary.of_kind(kind) for kind in (Kind.CONTROL, Kind.USER_DEFINED))
    whole.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    whole.add_tokens([AddedToken(text, normalized=False, special=False) for text in literal])
    around = [
        (vocabulary.tokens[token], token) if wanted and token is not None else None
        for wanted, token in ((vocabulary.add_bos, vocabulary.bos), (vocabulary.add_eos, vocabulary.eos))
    ]
    if any(around):
        begin, end = ([] if special is None else [special[0]] for special in around)
        whole.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=[special for special in around if special is not None]
        )
    names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: vocabulary.tokens[token] for name, token in names.items() if token is not None},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
    }
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
