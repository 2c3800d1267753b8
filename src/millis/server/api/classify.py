"""/v1/classify: body → Job, and scores → the list of labels. Pure.

A label's score is the softmax over all labels of its log-probability as the model's answer to
`template`, in which {labels} and {text} stand for what they say; a model that was trained to
classify knows its labels, and says of them what its head does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from millis.server.api.body import Body, read
from millis.server.api.conversation import check_length
from millis.server.api.embeddings import batch_usage
from millis.server.api.errors import invalid
from millis.server.api.fields import Texts, schedule
from millis.server.api.job import Instruction, Job, Limits
from millis.server.api.writer import Head, timings_json
from millis.tasks.calibration import softmax
from millis.types import Timings

TEMPLATE = "Classify the text below as one of: {labels}.\nAnswer with the label alone.\n\nText: {text}\n\nLabel:"
_MAX_TEMPLATE, _MAX_LABEL = 4096, 256  # characters


class ClassifyRequest(Texts):
    """The body of POST /v1/classify."""

    refused: ClassVar[dict[str, str]] = {
        "activation": "scores always sum to 1",
        "use_activation": "scores always sum to 1",
    }

    model: str
    input: str | list[str]
    labels: list[Annotated[str, Field(min_length=1, max_length=_MAX_LABEL)]] | None = Field(
        None, min_length=2, description="needed unless the model was trained for its own; then only these of them"
    )
    template: Annotated[str, Field(max_length=_MAX_TEMPLATE)] | None = Field(
        None, description="the question put to the model, with {text} and, if wanted, {labels} in it"
    )
    user: str | None = None


def parse_classify(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(ClassifyRequest, body)
    texts = [request.input] if isinstance(request.input, str) else request.input
    check_batch(texts, limits, "input")
    labels = request.labels or []
    if len(labels) > limits.labels:
        raise invalid(f"labels has {len(labels)} entries; {limits.labels} can be used", "labels")
    if len(set(labels)) < len(labels):
        raise invalid("labels has one label twice", "labels")
    template = request.template or TEMPLATE
    if "{text}" not in template:
        raise invalid("template must hold {text}, where the text to classify is put", "template")
    asked = template.replace("{labels}", ", ".join(labels)).split("{text}")
    check_length(len(texts) * sum(map(len, asked)) + len(asked) * sum(map(len, texts)), limits, "input")
    return Job(
        endpoint="classify",
        kind="score",
        model=request.model,
        prompts=tuple(Instruction(text.join(asked)) for text in texts),
        continuations=tuple(labels),
        extra={"texts": tuple(texts), "template": request.template is not None},
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
    return labels_body(job, head, [softmax(row) for row in values], timings)


def labels_body(
    job: Job, head: Head, rows: Sequence[Sequence[float]], timings: Timings, shortened: Sequence[bool] = ()
) -> dict[str, Any]:
    """The answer. rows: for each prompt, the score of each label. shortened: whether a prompt's end was not read."""
    data: list[dict[str, Any]] = []
    for i, scores in enumerate(rows):
        best = max(range(len(scores)), key=scores.__getitem__)
        data.append(
            {
                "index": i,
                "label": job.continuations[best],
                "probs": list(scores),
                "num_classes": len(scores),
                "scores": dict(zip(job.continuations, scores, strict=True)),
            }
        )
        if shortened and shortened[i]:
            data[-1]["truncated"] = True
    return {
        "id": f"classify-{head.id}",
        "object": "list",
        "created": head.created,
        "model": head.model,
        "data": data,
        "usage": {**batch_usage(timings), "completion_tokens": 0},
        "timings": timings_json([timings]),
    }
