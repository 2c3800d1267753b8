"""From events to answers: what the writers of all generating endpoints share. Pure; a server feeds and sends.

    writer.begin() → for every event feed(index, …) or finish(index, …) → end(), or body() without a stream

Where the job streams, each returns the bytes to send now (maybe none); otherwise they return b"".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from millis.server.api.errors import ApiError, deadline_exceeded
from millis.server.api.job import Job
from millis.server.api.tool_parser import Call, Piece, ToolParser
from millis.server.api.tools import free_text
from millis.tasks.text import Detokenizer
from millis.types import FinishReason, Timings, TokenLogprob

DONE = b"data: [DONE]\n\n"
_MOST = ("queue_ms", "tokenize_ms", "prefill_ms", "first_token_ms", "decode_ms", "total_ms", "deadline_ms")
_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens", "steps")


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer says of itself. `id` is bare: every endpoint puts its own prefix before it.

    The functions are of the model's tokenizer, and called only where log-probabilities are wanted.
    """

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str
    token_bytes: Callable[[int], bytes]
    detokenizer: Callable[[], Detokenizer]  # of a text that goes on


@dataclass(slots=True)
class Choice:
    """One answer on its way."""

    index: int
    parser: ToolParser | None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # text between calls joined
    logprobs: list[TokenLogprob] = field(default_factory=list)
    echo: dict[str, list[Any]] | None = None  # log-probabilities of the prompt that the text begins with
    shares: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # of each piece, for /v1/responses
    held: list[TokenLogprob] = field(default_factory=list)  # of tokens of which it is not known yet
    finish_reason: str | None = None
    stop: str | None = None  # the stop text that ended it
    timings: Timings = field(default_factory=Timings)

    def clear(self) -> None:
        """Forgets what was written."""
        self.text, self.echo = "", None
        for parts in (self.calls, self.pieces, self.logprobs, self.shares, self.held):
            parts.clear()

    def add(self, piece: Piece) -> None:
        if isinstance(piece, Call):
            self.calls.append(piece)
            self.pieces.append(piece)
            return
        self.text += piece
        if self.pieces and isinstance(self.pieces[-1], str):
            self.pieces[-1] += piece
        else:
            self.pieces.append(piece)


class Writer:
    """Collects the choices of a job. Subclasses say how their endpoint writes them."""

    def __init__(self, job: Job, head: Head) -> None:
        self.job, self.head = job, head
        names = [tool.name for tool in job.tools if job.tool_choice.offers(tool)]
        count = len(job.prompts) * job.n
        self.prompt_tokens = 0  # until the timings say
        bare = free_text(job.params.grammar)
        self.choices = [Choice(i, ToolParser(names, bare=bare) if names else None) for i in range(count)]

    def begin(self, prompt_tokens: int = 0) -> bytes:
        """What a stream begins with, before any token is there; the prompts have `prompt_tokens` in all."""
        self.prompt_tokens = prompt_tokens
        return self._begin() if self.job.stream else b""

    def feed(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """New text of a choice, nothing of it from a stop text on, and the log-probabilities of its tokens."""
        choice = self.choices[index]
        pieces = choice.parser.feed(text) if choice.parser else [text] if text else []
        return self._take(choice, pieces, logprobs)

    def finish(self, index: int, reason: FinishReason, timings: Timings, stop: str | None = None) -> bytes:
        """The end of a choice; `stop` is the stop text that ended it.

        ApiError deadline_exceeded where time ran out and the job asks for an error then.
        """
        choice = self.choices[index]
        choice.timings, choice.stop = timings, stop
        pieces = choice.parser.finish(cut=reason != "stop") if choice.parser else []
        late = reason == "deadline"
        if late and self.job.on_deadline == "error":
            raise deadline_exceeded()
        if late and self.job.on_deadline == "fallback" and not (self.job.stream and choice.pieces):
            choice.clear()
            pieces = [self.job.fallback]
        sent = self._take(choice, pieces, ())
        choice.finish_reason = "tool_calls" if choice.calls and reason == "stop" else reason
        return sent + (self._finish(choice) if self.job.stream else b"")

    def end(self) -> bytes:
        """What a stream ends with, once every choice is finished."""
        return self._end() if self.job.stream else b""

    def _completion(
        self, prefix: str, kind: str, choices: list[dict[str, Any]], used: dict[str, Any] | None
    ) -> dict[str, Any]:
        """An object of OpenAI's completions, of chats and of texts alike."""
        made: dict[str, Any] = {
            "id": f"{prefix}-{self.head.id}",
            "object": kind,
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            "choices": choices,
        }
        if used is not None or self.job.include_usage:
            made["usage"] = used
        return made

    def error(self, error: ApiError) -> bytes:
        """An error in the middle of a stream; nothing follows it."""
        return sse(error.body()) + DONE

    def body(self) -> dict[str, Any]:
        """The whole answer of a job that does not stream."""
        raise NotImplementedError

    def _begin(self) -> bytes:
        return b""

    def _delta(self, choice: Choice, piece: Piece, logprobs: Sequence[TokenLogprob]) -> bytes:
        raise NotImplementedError

    def _finish(self, choice: Choice) -> bytes:
        raise NotImplementedError

    def _end(self) -> bytes:
        return DONE

    def _take(self, choice: Choice, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob]) -> bytes:
        choice.logprobs += logprobs
        sent = b""
        for piece in pieces or ([""] if logprobs else []):
            if self.job.stream:
                sent += self._delta(choice, piece, logprobs)
            choice.add(piece)
            logprobs = ()
        return sent

    def counts(self) -> tuple[int, int, int]:
        """Tokens of the prompts, those of them that were cached, and tokens of all choices. A prompt counts once."""
        firsts = [choice.timings for choice in self.choices[:: self.job.n]]
        completion = sum(choice.timings.completion_tokens for choice in self.choices)
        return sum(t.prompt_tokens for t in firsts), sum(t.cached_tokens for t in firsts), completion

    def timings(self) -> dict[str, Any]:
        """Where the milliseconds went: of the only choice, or of all together."""
        return timings_json([choice.timings for choice in self.choices])


def timings_json(timings: Sequence[Timings]) -> dict[str, Any]:
    """Timings as answers carry them: the longest of each time, the sum of each count, the least slack."""
    every = [one.asdict() for one in timings]
    found: dict[str, Any] = {}
    for name in every[0] if every else ():
        values = [one[name] for one in every if name in one]
        value = sum(values) if name in _SUMS else max(values) if name in _MOST else min(values)
        found[name] = round(value, 3) if isinstance(value, (int, float)) else value
    return found


def usage(counts: tuple[int, int, int]) -> dict[str, Any]:
    """OpenAI's usage of chat and completions."""
    prompt, cached, completion = counts
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def sse(data: Mapping[str, Any], event: str | None = None, *, long: bool = False) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    text = "data: " + to_json(data, long=long) + "\n\n"
    return (f"event: {event}\n{text}" if event else text).encode()


def to_json(data: Mapping[str, Any], *, long: bool = False, allow_nan: bool = False) -> str:
    """long: slower, for threads: what is encoded at once, in C, lets no other thread run for as long as it takes."""
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=allow_nan)
    return "".join(encoder.iterencode(data)) if long else encoder.encode(data)


def call_id(head: Head, choice: int, number: int) -> str:
    """The id of a call, unlike that of any other answer."""
    return f"call_{head.id}{choice:02x}{number:02x}"
