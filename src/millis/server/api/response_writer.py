"""Events → a response of /v1/responses, whole or as its stream of typed events. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millis.server.api.errors import ApiError
from millis.server.api.logprobs import response_logprobs
from millis.server.api.tool_parser import Call, Piece
from millis.server.api.writer import Choice, Writer, call_id, sse
from millis.types import TokenLogprob


class ResponseWriter(Writer):
    """Every stretch of text is a message of its own, every call an item; a response has one choice."""

    _sequence = 0

    def body(self) -> dict[str, Any]:
        choice = self.choices[0]
        output = [self._item(choice, i, piece, _status(choice)) for i, piece in enumerate(choice.pieces or [""])]
        response = self._response(_status(choice), output)
        if self.job.keep is not None:
            self.job.keep(response)
        return response

    def error(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _take(self, choice: Choice, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob]) -> bytes:
        """What was held back counts to the piece that it turns out to be; of a call no log-probability is told."""
        choice.held += logprobs
        if choice.parser is not None and not pieces:
            return b""
        at = len(choice.pieces) - (_in_text(choice) and not (pieces and isinstance(pieces[0], Call)))
        share, choice.held = choice.held, []
        choice.shares.setdefault(at, []).extend(share)
        return super()._take(choice, pieces, share)

    def _begin(self) -> bytes:
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _delta(self, choice: Choice, piece: Piece, logprobs: Sequence[TokenLogprob]) -> bytes:
        if isinstance(piece, Call):
            return self._text_done(choice, "completed") + self._call(choice, len(choice.pieces), piece)
        sent = b""
        if not _in_text(choice):
            sent = self._text_begun(len(choice.pieces))
        at = len(choice.pieces) - _in_text(choice)
        return sent + self._event(
            "response.output_text.delta", **self._part_of(at), delta=piece, logprobs=self._logprobs(logprobs)
        )

    def _finish(self, choice: Choice) -> bytes:
        sent = b""
        if not choice.pieces:  # a response without text has an empty one
            sent = self._text_begun(0)
            choice.add("")
        return sent + self._text_done(choice, _status(choice))

    def _end(self) -> bytes:
        status = _status(self.choices[0])
        return self._event(f"response.{status}", response=self.body())

    def _text_begun(self, at: int) -> bytes:
        item = {"id": self._id("msg", at), "type": "message", "status": "in_progress", "role": "assistant"}
        return self._event("response.output_item.added", output_index=at, item={**item, "content": []}) + self._event(
            "response.content_part.added", **self._part_of(at), part=_text_part("", [])
        )

    def _text_done(self, choice: Choice, status: str) -> bytes:
        if not _in_text(choice):
            return b""
        at = len(choice.pieces) - 1
        text, logprobs = choice.pieces[at], self._logprobs(choice.shares.get(at, ()))
        item = self._item(choice, at, text, status)
        return (
            self._event("response.output_text.done", **self._part_of(at), text=text, logprobs=logprobs)
            + self._event("response.content_part.done", **self._part_of(at), part=item["content"][0])
            + self._event("response.output_item.done", output_index=at, item=item)
        )

    def _call(self, choice: Choice, at: int, call: Call) -> bytes:
        done = self._item(choice, at, call, "completed")
        begun = {**done, "arguments": "", "status": "in_progress"}
        where = {"item_id": done["id"], "output_index": at}
        name = "response.function_call_arguments"
        return (
            self._event("response.output_item.added", output_index=at, item=begun)
            + self._event(f"{name}.delta", **where, delta=call.arguments)
            + self._event(f"{name}.done", **where, name=call.name, arguments=call.arguments)
            + self._event("response.output_item.done", output_index=at, item=done)
        )

    def _item(self, choice: Choice, at: int, piece: Piece, status: str) -> dict[str, Any]:
        if isinstance(piece, Call):
            return {
                "id": self._id("fc", at),
                "type": "function_call",
                "status": "completed",
                "call_id": call_id(self.head, 0, at),
                "name": piece.name,
                "arguments": piece.arguments,
            }
        return {
            "id": self._id("msg", at),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_text_part(piece, self._logprobs(choice.shares.get(at, ())))],
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        choice = self.choices[0]
        reason = {"length": "max_output_tokens"}.get(choice.finish_reason or "", choice.finish_reason)
        response = {
            "id": f"resp_{self.head.id}",
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "model": self.head.model,
            "output": output,
            "temperature": self.job.params.temperature,
            "top_p": self.job.params.top_p,
            "usage": None,
            **self.job.extra,
        }
        if status == "in_progress":
            return response
        prompt, cached, completion = self.counts()
        response["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }
        return response | {"timings": self.timings()}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = sse({"type": kind, "sequence_number": self._sequence, **fields}, kind)
        self._sequence += 1
        return event

    def _part_of(self, at: int) -> dict[str, Any]:
        return {"item_id": self._id("msg", at), "output_index": at, "content_index": 0}

    def _id(self, prefix: str, at: int) -> str:
        return f"{prefix}_{self.head.id}{at:02x}"

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return response_logprobs(logprobs, self.head.token_bytes)


def _status(choice: Choice) -> str:
    return "completed" if choice.finish_reason in ("stop", "tool_calls") else "incomplete"


def _in_text(choice: Choice) -> bool:
    return bool(choice.pieces) and isinstance(choice.pieces[-1], str)


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
