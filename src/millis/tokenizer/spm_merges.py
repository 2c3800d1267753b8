"""SentencePiece BPE on the `tokenizers` library: scores of tokens as ranks of merges, and back.

SentencePiece merges the two symbols that become the token of best score; the library merges the pair that stands first.
Both choose alike where the pairs that make a token stand together, in the order of the tokens' scores, as transformers
converts (`generate_merges`). Two differences are left. Overlapping pairs that make the same token, or tokens of equal
scores: SentencePiece takes the leftmost, the library its pair of lower rank. And with a space before every text
(Llama), the library puts one behind every user-defined token, too, as transformers' own conversion has it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from millis.tokenizer.spm import SPACE, byte_tokens, unknown_token
from millis.tokenizer.vocabulary import PREFIX, Kind, Vocabulary
from millis.types import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_MAX_CHARACTERS = 1024  # of a token; SentencePiece makes none of more than 16 unless asked to


def spm_backend(vocabulary: Vocabulary) -> Backend:
    """The library's model of a SentencePiece vocabulary, user-defined tokens found in any text.

    FormatError names what the library cannot do as SentencePiece does.
    """
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    if not vocabulary.scores:
        raise FormatError(f"{PREFIX}scores is missing; a SentencePiece model needs it")
    prefix, fallback = vocabulary.add_space_prefix, byte_tokens(vocabulary)
    unknown = unknown_token(vocabulary, fallback)
    written = {token: token.replace(" ", SPACE) for token in vocabulary.of_kind(Kind.USER_DEFINED)}
    known = {written.get(token, token): i for i, token in enumerate(vocabulary.tokens)}
    _refuse(vocabulary, written.values(), known)
    whole = Backend(
        BPE(
            known,
            merges_of({token: vocabulary.scores[i] for token, i in vocabulary.of_kind(Kind.NORMAL).items()}),
            unk_token=None if unknown < 0 else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=bool(fallback),
        )
    )
    escape = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]
    whole.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    whole.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    # Normalised tokens are found where spaces are written as U+2581, but would get the space before a text themselves.
    whole.add_tokens([AddedToken(text, normalized=not prefix, special=False) for text in written.values()])
    return whole


def _refuse(vocabulary: Vocabulary, written: Collection[str], known: Mapping[str, int]) -> None:
    """FormatError for what would get other ids. `written`: the user-defined tokens, `known`: all, with U+2581."""
    unused, normal = vocabulary.of_kind(Kind.UNUSED), vocabulary.of_kind(Kind.NORMAL)
    made = next((token for token in unused if any(_pairs(token, normal | unused))), None)
    short = next((t for t in vocabulary.of_kind(Kind.CONTROL, Kind.UNKNOWN) if len(t) == 1), None)
    spaced = next((token for token in written if SPACE in token), None) if vocabulary.add_space_prefix else None
    if len(known) < len(vocabulary.tokens):
        fault = "a user-defined token differs from another only in how spaces are written"
    elif made is not None:
        fault = f"{made!r:.60} is unused, and other tokens make it"
    elif short is not None:
        fault = f"{short!r} is a control token of one character"
    elif spaced is not None:
        fault = f"{spaced!r:.60} is user-defined with a space in it, and every text gets a space before it"
    else:
        return
    raise FormatError(f"{PREFIX}tokens: {fault}, which a folder cannot say")


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first; of one token's pairs the longest left part first.

    FormatError: a token is too long.
    """
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    return [pair for token in ranked for pair in reversed(list(_pairs(token, scores)))]


def scores_of(merges: Iterable[tuple[str, str]], pieces: Mapping[str, int]) -> dict[str, float]:
    """Scores with which SentencePiece merges `pieces` (token → id) as `merges` has it, for each token that they make.

    Merges into other tokens are passed over: those are found in a text before any merge, or never.
    FormatError: merges that no scores stand for.
    """
    scores: dict[str, float] = {}
    given: set[tuple[str, str]] = set()
    last = ""
    for left, right in merges:
        token = left + right
        if token not in pieces:
            continue
        if left not in pieces or right not in pieces:
            raise FormatError(f"its merges make {token!r:.60} of a token that is special or added")
        if token != last and token in scores:
            raise FormatError(f"its merges make {token!r:.60} at two ranks")
        scores.setdefault(token, -float(len(scores)))
        given.add((left, right))
        last = token
    for token in pieces:
        for pair in _pairs(token, pieces):
            if pair not in given:
                raise FormatError(f"its merges do not make {token!r:.60} of {pair[0]!r:.60} and {pair[1]!r:.60}")
    return scores


def _pairs(token: str, known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The ways to make `token` of two known ones."""
    if len(token) > _MAX_CHARACTERS:
        raise FormatError(f"a token has {len(token)} characters; {_MAX_CHARACTERS} can be merged")
    for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in known and right in known:
            yield left, right
