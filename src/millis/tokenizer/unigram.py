"""Tokenizers of folders that have no tokenizer.json but SentencePiece's files: T5's spiece.model, Marian's two .spm.

The pieces are run by the `tokenizers` library's Unigram, behind the normalizer that the file carries.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis.tokenizer.spm_file import SpmFile, read_spm
from millis.tokenizer.vocabulary import MAX_ENTRIES, Kind
from millis.types import FormatError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_SPACE = "\u2581"
_EXTRA_IDS = 100  # that T5 puts behind its pieces, the last one first


def read_t5(path: Path, config: dict[str, Any]) -> Backend:
    """T5's tokenizer out of spiece.model, as tokenizer.json would have it. FormatError."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    file = read_spm(path)
    extra = config.get("extra_ids", _EXTRA_IDS)
    if type(extra) is not int or not 0 <= extra <= MAX_ENTRIES:
        raise FormatError(f"tokenizer_config.json: extra_ids must be a whole number, not {extra!r:.40}")
    backend = backend_of(file, [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra))])
    control = [piece for piece, kind in zip(file.pieces, file.kinds, strict=True) if kind == Kind.CONTROL]
    named = [*control, file.pieces[file.unknown], *(f"<extra_id_{i}>" for i in range(extra))]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in named])
    end = config.get("eos_token", "</s>")
    end = end.get("content") if isinstance(end, dict) else end
    number = backend.token_to_id(end) if isinstance(end, str) else None
    if number is None:
        raise FormatError(f"{path.name} has no piece {end!r:.40} to end a text with")
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
    return backend


def backend_of(file: SpmFile, more: list[tuple[str, float]] | None = None) -> Backend:
    """A SentencePiece model as the library runs it, `more` pieces behind its own. FormatError: its charsmap is damaged."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    pieces = [*zip(file.pieces, file.scores, strict=True), *(more or [])]
    try:
        backend = Tokenizer(Unigram(pieces, unk_id=file.unknown, byte_fallback=int(Kind.BYTE) in file.kinds))
        steps: list[Any] = [normalizers.Precompiled(file.charsmap)] if file.charsmap else []
        if file.collapse:
            steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        backend.normalizer = normalizers.Sequence(steps)
        scheme = "always" if file.prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
        backend.encode("a")
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # the library's own failure
            raise FormatError(f"the SentencePiece model cannot be run: {str(error)[:200]}") from None
        raise
    return backend


class MarianEncoder:
    """Text → ids of Marian's vocabulary, by the pieces of the source language's file.

    A text may begin with the language it is to be translated to, as >>fra<<, where the vocabulary knows that.
    """

    def __init__(self, file: SpmFile, vocabulary: dict[str, int], unknown: int) -> None:
        self._backend = backend_of(file)
        self._pieces, self._unknown_piece = file.pieces, file.unknown
        self._vocabulary, self._unknown = vocabulary, unknown

    def __call__(self, text: str) -> list[int]:
        code: list[int] = []
        if text.startswith(">>") and (end := text.find("<<")) != -1:
            name, text = text[: end + 2], text[end + 2 :]
            if name not in self._vocabulary:
                known = [token for token in self._vocabulary if token.startswith(">>") and token.endswith("<<")]
                raise RequestError(f"the model has no language {name:.40}; {' '.join(known[:40]) or 'it has but one'}")
            code = [self._vocabulary[name]]
        found = self._backend.encode(text, add_special_tokens=False)
        ids = []
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            piece = self._pieces[number]
            if number == self._unknown_piece and text[start:stop] in self._vocabulary:
                piece = text[start:stop]  # SentencePiece hands out unknown characters as they are
            ids.append(self._vocabulary.get(piece, self._unknown))
        return code + ids
