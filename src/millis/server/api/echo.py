"""Prompts as answers show them: their text, where each token begins in it, and what the model holds of each. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from millis.engine.runner import Ranked
from millis.server.api.logprobs import TokenBytes, columns, finite
from millis.tasks.text import Detokenizer


class EchoTokenizer(Protocol):
    """What of millis.tokenizer.Tokenizer an echo needs."""

    @property
    def around(self) -> tuple[list[int], list[int]]: ...

    def detokenizer(self, *, skip_special: bool = True, continues: bool = False) -> Detokenizer: ...


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt: its text, its token ids, and where each of them begins in the text, in characters."""

    text: str
    tokens: Sequence[int]
    offsets: Sequence[int]


def echo_of(prompt: object, tokens: Sequence[int], tokenizer: EchoTokenizer) -> Echo:
    """A text as it was sent, or the text of token ids; what the model puts before every text is not shown in it."""
    before = len(tokenizer.around[0])
    if list(tokens[:before]) != tokenizer.around[0]:
        before = 0
    detokenizer = tokenizer.detokenizer(skip_special=False)
    pieces = [detokenizer.push(token) for token in tokens[before:]]
    text = prompt if isinstance(prompt, str) else "".join(pieces)
    offsets, at = [0] * before, 0
    for piece in pieces:
        offsets.append(min(at, len(text)))
        at += len(piece)
    return Echo(text, tokens, offsets)


def echo_logprobs(echo: Echo, ranked: Ranked | None, count: int, token_bytes: TokenBytes) -> dict[str, list[Any]]:
    """`logprobs` of a completion's choice, up to where its answer begins: nothing is known of the first token.

    ranked: of the tokens behind it, None where there is none; `count` likely ones are told of each place.
    """
    told = [] if ranked is None else ranked.told(echo.tokens[1:])
    first, found = columns(echo.tokens[:1], [None], token_bytes), columns(echo.tokens[1:], told, token_bytes, count)
    return {name: first[name] + found[name] for name in first} | {"text_offset": list(echo.offsets)}


def prompt_logprobs(
    echo: Echo, ranked: Ranked | None, count: int, token_bytes: TokenBytes
) -> list[dict[str, Any] | None]:
    """vLLM's field of that name: of each token but the first, itself and the `count` likeliest in its place, by id."""
    shown: list[dict[str, Any] | None] = [None]
    if ranked is not None:
        for one, rank in zip(ranked.told(echo.tokens[1:]), ranked.ranks.tolist(), strict=True):
            likely = ((token, logprob, place) for place, (token, logprob) in enumerate(one.top[:count], 1))
            places: dict[str, Any] = {}
            for token, logprob, place in ((one.token, one.logprob, rank), *likely):
                text = token_bytes(token).decode(errors="replace")
                places.setdefault(str(token), {"logprob": finite(logprob), "rank": place, "decoded_token": text})
            shown.append(places)
    return shown
