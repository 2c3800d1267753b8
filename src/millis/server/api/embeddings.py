"""/v1/embeddings: body → Job, and vectors → the list of embeddings. Pure."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from millis.server.api.body import Body, read
from millis.server.api.completions import TextOrTokens, inputs
from millis.server.api.fields import Texts, schedule
from millis.server.api.job import Job, Limits
from millis.server.api.writer import Head, timings_json
from millis.types import Timings


class EmbeddingRequest(Texts):
    """The body of POST /v1/embeddings."""

    refused: ClassVar[Mapping[str, str]] = {
        "dimensions": "vectors have the width of the model; cut and normalise them yourself",
    }

    model: str
    input: TextOrTokens
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


def parse_embedding(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(EmbeddingRequest, body)
    return Job(
        endpoint="embeddings",
        kind="embed",
        model=request.model,
        prompts=inputs(request.input, limits, "input", limits.inputs),
        extra={"base64": request.encoding_format == "base64"},
        **schedule(request),
    )


def embedding_body(job: Job, head: Head, vectors: NDArray[np.float32], timings: Timings) -> dict[str, Any]:
    """The answer. vectors: [prompts, dimensions] f32, unit length."""
    packed = job.extra["base64"]
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(row) if packed else row.tolist()}
        for i, row in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": head.model,
        "usage": batch_usage(timings),
        "timings": timings_json([timings]),
    }


def batch_usage(timings: Timings) -> dict[str, int]:
    """Usage where nothing is generated."""
    return {"prompt_tokens": timings.prompt_tokens, "total_tokens": timings.prompt_tokens}


def _base64(row: NDArray[np.float32]) -> str:
    """float32, little-endian: what OpenAI's clients decode."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
