"""Log-probabilities as OpenAI's endpoints write them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from millis.tasks.text import Detokenizer
from millis.types import TokenLogprob

_LEAST = -9999.0  # what OpenAI writes for a token that cannot be: JSON knows no infinity
TokenBytes = Callable[[int], bytes]


def chat_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    """`logprobs` of a chat completion's choice."""
    content = [
        {
            **_entry(one.token, one.logprob, token_bytes),
            "top_logprobs": [_entry(token, value, token_bytes) for token, value in one.top],
        }
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def response_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[dict[str, Any]]:
    """`logprobs` of a response's output_text."""
    content: list[dict[str, Any]] = chat_logprobs(logprobs, token_bytes)["content"]
    return content


class Offsets:
    """Where the tokens of an answer begin in its text, in characters; one within a character, where that begins.

    start: characters that stand before the first.
    """

    def __init__(self, detokenizer: Detokenizer, start: int = 0) -> None:
        self._detokenizer, self._at = detokenizer, start

    def next(self, token: int) -> int:
        """Of the answer's next token."""
        at = self._at
        self._at += len(self._detokenizer.push(token))
        return at


def completion_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes, offsets: Offsets) -> dict[str, Any]:
    """`logprobs` of a completion's choice, or of its next tokens."""
    found = columns([one.token for one in logprobs], logprobs, token_bytes)
    return found | {"text_offset": [offsets.next(one.token) for one in logprobs]}


def columns(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], token_bytes: TokenBytes, most: int | None = None
) -> dict[str, list[Any]]:
    """What a completion says of tokens, null where nothing is known; at most so many likely ones in place of each.

    The token itself stands beside them, as OpenAI has it. Of those that are written alike the likeliest is told.
    """
    tops: list[dict[str, float] | None] = []
    for one in logprobs:
        top: dict[str, float] = {}
        for token, value in () if one is None else (*one.top[:most], (one.token, one.logprob)):
            top.setdefault(_text(token, token_bytes), finite(value))
        tops.append(None if one is None else top)
    return {
        "tokens": [_text(token, token_bytes) for token in tokens],
        "token_logprobs": [None if one is None else finite(one.logprob) for one in logprobs],
        "top_logprobs": tops,
    }


def _entry(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    raw = token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def _text(token: int, token_bytes: TokenBytes) -> str:
    """As OpenAI writes a token that is no whole character: its bytes in hexadecimal."""
    raw = token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(value: float) -> float:
    """A log-probability as JSON can say it."""
    return value if math.isfinite(value) else _LEAST
