"""/v1/embeddings: body → Job, and vectors → the list of embeddings. Pure."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from millis.server.api.body import Body, Yes, read
from millis.server.api.completions import TextOrTokens, inputs
from millis.server.api.errors import unsupported
from millis.server.api.fields import Texts, schedule
from millis.server.api.job import Job, Limits
from millis.server.api.writer import Head, timings_json
from millis.types import Timings


class EmbeddingRequest(Texts):
    """The body of POST /v1/embeddings."""

    refused: ClassVar[Mapping[str, str]] = {
        "add_special_tokens": "a text is read with the special tokens that the model was trained with",
        "normalize": "vectors are always of unit length",
    }

    model: str
    input: TextOrTokens
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, description="the width of the model; no other can be had")] | None = None
    user: str | None = None
    # What follows is refused with any other value.
    add_special_tokens: Yes | None = None
    normalize: Yes | None = None


def parse_embedding(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(EmbeddingRequest, body)
    return Job(
        endpoint="embeddings",
        kind="embed",
        model=request.model,
        prompts=inputs(request.input, limits, "input", limits.inputs),
        extra={"base64": request.encoding_format == "base64", "dimensions": request.dimensions},
        **schedule(request),
    )


def embedding_body(job: Job, head: Head, vectors: NDArray[np.float32], timings: Timings) -> dict[str, Any]:
    """The answer. vectors: [prompts, dimensions] f32, unit length. ApiError 400: another width was asked for."""
    packed, width = job.extra["base64"], vectors.shape[1]
    if job.extra["dimensions"] not in (None, width):
        raise unsupported("dimensions", f"vectors of {head.model} have {width}; cut and normalise them yourself")
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
