"""Zero-shot classification: every label scored as the model's answer, all of them in one forward.

A label's score is the softmax over all labels of its log-probability.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from millis.engine.request import Request
from millis.tasks import checks
from millis.tasks.calibration import CONTENT_FREE, Calibration, contextual, fit_temperature
from millis.tasks.labels import Example, Question, check_labelled, chosen, exclusive
from millis.types import Classification, RequestError, brief, number

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

TOGETHER = 64  # texts submitted at once


class Classifier:
    """A model, labels and how to ask: what stays the same from text to text, encoded once.

    Raises RequestError for labels, examples or a template that cannot be used.
    """

    def __init__(
        self,
        lm: LanguageModel,
        labels: Sequence[str],
        *,
        examples: Sequence[Example] = (),
        template: str | None = None,
        multi: bool = False,
        abstain: float | None = None,
        length_normalized: bool = False,
        calibration: Calibration | str | None = None,
    ) -> None:
        self._engine, self._tokenizer = lm.engine, lm.tokenizer  # not the model, which keeps its classifiers: a cycle
        self._question = Question(labels, examples, template, multi)
        self.labels = self._question.labels
        self._multi, self._normalized = multi, length_normalized
        self._abstain = None if abstain is None else number("abstain", abstain, 0, 1)
        self._continuations = [] if multi else self._question.answers(lm.tokenizer)
        if not isinstance(calibration, Calibration | None) and calibration != "contextual":
            raise RequestError(f"calibration must be 'contextual' or a Calibration, not {brief(calibration)}")
        if multi and calibration is not None:
            raise RequestError("multi and a calibration exclude each other; leave one of them out")
        self._asked = False
        self.calibration = self._contextual() if isinstance(calibration, str) else calibration

    def prepare(self) -> None:
        """Computes the question, unless that was done: no deadline that its texts can keep has room for it, too."""
        if not self._asked:
            self.log_probabilities(CONTENT_FREE[-1])

    def classify(self, texts: Sequence[str], deadline_ms: float | None = None) -> list[Classification]:
        """One answer a text. Texts share steps; the deadline is each one's, from the call."""
        begin = self._engine.clock()
        deadline_s = None if deadline_ms is None else begin + deadline_ms / 1000
        found: list[Classification] = []
        for at in range(0, len(texts), TOGETHER):
            requests: list[Request] = []
            try:
                for i, text in enumerate(texts[at : at + TOGETHER]):
                    requests.append(self._submit(text, begin if deadline_s is not None else None, deadline_s))
                    if at == i == 0:  # the instruction's keys are computed once, for all
                        self._engine.wait(requests[0])
                for request in requests:
                    self._engine.wait(request)
            finally:
                for request in requests:
                    self._engine.cancel(request)
            found += [self._answer(request) for request in requests]
        return found

    def fit(self, samples: Sequence[Example]) -> Calibration:
        """Contextual calibration, then the temperature under which labelled texts are likeliest."""
        if self._multi:
            raise RequestError("a calibration is for labels that exclude each other; leave out multi")
        samples = checks.pairs(samples, "samples")
        check_labelled(samples, self.labels)
        bias = self._contextual()
        rows = [bias.apply(self.labels, self.log_probabilities(text)) for text, _ in samples]
        right = [self.labels.index(label) for _, label in samples]
        return Calibration(bias.bias, fit_temperature(rows, right))

    def log_probabilities(self, text: str) -> list[float]:
        """Of each label (nats), before any calibration."""
        request = self._submit(text, None, None)
        self._engine.wait(request)
        self._asked = True
        return self._values(request)

    def _contextual(self) -> Calibration:
        return contextual(self.labels, [self.log_probabilities(text) for text in CONTENT_FREE])

    def _submit(self, text: str, arrival_s: float | None, deadline_s: float | None) -> Request:
        checks.text(text, "a text to classify")
        begin = time.perf_counter()
        if self._multi:
            prompt, continuations = self._question.yes_or_no(text, self._tokenizer)
        else:
            prompt, continuations = self._question.prompt(text, self._tokenizer), self._continuations
        tokenize_ms = 1000 * (time.perf_counter() - begin)
        with self._engine.refusals():
            request = self._engine.submit_score(
                prompt, continuations, arrival_s=arrival_s, deadline_s=deadline_s, cache=True
            )
        request.timings.tokenize_ms = tokenize_ms
        return request

    def _answer(self, request: Request) -> Classification:
        assert request.score is not None
        values, complete = self._values(request), request.finish_reason == "stop"
        if self.calibration is not None and request.score.depth is None:  # first tokens have other biases
            values = self.calibration.apply(self.labels, values)
        scores = self._question.scores(values)
        ranked = dict(sorted(zip(self.labels, scores, strict=True), key=lambda pair: -pair[1]))
        label, labels = None, list[str]()
        if request.score.values:
            label, labels = chosen(ranked, self._multi, self._abstain, complete)
        return Classification(
            label=label,
            scores=ranked,
            timings=request.timings,
            labels=tuple(labels) if self._multi else (),
            complete=complete,
        )

    def _values(self, request: Request) -> list[float]:
        assert request.score is not None
        values = request.score.values
        values = [*values, *[-math.inf] * (len(request.score.continuations) - len(values))]
        if self._multi:
            return values
        if request.finish_reason == "stop":  # else some were not scored whole
            values = exclusive(values, self._continuations)
        if not self._normalized:
            return values
        depth = request.score.depth or math.inf
        return [v / min(depth, len(ids)) for v, ids in zip(values, self._continuations, strict=True)]
