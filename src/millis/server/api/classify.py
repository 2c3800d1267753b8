"""/v1/classify: body → Job, and the labels' log-probabilities → scores that sum to 1. Pure.

A label's score is the softmax over all labels of its log-probability as the model's answer to
`template`, in which {labels} and {text} stand for what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from millis.server.api.body import Body, read
from millis.server.api.conversation import check_length
from millis.server.api.embeddings import batch_usage
from millis.server.api.errors import invalid
from millis.server.api.fields import Scheduling, schedule
from millis.server.api.job import Instruction, Job, Limits
from millis.server.api.writer import Head, timings_json
from millis.tasks.calibration import softmax
from millis.types import Timings

TEMPLATE = "Classify the text below as one of: {labels}.\nAnswer with the label alone.\n\nText: {text}\n\nLabel:"
_MAX_TEMPLATE, _MAX_LABEL = 4096, 256  # characters


class ClassifyRequest(Scheduling):
    """The body of POST /v1/classify."""

    refused: ClassVar[dict[str, str]] = {
        "activation": "scores always sum to 1",
        "use_activation": "scores always sum to 1",
        "truncate_prompt_tokens": "inputs are read whole; shorten them",
    }

    model: str
    input: str | list[str]
    labels: list[Annotated[str, Field(min_length=1, max_length=_MAX_LABEL)]] = Field(min_length=2)
    template: Annotated[str, Field(max_length=_MAX_TEMPLATE)] | None = Field(
        None, description="the question put to the model, with {text} and, if wanted, {labels} in it"
    )
    user: str | None = None


def parse_classify(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(ClassifyRequest, body)
    texts = [request.input] if isinstance(request.input, str) else request.input
    check_batch(texts, limits, "input")
    if len(request.labels) > limits.labels:
        raise invalid(f"labels has {len(request.labels)} entries; {limits.labels} can be used", "labels")
    if len(set(request.labels)) < len(request.labels):
        raise invalid("labels has one label twice", "labels")
    template = request.template or TEMPLATE
    if "{text}" not in template:
        raise invalid("template must hold {text}, where the text to classify is put", "template")
    asked = template.replace("{labels}", ", ".join(request.labels)).split("{text}")
    check_length(len(texts) * sum(map(len, asked)) + len(asked) * sum(map(len, texts)), limits, "input")
    return Job(
        endpoint="classify",
        kind="score",
        model=request.model,
        prompts=tuple(Instruction(text.join(asked)) for text in texts),
        continuations=tuple(request.labels),
        **schedule(request),
    )


def check_batch(texts: Sequence[str], limits: Limits, param: str) -> None:
    """ApiError where a list of texts is empty, holds an empty one, or is too long."""
    if not texts or "" in texts:
        raise invalid(f"{param} is empty", param)
    if len(texts) > limits.inputs:
        raise invalid(f"{param} has {len(texts)} entries; {limits.inputs} can be used", param)
    check_length(sum(map(len, texts)), limits, param)


def classify_body(job: Job, head: Head, values: Sequence[Sequence[float]], timings: Timings) -> dict[str, Any]:
    """The answer. values: for each prompt, the summed log-probability (nats) of each label."""
    data = []
    for i, row in enumerate(values):
        scores = softmax(row)
        best = max(range(len(scores)), key=scores.__getitem__)
        data.append(
            {
                "index": i,
                "label": job.continuations[best],
                "probs": scores,
                "num_classes": len(scores),
                "scores": dict(zip(job.continuations, scores, strict=True)),
            }
        )
    return {
        "id": f"classify-{head.id}",
        "object": "list",
        "created": head.created,
        "model": head.model,
        "data": data,
        "usage": {**batch_usage(timings), "completion_tokens": 0},
        "timings": timings_json([timings]),
    }
