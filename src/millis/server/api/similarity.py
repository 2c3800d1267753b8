"""/v1/score and /v1/rerank: texts compared by the cosine of their embeddings, or by a cross-encoder. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from millis.server.api.body import Body, Wire, read
from millis.server.api.classify import check_batch
from millis.server.api.embeddings import batch_usage
from millis.server.api.errors import invalid
from millis.server.api.fields import Texts, schedule
from millis.server.api.job import Job, Limits
from millis.server.api.writer import Head, timings_json
from millis.types import Timings

_REFUSED: Mapping[str, str] = {
    "max_tokens_per_doc": "documents are read whole; shorten them",
    "rank_fields": "give the text of each document",
    "max_chunks_per_doc": "documents are read whole; shorten them",
}


class ScoreRequest(Texts):
    """The body of POST /v1/score: one text against many, or pairs."""

    refused: ClassVar[Mapping[str, str]] = _REFUSED

    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    encoding_format: Literal["float"] | None = None
    user: str | None = None


class Document(Wire):
    text: str


class RerankRequest(Texts):
    """The body of POST /v1/rerank."""

    refused: ClassVar[Mapping[str, str]] = _REFUSED

    model: str
    query: str
    documents: list[str | Document] = Field(fail_fast=True)
    top_n: Annotated[int, Field(ge=0, description="so many of the best; 0: all")] | None = None
    return_documents: bool | None = None
    user: str | None = None


def parse_score(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(ScoreRequest, body)
    first, second = _list(request.text_1), _list(request.text_2)
    check_batch(first, limits, "text_1")
    check_batch(second, limits, "text_2")
    if len(first) not in (1, len(second)):
        raise invalid(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; give one, or as many as text_2", "text_1"
        )
    pairs = [(0 if len(first) == 1 else i, len(first) + i) for i in range(len(second))]
    return Job(
        endpoint="score",
        kind="embed",
        model=request.model,
        prompts=(*first, *second),
        extra={"pairs": pairs, "fields": [*_places("text_1", request.text_1), *_places("text_2", request.text_2)]},
        **schedule(request),
    )


def parse_rerank(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(RerankRequest, body)
    documents = [one if isinstance(one, str) else one.text for one in request.documents]
    check_batch([request.query], limits, "query")
    check_batch(documents, limits, "documents")
    return Job(
        endpoint="rerank",
        kind="embed",
        model=request.model,
        prompts=(request.query, *documents),
        extra={
            "pairs": [(0, 1 + i) for i in range(len(documents))],
            "top": request.top_n or len(documents),
            "documents": request.return_documents is not False,
            "fields": ["query", *_places("documents", documents)],
        },
        **schedule(request),
    )


def cosines(job: Job, vectors: NDArray[np.float32]) -> list[float]:
    """Of the job's pairs. vectors: [prompts, dimensions] f32, unit length."""
    return [float(vectors[i] @ vectors[j]) for i, j in job.extra["pairs"]]


def score_body(job: Job, head: Head, scores: Sequence[float], timings: Timings) -> dict[str, Any]:
    """The answer. scores: of the job's pairs."""
    return {
        "id": f"score-{head.id}",
        "object": "list",
        "created": head.created,
        "model": head.model,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
        "usage": batch_usage(timings),
        "timings": timings_json([timings]),
    }


def rerank_body(job: Job, head: Head, scores: Sequence[float], timings: Timings) -> dict[str, Any]:
    """The answer, best document first. scores: of the documents."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: job.extra["top"]]
    results = []
    for i in order:
        result: dict[str, Any] = {"index": i, "relevance_score": scores[i]}
        if job.extra["documents"]:
            result["document"] = {"text": job.prompts[1 + i]}
        results.append(result)
    return {
        "id": f"rerank-{head.id}",
        "model": head.model,
        "results": results,
        "usage": batch_usage(timings),
        "timings": timings_json([timings]),
    }


def _places(field: str, given: str | list[str]) -> list[str]:
    """The field that each text is in, as errors name it."""
    return [field] if isinstance(given, str) else [f"{field}[{i}]" for i in range(len(given))]


def _list(given: str | list[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given
