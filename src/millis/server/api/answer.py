"""/v1/answer: body → Job, and what an index says, then what a model makes of it → an answer or its events. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, ClassVar

from pydantic import Field

from millis.server.api.body import Body, read
from millis.server.api.conversation import check_length
from millis.server.api.errors import ApiError, invalid
from millis.server.api.fields import Scheduling, schedule
from millis.server.api.job import Job, Limits
from millis.server.api.tool_parser import Piece
from millis.server.api.writer import Choice, Writer, sse
from millis.tasks.answer import Answer, supported
from millis.types import SamplingParams, TokenLogprob

MAX_TOKENS = 64  # of the sentence, unless a request says otherwise


class AnswerRequest(Scheduling):
    """The body of POST /v1/answer."""

    refused: ClassVar[Mapping[str, str]] = {
        "temperature": "the sentence is always the likeliest",
        "messages": "give one question; a conversation belongs to /v1/chat/completions",
    }

    question: Annotated[str, Field(min_length=1)]
    model: str | None = Field(None, description="what writes the sentence; unless given, the server's first model")
    stream: bool | None = Field(None, description="the quotes at once, then the sentence as it is written")
    extractive: bool | None = Field(None, description="quotes only: no model writes a sentence")
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    user: str | None = None


def parse_answer(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(AnswerRequest, body)
    if not request.question.strip():
        raise invalid("question is empty", "question")
    check_length(len(request.question), limits, "question")
    return Job(
        endpoint="answer",
        kind="generate",
        model=request.model,
        prompts=(request.question,),
        params=SamplingParams(max_tokens=request.max_tokens or MAX_TOKENS),
        stream=request.stream is True,
        extra={"extractive": request.extractive is True},
        **schedule(request),
    )


class AnswerWriter(Writer):
    """The quotes, pieces of the sentence, and the whole answer in the end, which is what to rely on.

    `answer` must be set before anything is written: what the documents say, with the first quote as its text.
    """

    answer: Answer

    def settle(self) -> None:
        """The model's sentence takes the quote's place if it is whole and all of its numbers stand in the quotes."""
        choice, answer = self.choices[0], self.answer
        text = choice.text.strip()
        if text and choice.finish_reason == "stop" and supported(text, answer.question, answer.sources):
            answer.text, answer.written = text, "model"

    def body(self) -> dict[str, Any]:
        answer, timings = self.answer, self.answer.timings
        return {
            "id": f"answer-{self.head.id}",
            "object": "answer",
            "created": self.head.created,
            "model": self.head.model,
            "question": answer.question,
            "answer": answer.text,
            "found": answer.found,
            "probability": round(answer.probability, 4),
            "written": answer.written,
            "quotes": self._quotes(),
            "usage": {
                "prompt_tokens": timings.prompt_tokens,
                "completion_tokens": timings.completion_tokens,
                "total_tokens": timings.prompt_tokens + timings.completion_tokens,
            },
            "timings": {k: round(v, 3) if isinstance(v, float) else v for k, v in timings.asdict().items()},
        }

    def error(self, error: ApiError) -> bytes:
        return self._event("error", **error.body()["error"])

    def _quotes(self) -> list[dict[str, Any]]:
        return [asdict(source) for source in self.answer.sources]

    def _begin(self) -> bytes:
        return self._event("answer.quotes", found=self.answer.found, quotes=self._quotes())

    def _delta(self, choice: Choice, piece: Piece, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._event("answer.delta", delta=piece)

    def _finish(self, choice: Choice) -> bytes:
        return b""

    def _end(self) -> bytes:
        return self._event("answer.completed", answer=self.body())

    def _event(self, kind: str, **data: Any) -> bytes:
        return sse({"type": kind, **data}, kind)
