"""/v1/classify: body → Job, and scores → the list of labels. Pure.

The model is asked as `LanguageModel.classify` asks it (tasks/labels.py): a label's score is the softmax over all labels
of its log-probability as the answer, or with multi_label how much likelier yes is than no. A model that was trained to
classify knows its labels, and says of them what its head does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from millis.server.api.body import Body, Wire, Yes, read
from millis.server.api.conversation import check_filled, check_length
from millis.server.api.embeddings import batch_usage
from millis.server.api.errors import invalid
from millis.server.api.fields import Texts, schedule
from millis.server.api.job import Instruction, Job, Limits
from millis.server.api.writer import Head, timings_json
from millis.tasks.labels import Question, chosen
from millis.types import RequestError, Timings

_MAX_TEMPLATE, _MAX_LABEL = 4096, 256  # characters
_Label = Annotated[str, Field(min_length=1, max_length=_MAX_LABEL)]


class Example(Wire):
    text: Annotated[str, Field(min_length=1)]
    label: _Label


class ClassifyRequest(Texts):
    """The body of POST /v1/classify."""

    refused: ClassVar[dict[str, str]] = {
        "activation": "scores are always probabilities",
        "use_activation": "scores are always probabilities",
    }

    model: str
    input: str | list[str]
    labels: list[_Label] | None = Field(
        None, min_length=1, description="needed unless the model was trained for its own; then only these of them"
    )
    template: Annotated[str, Field(max_length=_MAX_TEMPLATE)] | None = Field(
        None, description="the question put to the model, with {text} and, if wanted, {labels} and {examples} in it"
    )
    examples: list[Example] | None = Field(None, description="labelled texts that the model is shown")
    multi_label: bool | None = Field(None, description="each label by itself fits or not; a template holds {label}")
    abstain: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="no label below this score")
    user: str | None = None
    # What follows is refused with any other value.
    activation: Yes | None = None
    use_activation: Yes | None = None


def parse_classify(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(ClassifyRequest, body)
    texts = [request.input] if isinstance(request.input, str) else request.input
    check_batch(texts, limits, "input")
    labels = request.labels or []
    if len(labels) > limits.labels:
        raise invalid(f"labels has {len(labels)} entries; {limits.labels} can be used", "labels")
    question = _question(request, labels) if labels else None
    prompts = list(texts) if question is None else [question.text(text) for text in texts]
    times = len(labels) if request.multi_label else 1
    check_length(times * sum(map(len, prompts)), limits, "input")
    asks = [name for name in ("template", "examples", "multi_label") if getattr(request, name)]
    return Job(
        endpoint="classify",
        kind="score",
        model=request.model,
        prompts=tuple(Instruction(prompt) for prompt in prompts),
        continuations=tuple(labels),
        extra={"texts": tuple(texts), "question": question, "asks": asks, "abstain": request.abstain},
        **schedule(request),
    )


def _question(request: ClassifyRequest, labels: Sequence[str]) -> Question:
    """ApiError names the field without which it could be asked."""
    examples = [(one.text, one.label) for one in request.examples or []]
    given: dict[str, Any] = {"multi": request.multi_label or False}
    for param, value in (("labels", labels), ("examples", examples), ("template", request.template)):
        given[param] = value
        try:
            question = Question(**given)
        except RequestError as error:
            raise invalid(str(error), param) from None
    return question


def check_batch(texts: Sequence[str], limits: Limits, param: str) -> None:
    """ApiError where a list of texts is empty, holds an empty one, or is too long."""
    check_filled(texts, param)
    if len(texts) > limits.inputs:
        raise invalid(f"{param} has {len(texts)} entries; {limits.inputs} can be used", param)
    check_length(sum(map(len, texts)), limits, param)


def labels_body(
    job: Job,
    head: Head,
    rows: Sequence[Sequence[float]],
    timings: Timings,
    several: bool,
    cut: Sequence[Mapping[str, bool]],
) -> dict[str, Any]:
    """The answer. rows: for each prompt, the score of each label. several: a text may have more than one, or none.
    cut: for each prompt, what of it was not read or scored."""
    data: list[dict[str, Any]] = []
    for i, scores in enumerate(rows):
        named = dict(zip(job.continuations, scores, strict=True))
        label, labels = chosen(named, several, job.extra["abstain"], cut[i].get("complete", True))
        data.append(
            {
                "index": i,
                "label": label,
                "probs": list(scores),
                "num_classes": len(scores),
                "scores": named,
                **cut[i],
            }
        )
        if several:
            data[-1]["labels"] = labels
    return {
        "id": f"classify-{head.id}",
        "object": "list",
        "created": head.created,
        "model": head.model,
        "data": data,
        "usage": {**batch_usage(timings), "completion_tokens": 0},
        "timings": timings_json([timings]),
    }
