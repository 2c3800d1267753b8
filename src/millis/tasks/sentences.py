"""Which tokens may end a sentence: where an answer that runs out of time may stop."""

from __future__ import annotations

from millis.tokenizer import Tokenizer

MARKS = tuple(mark.encode() for mark in ".!?…。！？")
CLOSING = tuple(mark.encode() for mark in "\"'”’」』»)）*")


def sentence_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids whose text ends with a full stop or its like, maybe in closing quotes, or with a new line."""
    return frozenset(token for token in range(tokenizer.vocab_size) if _ends(tokenizer.token_bytes(token)))


def _ends(text: bytes) -> bool:
    if text.endswith(b"\n"):
        return True
    while text.endswith(CLOSING):
        text = text[: -len(next(mark for mark in CLOSING if text.endswith(mark)))]
    return text.endswith(MARKS)
