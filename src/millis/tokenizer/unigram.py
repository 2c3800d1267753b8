"""SentencePiece models of the kind unigram (Kudo, 2018), run by the `tokenizers` library.

Its own reading of such models lets a text spell a control token or a byte, and forgets the space before a text that
begins with one. So pieces that no text may spell are known to it under names that no text has, and the normalizer,
unknown characters and bytes are seen to here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from millis.tokenizer.encoding import encoding
from millis.tokenizer.spm_file import SpmFile
from millis.tokenizer.vocabulary import Kind
from millis.types import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPACE = "\u2581"


class Unigram:
    """Splits texts into pieces. FormatError where the model cannot be run."""

    def __init__(self, file: SpmFile) -> None:
        if file.model != "unigram" or Kind.USER_DEFINED in file.kinds:
            fault = "a BPE model stands" if file.model != "unigram" else "user-defined pieces are not supported"
            raise FormatError(f"{fault} where a unigram model is expected; save the model with a tokenizer.json")
        self._unknown = file.unknown
        self._spoken = [kind in (Kind.NORMAL, Kind.UNUSED) for kind in file.kinds]
        bytes_of = {
            piece: i for i, (piece, kind) in enumerate(zip(file.pieces, file.kinds, strict=True)) if kind == Kind.BYTE
        }
        self._bytes = [bytes_of.get(f"<0x{byte:02X}>", -1) for byte in range(256)] if bytes_of else []
        if -1 in self._bytes:
            raise FormatError("it must hold all of <0x00> to <0xFF> as byte pieces, or none")
        try:
            self._normalizer, self._backend = _normalizer(file), self._made(file)
            self("a")
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # the library's own failure
                raise FormatError(f"the SentencePiece model cannot be run: {str(error)[:200]}") from None
            raise

    def __call__(self, text: str) -> list[int | str]:
        """The pieces' numbers, in the order of the file; a run of characters that no piece holds stands as it is."""
        normal = self._normalizer.normalize_str(text)
        found = encoding(self._backend, normal, offsets=True)
        return list(self._known(normal, found.ids, found.offsets))

    def _known(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Iterator[int | str]:
        for number, (start, stop) in zip(ids, offsets, strict=True):
            if number != self._unknown:
                yield number
            elif self._bytes:
                yield from (self._bytes[byte] for byte in text[start:stop].encode())
            else:
                yield text[start:stop]

    def _made(self, file: SpmFile) -> Backend:
        from tokenizers import Tokenizer, models

        named = [
            (piece if spoken else f" {i}", score)  # no normalized text holds a space
            for i, (piece, score, spoken) in enumerate(zip(file.pieces, file.scores, self._spoken, strict=True))
        ]
        return Tokenizer(models.Unigram(named, unk_id=file.unknown, byte_fallback=False))


def _normalizer(file: SpmFile) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(file.charsmap)] if file.charsmap else []
    if file.collapse:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if file.prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)
