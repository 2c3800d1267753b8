"""Events → a message of /v1/messages, whole or as its stream of typed events. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from millis.server.api.errors import ApiError
from millis.server.api.tool_parser import Call, Piece
from millis.server.api.writer import Choice, Writer, sse
from millis.types import TokenLogprob

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter(Writer):
    """Every stretch of text and every call is a content block; a message has one choice."""

    def body(self) -> dict[str, Any]:
        choice = self.choices[0]
        blocks = [self._block(i, piece) for i, piece in enumerate(choice.pieces)]
        reason, stop = _stop_reason(choice)
        message = self._message(blocks, self._usage())
        return message | {"stop_reason": reason, "stop_sequence": stop, "timings": self.timings()}

    def error(self, error: ApiError) -> bytes:
        return sse(error.anthropic_body(), "error")

    def _begin(self) -> bytes:
        empty = {"input_tokens": self.prompt_tokens, "output_tokens": 0}
        return _event("message_start", message=self._message([], empty))

    def _delta(self, choice: Choice, piece: Piece, logprobs: Sequence[TokenLogprob]) -> bytes:
        open_text = bool(choice.pieces) and isinstance(choice.pieces[-1], str)
        at = len(choice.pieces)
        if isinstance(piece, Call):
            before = _event("content_block_stop", index=at - 1) if open_text else b""
            begun = {**self._block(at, piece), "input": {}}
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
            return (
                before
                + _event("content_block_start", index=at, content_block=begun)
                + _event("content_block_delta", index=at, delta=delta)
                + _event("content_block_stop", index=at)
            )
        delta = {"type": "text_delta", "text": piece}
        if open_text:
            return _event("content_block_delta", index=at - 1, delta=delta)
        opening = _event("content_block_start", index=at, content_block=self._block(at, ""))
        return opening + _event("content_block_delta", index=at, delta=delta)

    def _finish(self, choice: Choice) -> bytes:
        last = len(choice.pieces) - 1
        stop = _event("content_block_stop", index=last) if last >= 0 and isinstance(choice.pieces[-1], str) else b""
        reason, sequence = _stop_reason(choice)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return stop + _event("message_delta", delta=delta, usage=self._usage())

    def _end(self) -> bytes:
        return _event("message_stop", timings=self.timings())

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self.head.id}",
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _block(self, at: int, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Call):
            call = f"toolu_{self.head.id}{at:02x}"
            return {"type": "tool_use", "id": call, "name": piece.name, "input": json.loads(piece.arguments)}
        return {"type": "text", "text": piece}

    def _usage(self) -> dict[str, Any]:
        prompt, cached, completion = self.counts()
        return {
            "input_tokens": prompt - cached,  # those that were computed
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": completion,
        }


def _stop_reason(choice: Choice) -> tuple[str | None, str | None]:
    if choice.finish_reason == "stop":
        return ("end_turn", None) if choice.stop is None else ("stop_sequence", choice.stop)
    return _REASONS.get(choice.finish_reason or "", choice.finish_reason), None


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)
