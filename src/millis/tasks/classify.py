"""Zero-shot classification: every label scored as the model's answer, all of them in one forward.

The instruction with the list of labels begins every prompt, so that its keys and values are computed once and cached;
a text then costs its own tokens and those of the labels, which are one tree (engine/tree.py). A label's score is the
softmax over all labels of its log-probability.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from millis.engine.request import Request
from millis.tasks.calibration import CONTENT_FREE, Calibration, contextual, fit_temperature, softmax
from millis.tasks.language import Language, language
from millis.types import Classification, RequestError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

TEMPLATE = (
    "Classify the text below as one of: {labels}.\nAnswer with the label alone.\n\n{examples}Text: {text}\n\nLabel:"
)
_TEMPLATE_ZH = "请将下面的文本归入以下类别之一：{labels}。\n只回答类别。\n\n{examples}文本：{text}\n\n类别："
_EXAMPLE: dict[Language, str] = {"en": "Text: {text}\n\nLabel: {label}\n\n", "zh": "文本：{text}\n\n类别：{label}\n\n"}
_MULTI: dict[Language, str] = {
    "en": '{examples}Text: {text}\n\nDoes the label "{label}" fit this text? Answer yes or no.',
    "zh": "{examples}文本：{text}\n\n标签“{label}”适用于这段文本吗？请回答是或否。",
}
_YES_NO: dict[Language, tuple[str, str]] = {"en": ("Yes", "No"), "zh": ("是", "否")}
TOGETHER = 64  # texts submitted at once
Example = tuple[str, str]  # text, label


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
        self._lm = lm
        self.labels = _checked_labels(labels, 1 if multi else 2)
        self._multi, self._normalized = multi, length_normalized
        self._abstain = _share(abstain)
        self._language = language(" ".join(self.labels))
        self._shown = shown(self.labels)
        self._asked = self._question(examples, template)
        self._chat = lm.tokenizer.has_chat_template
        self._continuations = [] if multi else self._encoded(self._shown)
        if isinstance(calibration, str) and calibration != "contextual":
            raise RequestError(f"calibration must be 'contextual' or a Calibration, not {calibration!r}")
        if multi and calibration is not None:
            raise RequestError("multi and a calibration exclude each other; leave one of them out")
        self.calibration = self._contextual() if isinstance(calibration, str) else calibration

    def classify(self, texts: Sequence[str], deadline_ms: float | None = None) -> list[Classification]:
        """One answer a text. Texts share steps; the deadline is each one's, from the call."""
        begin = time.perf_counter()
        deadline_s = None if deadline_ms is None else begin + deadline_ms / 1000
        found: list[Classification] = []
        for at in range(0, len(texts), TOGETHER):
            requests: list[Request] = []
            try:
                for i, text in enumerate(texts[at : at + TOGETHER]):
                    requests.append(self._submit(text, begin if deadline_s is not None else None, deadline_s))
                    if at == i == 0:  # the instruction's keys are computed once, for all
                        self._lm.engine.wait(requests[0])
                for request in requests:
                    self._lm.engine.wait(request)
            finally:
                for request in requests:
                    self._lm.engine.cancel(request)
            found += [self._answer(request) for request in requests]
        return found

    def fit(self, samples: Sequence[Example]) -> Calibration:
        """Contextual calibration, then the temperature under which labelled texts are likeliest."""
        if self._multi:
            raise RequestError("a calibration is for labels that exclude each other; leave out multi")
        unknown = [label for _, label in samples if label not in self.labels]
        if unknown:
            raise RequestError(f"a labelled text has the label {unknown[0]!r}, which is none of the labels")
        bias = self._contextual()
        rows = [bias.apply(self.labels, self.log_probabilities(text)) for text, _ in samples]
        right = [self.labels.index(label) for _, label in samples]
        return Calibration(bias.bias, fit_temperature(rows, right))

    def log_probabilities(self, text: str) -> list[float]:
        """Of each label (nats), before any calibration."""
        request = self._submit(text, None, None)
        self._lm.engine.wait(request)
        return self._values(request)

    def _contextual(self) -> Calibration:
        return contextual(self.labels, [self.log_probabilities(text) for text in CONTENT_FREE])

    def _submit(self, text: str, arrival_s: float | None, deadline_s: float | None) -> Request:
        if not isinstance(text, str) or not text.strip():
            raise RequestError("a text to classify is empty; give at least one word")
        begin = time.perf_counter()
        if self._multi:
            prompt, continuations = self._yes_or_no(text)
        else:
            prompt, continuations = self._ids(text.join(self._asked)), self._continuations
        tokenize_ms = 1000 * (time.perf_counter() - begin)
        with self._lm.refusals():
            request = self._lm.engine.submit_score(
                prompt, continuations, arrival_s=arrival_s, deadline_s=deadline_s, cache=True
            )
        request.timings.tokenize_ms = tokenize_ms
        return request

    def _yes_or_no(self, text: str) -> tuple[list[int], list[list[int]]]:
        """The common beginning of all labels' questions, and what follows it: each question, with yes and with no."""
        prompts = [self._ids(text.join(p.replace("{label}", label) for p in self._asked)) for label in self._shown]
        head = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))))
        head = max(1, min(head, min(map(len, prompts)) - 1))
        answers = self._encoded(_YES_NO[self._language])
        return prompts[0][:head], [[*prompt[head:], *answer] for prompt in prompts for answer in answers]

    def _answer(self, request: Request) -> Classification:
        assert request.score is not None
        values, complete = self._values(request), request.finish_reason == "stop"
        if self._multi:
            scores = [_sigmoid(yes - no) for yes, no in zip(values[::2], values[1::2], strict=True)]
        elif self.calibration is None or request.score.depth is not None:  # first tokens have other biases
            scores = softmax(values)
        else:
            scores = softmax(self.calibration.apply(self.labels, values))
        ranked = dict(sorted(zip(self.labels, scores, strict=True), key=lambda pair: -pair[1]))
        best, score = next(iter(ranked.items()))
        least = 0.5 if self._multi and self._abstain is None else self._abstain
        told = complete or (bool(request.score.values) and not self._multi)  # a question cut short asks nothing
        return Classification(
            label=best if told and (least is None or score >= least) else None,
            scores=ranked,
            timings=request.timings,
            labels=tuple(name for name, one in ranked.items() if one >= (least or 0.0)) if self._multi and told else (),
            complete=complete,
        )

    def _values(self, request: Request) -> list[float]:
        assert request.score is not None
        values = request.score.values
        values = [*values, *[-math.inf] * (len(request.score.continuations) - len(values))]
        if not self._normalized or self._multi:
            return values
        depth = request.score.depth or math.inf
        return [v / min(depth, len(ids)) for v, ids in zip(values, self._continuations, strict=True)]

    def _question(self, examples: Sequence[Example], template: str | None) -> list[str]:
        """What stands around the text, with all but the label of multi=True in it."""
        own = {"en": TEMPLATE, "zh": _TEMPLATE_ZH}[self._language]
        asked = template or (_MULTI[self._language] if self._multi else own)
        for name in ("{text}", *(["{label}"] if self._multi else [])):
            if name not in asked:
                raise RequestError(f"the template must hold {name}")
        seen = ""
        for text, label in examples:
            if label not in self.labels and not self._multi:
                raise RequestError(f"an example has the label {label!r}, which is none of the labels")
            name = dict(zip(self.labels, self._shown, strict=True)).get(label, label)
            seen += _EXAMPLE[self._language].replace("{text}", text).replace("{label}", name)
        if seen and "{examples}" not in asked:
            raise RequestError("the template must hold {examples} where examples are given")
        names = ("、" if self._language == "zh" else ", ").join(self._shown)
        return [part.replace("{labels}", names).replace("{examples}", seen) for part in asked.split("{text}")]

    def _ids(self, text: str) -> list[int]:
        tokenizer = self._lm.tokenizer
        return tokenizer.encode_chat([{"role": "user", "content": text}]) if self._chat else tokenizer.encode(text)

    def _encoded(self, answers: Sequence[str]) -> list[list[int]]:
        """What the model would write; behind plain text a word begins with a space."""
        space = "" if self._chat or self._language == "zh" else " "
        return [self._lm.tokenizer.encode(space + answer, add_special=False) for answer in answers]


def shown(labels: Sequence[str]) -> list[str]:
    """Labels as the model sees them: identifiers such as card_arrival are words to it, unless two became the same."""
    words = [" ".join(label.replace("_", " ").split()) for label in labels]
    return words if len(set(words)) == len(labels) and all(words) else list(labels)


def _checked_labels(labels: Sequence[str], least: int) -> list[str]:
    if isinstance(labels, str) or any(not isinstance(label, str) or not label.strip() for label in labels):
        raise RequestError("labels must be a list of non-empty texts")
    if len(labels) < least:
        raise RequestError(f"at least {least} labels are needed, not {len(labels)}")
    if len(set(labels)) < len(labels):
        raise RequestError("a label is given twice")
    return list(labels)


def _share(value: float | None) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise RequestError(f"abstain must lie in [0, 1], not {value!r}")
    return value


def _sigmoid(x: float) -> float:
    if math.isnan(x):  # neither answer was scored
        return 0.5
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
