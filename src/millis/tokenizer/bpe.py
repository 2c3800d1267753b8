"""Byte-level BPE of a GGUF file, run by the `tokenizers` library (Sennrich et al., 2016; Radford et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from millis.tokenizer.encoding import encoding
from millis.tokenizer.pre import ALIASES, FORMS, Form, form_of
from millis.tokenizer.special import Matcher
from millis.tokenizer.vocabulary import PREFIX, Kind, Vocabulary
from millis.types import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.pre_tokenizers import PreTokenizer


class BpeEncoder:
    """Text → ids; user-defined tokens are found in any text, control tokens never.

    A byte that the vocabulary has no token for yields nothing, as in the library's own use of such a vocabulary:
    SmolLM2 lacks those of six control characters and of two lead bytes of planes 4 to 11.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._user_defined = Matcher(vocabulary.of_kind(Kind.USER_DEFINED))
        self._backend = backend(vocabulary)

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._user_defined.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(encoding(self._backend, part).ids)
        return ids


def backend(vocabulary: Vocabulary, *, control: bool = False) -> Backend:
    """The library's model; FormatError names what is wrong. `control`: with control tokens in its vocabulary."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC

    form = form_of(vocabulary.pre)
    if form is None:
        names = ", ".join(sorted([*FORMS, *ALIASES]))
        raise FormatError(f"{PREFIX}pre is {vocabulary.pre!r:.60}; Millis reads {names}")
    if vocabulary.add_space_prefix:
        raise FormatError(f"{PREFIX}add_space_prefix is set, which byte-level BPE has no meaning for")
    if not vocabulary.merges:
        raise FormatError(f"{PREFIX}merges is missing; byte-level BPE needs it")
    kinds = (Kind.NORMAL, Kind.USER_DEFINED, Kind.BYTE)
    known = vocabulary.of_kind(*kinds, Kind.CONTROL) if control else vocabulary.of_kind(*kinds)
    pairs: list[Any] = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    try:
        made = Backend(BPE(known, pairs, ignore_merges=form.ignore_merges))
    except Exception:  # the library looks up all three tokens of a merge, and names none of them usefully
        _refuse_merge(vocabulary.merges, known)
        raise
    made.pre_tokenizer = _pre_tokenizer(form)
    if form.nfc:
        made.normalizer = NFC()
    return made


def _refuse_merge(merges: Sequence[str], known: Mapping[str, int]) -> None:
    """FormatError for the first merge that is none."""
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in known or right not in known or left + right not in known:
            raise FormatError(f"{PREFIX}merges holds {merge!r:.60}, which is not a pair of tokens that make a token")


def _pre_tokenizer(form: Form) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    steps: list[PreTokenizer] = [Split(Regex(pattern), behavior="isolated") for pattern in form.splits]
    steps += [Digits(individual_digits=True)] if form.digits else []
    return Steps([*steps, ByteLevel(add_prefix_space=False, use_regex=not form.splits)])
