"""What the bytes of an answer say: server-sent events, tokens and their times, usage, refusals. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from millis.bench.serve_wire import Exchange

REFUSING = (429, 503)
LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. Seconds; latencies count from when it was to be sent."""

    deadline_ms: float | None = None
    start_s: float = 0.0  # the clock when it was to be sent
    lateness_s: float = 0.0  # of the load generator: sent later than that
    status: int | None = None
    error: str | None = None  # why there is no whole, well-formed answer; None: there is
    refused: str | None = None  # the server's code, where it said 429 or 503
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)  # gaps of events with content
    e2e_s: float | None = None  # to the last byte
    output_tokens: int = 0
    counted: bool = False  # by the server's usage; otherwise events with content are counted
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    text: str = ""
    valid: bool | None = None  # against the schema, where there is one
    server_ttft_s: float | None = None  # what the server says itself, where it does
    server_e2e_s: float | None = None

    @property
    def completed(self) -> bool:
        return self.error is None and self.refused is None

    @property
    def admitted(self) -> bool:
        """The server took it on, whatever came of it."""
        return self.status == 200

    @property
    def tpot_s(self) -> float | None:
        """(E2E − TTFT) / (n − 1); None for fewer than two tokens."""
        if self.ttft_s is None or self.e2e_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def in_time(self) -> bool:
        """Whole and, where it has a deadline, by then."""
        late = self.deadline_ms is not None and (self.e2e_s is None or 1e3 * self.e2e_s > self.deadline_ms)
        return self.completed and not late


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Server-sent events (WHATWG HTML, 9.2) out of a body's pieces: each event's data, and when its last byte came."""
    rest, ended_by_cr, first = b"", False, True
    data: list[bytes] = []
    for when, piece in pieces:
        if ended_by_cr and piece:  # the second half of a line end
            piece, ended_by_cr = piece.removeprefix(b"\n"), False
        rest += piece
        start = 0
        while found := LINE_END.search(rest, start):
            line, start = rest[start : found.start()], found.end()
            if first:
                line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            if found.group() == b"\r" and start == len(rest):
                ended_by_cr = True
            if not line:
                if data:
                    yield when, b"\n".join(data)
                data = []
            elif line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif line == b"data":
                data.append(b"")
        rest = rest[start:]


def read(exchange: Exchange, answer: Answer) -> Answer:
    """Fills in what came back. `answer` has the request's own part already."""
    answer.start_s, answer.status = exchange.scheduled_s, exchange.status
    if exchange.sent_s is not None:
        answer.lateness_s = exchange.sent_s - exchange.scheduled_s
    if exchange.status not in (None, 200):
        code = _error_code(exchange.pieces)
        if exchange.status in REFUSING:
            answer.refused = code or f"http {exchange.status}"
        else:
            answer.error = f"http {exchange.status}" + (f": {code}" if code else "")
    if exchange.error is not None:
        answer.error = answer.error or exchange.error
    if exchange.end_s is not None:
        answer.e2e_s = exchange.end_s - exchange.scheduled_s
    if exchange.status == 200:
        _read_chunks(exchange, answer)
    return answer


def _read_chunks(exchange: Exchange, answer: Answer) -> None:
    times, texts, done = [], [], False
    try:
        for when, chunk in _chunks(exchange):
            if chunk is None:  # [DONE]
                done = True
                continue
            if "error" in chunk and chunk["error"]:
                answer.error = answer.error or f"error in the stream: {_code(chunk['error']) or 'no code'}"
            content = _read_chunk(chunk, answer)
            if content is not None:
                times.append(when - exchange.scheduled_s)
                texts.append(content)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        answer.error = answer.error or "malformed answer"
    answer.text = "".join(texts)
    if times:
        answer.ttft_s = times[0]
        answer.itl_s = [after - before for before, after in zip(times, times[1:], strict=False)]
    if not answer.counted:
        answer.output_tokens = len(times)
    if not (done or answer.finish_reason):
        answer.error = answer.error or "answer without an end"
    if not times:
        answer.error = answer.error or "answer without a token"


def _chunks(exchange: Exchange) -> Iterator[tuple[float, dict[str, Any] | None]]:
    """The JSON objects of a stream, or the one of a server that did not stream; None for [DONE]."""
    head = next((piece for _, piece in exchange.pieces if piece.strip()), b"")
    if head.lstrip().startswith(b"{"):
        whole = json.loads(b"".join(piece for _, piece in exchange.pieces))
        yield exchange.pieces[-1][0], whole
        yield exchange.pieces[-1][0], None
        return
    for when, data in events(exchange.pieces):
        if data.strip() == b"[DONE]":
            yield when, None
        else:
            chunk = json.loads(data)
            if not isinstance(chunk, dict):
                raise ValueError("an event must be an object")
            yield when, chunk


def _read_chunk(chunk: dict[str, Any], answer: Answer) -> str | None:
    """The text of a chunk, None if it has none. Tokens that are no text (tool calls) count as empty text."""
    if usage := chunk.get("usage"):
        if _is_count(tokens := usage.get("completion_tokens")):
            answer.output_tokens, answer.counted = tokens, True
        if _is_count(tokens := usage.get("prompt_tokens")):
            answer.prompt_tokens = tokens
        details = usage.get("prompt_tokens_details") or {}
        if _is_count(tokens := details.get("cached_tokens")):
            answer.cached_tokens = tokens
    if timings := chunk.get("timings"):
        answer.server_ttft_s = _seconds(timings.get("first_token_ms"))
        answer.server_e2e_s = _seconds(timings.get("total_ms"))
    choices = chunk.get("choices")
    if not choices:
        return None
    choice = choices[0]
    if reason := choice.get("finish_reason"):
        answer.finish_reason = str(reason)
    delta = choice.get("delta") or choice.get("message") or {}
    text = choice.get("text") or delta.get("content") or ""
    thought = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
    if not isinstance(text, str):
        raise ValueError("content must be text")
    return text if text or thought else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _seconds(value: object) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value / 1e3
    return None


def _error_code(pieces: list[tuple[float, bytes]]) -> str | None:
    try:
        body = json.loads(b"".join(piece for _, piece in pieces))
    except (ValueError, RecursionError):
        return None
    return _code(body.get("error", body)) if isinstance(body, dict) else None


def _code(error: object) -> str | None:
    """A short name for an error: OpenAI's `code`, or else its `type`."""
    if not isinstance(error, dict):
        return None
    for key in ("code", "type"):
        if isinstance(value := error.get(key), str) and value.isprintable():
            return value[:60]
    return None
