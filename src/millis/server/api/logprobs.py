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
    """Where the tokens of an answer begin in its text, in characters; one within a character, where that begins."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer, self._at = detokenizer, 0

    def next(self, token: int) -> int:
        """Of the answer's next token."""
        at = self._at
        self._at += len(self._detokenizer.push(token))
        return at


def completion_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes, offsets: Offsets) -> dict[str, Any]:
    """`logprobs` of a completion's choice, or of its next tokens."""
    return {
        "tokens": [_text(one.token, token_bytes) for one in logprobs],
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": [{_text(token, token_bytes): _finite(value) for token, value in one.top} for one in logprobs],
        "text_offset": [offsets.next(one.token) for one in logprobs],
    }


def _entry(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    raw = token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _text(token: int, token_bytes: TokenBytes) -> str:
    """As OpenAI writes a token that is no whole character: its bytes in hexadecimal."""
    raw = token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST
