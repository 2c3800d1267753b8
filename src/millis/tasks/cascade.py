"""A cascade: a small model answers at once, a larger one replaces the answer where that is sure to be in time.

Two rules, as FrugalGPT has them (Chen et al., 2023), with a clock: an answer that the small model is confident of
stays; otherwise the larger model is asked if its predicted steps fit what is left of the deadline, and its answer is
taken if it became whole. The models run one after the other: on the cores of one machine neither would be faster beside
the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from millis.tasks import checks
from millis.types import (
    Classification,
    Completion,
    DeadlineError,
    MillisError,
    RequestError,
    Timings,
    TokenLogprob,
    number,
)

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Message, Prompt

CONFIDENCE = 0.9  # of an answer that needs no larger model, unless a caller says otherwise
LONGER = 1.25  # times the small model's answer: so long the large one's is thought to be
SPARE = 8  # tokens beside
Answer = TypeVar("Answer", Classification, Completion)


@dataclass(slots=True, kw_only=True)
class CascadeTimings(Timings):
    """Timings of the answer that was taken; total_ms is that of the whole cascade."""

    model: str = ""  # whose answer it is
    model_ms: tuple[tuple[str, float], ...] = ()  # each model that was asked, and what it took
    why: str = ""  # confident | no time | not whole | replaced; of `answers`: first | replaced; of servers: failed
    confidence: float | None = None  # of the first model


def cascade_timings(timings: Timings, total_ms: float, deadline_ms: float | None, **more: Any) -> CascadeTimings:
    """The timings of an answer that was taken as those of the whole cascade; more: the fields of CascadeTimings."""
    given = {field.name: getattr(timings, field.name) for field in fields(Timings)}
    given |= {"total_ms": total_ms, "deadline_ms": deadline_ms}
    given |= {"slack_ms": None if deadline_ms is None else deadline_ms - total_ms}
    return CascadeTimings(**given, **more)


class Cascade:
    """Models, the smallest first. `confidence`: from which probability on an answer needs no larger model.

    Of a classification that is the best score; of a text, the geometric mean of its tokens' probabilities.
    """

    def __init__(self, models: Sequence[LanguageModel], confidence: float = CONFIDENCE) -> None:
        self.models = checks.sequence(models, "models")
        if len(self.models) < 2:
            raise RequestError("a cascade needs at least two models, the smallest first")
        self.confidence = number("confidence", confidence, 0, 1)

    @overload
    def classify(
        self, texts: str, labels: Sequence[str], *, deadline_ms: float | None = None, **options: Any
    ) -> Classification: ...
    @overload
    def classify(
        self, texts: Sequence[str], labels: Sequence[str], *, deadline_ms: float | None = None, **options: Any
    ) -> list[Classification]: ...
    def classify(
        self, texts: str | Sequence[str], labels: Sequence[str], *, deadline_ms: float | None = None, **options: Any
    ) -> Classification | list[Classification]:
        """As LanguageModel.classify; the deadline is each text's, one text after the other."""
        given, single = checks.texts(texts)
        if not single:
            return [self.classify(text, labels, deadline_ms=deadline_ms, **options) for text in given]

        def answer(lm: LanguageModel, left_ms: float | None) -> Classification:
            found: Classification = lm.classify(given[0], labels, deadline_ms=left_ms, **options)
            return found

        deadline_ms = self._prepared(deadline_ms)
        if deadline_ms is not None:
            for lm in self.models:
                lm.classifier(labels, **options).prepare()
        *_, found = self._answers(
            answer,
            deadline_ms,
            time.perf_counter(),
            confident=lambda one: max(one.scores.values()),
            whole=lambda one: one.complete,
            fits=lambda lm, one, left_ms: True,  # whether it is in time is seen when it is asked: nothing is lost
        )
        return found

    def generate(self, prompt: Prompt, *, deadline_ms: float | None = None, **sampling: Any) -> Completion:
        """As LanguageModel.generate."""
        return self._text(lambda lm, left, more: lm.generate(prompt, deadline_ms=left, **more), deadline_ms, sampling)

    def chat(self, messages: Sequence[Message], *, deadline_ms: float | None = None, **sampling: Any) -> Completion:
        """As LanguageModel.chat."""
        return self._text(lambda lm, left, more: lm.chat(messages, deadline_ms=left, **more), deadline_ms, sampling)

    def answers(
        self, prompt: Prompt | Sequence[Message], *, deadline_ms: float | None = None, **sampling: Any
    ) -> Iterator[Completion]:
        """The small model's answer as soon as it is there, then each that replaces it, as `generate` decides.

        prompt: a text or token ids to go on with, or messages, which are answered. `timings.why` is "first", then
        "replaced"; `deadline_ms` counts from the call, what is done between two answers included. DeadlineError: not
        even the small model would be in time.

        >>> for out in models.answers([{"role": "user", "content": "Why is the sky blue?"}], deadline_ms=3000):
        ...     print(out.text)
        """
        deadline_ms = self._prepared(deadline_ms)
        talk = (
            isinstance(prompt, Sequence) and not isinstance(prompt, str) and isinstance([*prompt[:1], None][0], Mapping)
        )

        def ask(lm: LanguageModel, left_ms: float | None, more: dict[str, Any]) -> Completion:
            write: Callable[..., Completion] = lm.chat if talk else lm.generate
            return write(prompt, deadline_ms=left_ms, **more)

        found = self._texts(ask, deadline_ms, sampling, time.perf_counter())
        return (out for out in found if getattr(out.timings, "why", "") in ("first", "replaced"))

    def _text(self, ask: Callable[..., Completion], deadline_ms: float | None, sampling: dict[str, Any]) -> Completion:
        deadline_ms = self._prepared(deadline_ms)
        *_, found = self._texts(ask, deadline_ms, sampling, time.perf_counter())
        return found

    def _texts(
        self, ask: Callable[..., Completion], deadline_ms: float | None, sampling: dict[str, Any], begin: float
    ) -> Iterator[Completion]:
        wished = sampling.get("logprobs")
        last = self.models[-1]

        def answer(lm: LanguageModel, left_ms: float | None) -> Completion:
            more = {**sampling, "logprobs": 0 if wished is None and lm is not last else wished}
            return ask(lm, left_ms, more)

        found = self._answers(
            answer,
            deadline_ms,
            begin,
            confident=lambda one: certainty(one.logprobs),
            whole=lambda one: one.finish_reason in ("stop", "length"),
            fits=_fits,
        )
        yield from (one if wished is not None else replace(one, logprobs=None) for one in found)

    def _prepared(self, deadline_ms: float | None) -> float | None:
        """The deadline, for which all models have measured what steps take."""
        deadline_ms = checks.deadline(deadline_ms)
        if deadline_ms is not None:
            for lm in self.models:
                lm.prepare_deadlines(deadline_ms)
        return deadline_ms

    def _answers(
        self,
        ask: Callable[[LanguageModel, float | None], Answer],
        deadline_ms: float | None,
        begin: float,
        *,
        confident: Callable[[Answer], float],
        whole: Callable[[Answer], bool],
        fits: Callable[[LanguageModel, Answer, float], bool],
    ) -> Iterator[Answer]:
        """The first answer and each that replaces it; in the end the one that stays once more, if for a reason."""

        def left() -> float | None:
            return None if deadline_ms is None else deadline_ms - 1000 * (time.perf_counter() - begin)

        left_ms = left()  # who iterates may have waited
        taken = ask(self.models[0], None if left_ms is None else max(left_ms, 1e-6))
        name, why = self.models[0].path.stem, "first"
        certainty = first = confident(taken)
        spent = [(name, taken.timings.total_ms)]

        def timed() -> Answer:
            total_ms = 1000 * (time.perf_counter() - begin)
            more = {"model": name, "model_ms": tuple(spent), "why": why, "confidence": first}
            return replace(taken, timings=cascade_timings(taken.timings, total_ms, deadline_ms, **more))

        yield timed()
        for lm in self.models[1:]:
            left_ms = left()
            if certainty >= self.confidence:
                why = "confident"
                break
            if left_ms is not None and (left_ms <= 0 or not fits(lm, taken, left_ms)):
                why = "no time"
                break
            try:
                other = ask(lm, left_ms)
            except DeadlineError:
                why = "no time"
                break
            spent.append((lm.path.stem, other.timings.total_ms))
            if not whole(other):
                why = "not whole"
                break
            taken, name, why = other, lm.path.stem, "replaced"
            certainty = confident(other)
            yield timed()
        if why != "replaced":
            yield timed()


def certainty(logprobs: Sequence[TokenLogprob] | None) -> float:
    """Of a text: the geometric mean of its tokens' probabilities; 0 without any."""
    known = [one.logprob for one in logprobs or ()]
    return math.exp(sum(known) / len(known)) if known else 0.0


def expected_tokens(tokens: int) -> int:
    """How long a larger model's answer is thought to be, where the one before it has so many tokens."""
    return int(LONGER * tokens) + SPARE


def _fits(lm: LanguageModel, small: Completion, left_ms: float) -> bool:
    """Whether an answer somewhat longer than the small model's is predicted to be in time."""
    costs, tokens = lm.engine.costs, expected_tokens(len(small.tokens))
    prompt = small.timings.prompt_tokens
    ms = costs.prefill_ms(prompt, lm.runner.max_tokens) + tokens * costs.decode_ms(1, prompt + tokens)
    return ms + costs.margin_ms <= left_ms


def cascade(names: Sequence[str | Path], *, confidence: float = CONFIDENCE, **options: Any) -> Cascade:
    """Loads models for a cascade, the smallest first; options are those of `load`.

    >>> models = millis.cascade(["smollm2", "qwen2.5-0.5b"])
    >>> models.classify("I want my money back", labels=["refund", "praise"], deadline_ms=200)
    """
    from millis.tasks.load import load
    from millis.tasks.model import LanguageModel

    if isinstance(names, (str, Path)):
        raise RequestError("a cascade takes a list of models, the smallest first")
    confidence = number("confidence", confidence, 0, 1)
    names = checks.sequence(names, "models")
    made: list[LanguageModel] = []
    try:
        for name in names:
            lm = load(name, **options)
            if not isinstance(lm, LanguageModel):
                raise RequestError("this model writes no text, so it cannot be one of a cascade")
            made.append(lm)
    except MillisError as error:
        error.args = (f"{names[len(made)]}: {error}",)
        raise
    return Cascade(made, confidence)
