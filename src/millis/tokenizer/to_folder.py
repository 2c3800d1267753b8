"""A GGUF file's tokenizer as a Hugging Face folder's files, byte-level BPE or SentencePiece's.

Byte-level BPE has the same ids for every text; what is left of differences for SentencePiece stands in spm_merges.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis.tokenizer.bpe import backend
from millis.tokenizer.spm_merges import spm_backend
from millis.tokenizer.vocabulary import PREFIX, Kind, Vocabulary, read_vocabulary, refuse_normalizer
from millis.types import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for the tokenizer of a GGUF file.

    FormatError: malformed metadata, or a tokenizer that such files cannot stand for.
    """
    from tokenizers import AddedToken, processors

    vocabulary = read_vocabulary(metadata)
    if vocabulary.model == "gpt2":
        whole = _byte_level(vocabulary)
    elif vocabulary.model == "llama":
        refuse_normalizer(metadata)
        whole = spm_backend(vocabulary)
    else:
        raise FormatError(f"{PREFIX}model is {vocabulary.model!r:.60}; gpt2 and llama can be written to a folder")
    control = vocabulary.of_kind(Kind.CONTROL)
    whole.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    around = [
        (vocabulary.tokens[token], token) if wanted and token is not None else None
        for wanted, token in ((vocabulary.add_bos, vocabulary.bos), (vocabulary.add_eos, vocabulary.eos))
    ]
    if any(around):
        begin, end = ([] if special is None else [special[0]] for special in around)
        whole.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=[special for special in around if special is not None]
        )
    names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "unk_token": vocabulary.unknown}
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


def _byte_level(vocabulary: Vocabulary) -> Backend:
    from tokenizers import AddedToken, decoders

    whole = backend(vocabulary, control=True)
    whole.decoder = decoders.ByteLevel()
    literal = vocabulary.of_kind(Kind.USER_DEFINED)
    whole.add_tokens([AddedToken(text, normalized=False, special=False) for text in literal])
    return whole
