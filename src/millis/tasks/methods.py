"""The tasks as methods of LanguageModel, for a text or a list: classify, extract, translate, summarize, moderate."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from millis.tasks.calibration import Calibration
from millis.tasks.classify import Classifier
from millis.tasks.extract import extract
from millis.tasks.labels import Example
from millis.tasks.moderate import moderate, moderator
from millis.tasks.summarize import summarize
from millis.tasks.translate import translate

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

T = TypeVar("T")
KEPT = 16  # classifiers whose labels stay encoded


class TaskMethods:
    """With `deadline_ms`, counted from the call, an answer is there by then: shorter, closed or of first tokens only if
    need be, and DeadlineError where not even that can be. The texts of a list share steps; the deadline is each one's.
    """

    _classifiers: dict[Hashable, Any]

    def classify(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str],
        *,
        deadline_ms: float | None = None,
        examples: Sequence[Example] = (),
        calibration: Calibration | str | None = None,
        multi: bool = False,
        abstain: float | None = None,
        length_normalized: bool = False,
        template: str | None = None,
    ) -> Any:
        """Which of `labels` a text is, with scores that sum to 1: a Classification, or a list of them.

        examples: (text, label) pairs shown to the model. calibration: "contextual" takes from each label what the model
        gives it behind texts that say nothing (Zhao et al., 2021); `calibrate` gives one with a temperature, too.
        multi: each label by itself fits or does not. abstain: no label where the best score is lower.
        length_normalized: a label's score is the mean over its tokens, not their sum. template: the question, with
        {text} and, if wanted, {labels} and {examples} in it.

        The question up to the text is computed once and cached; then one forward computes a text and all labels.
        """
        named = labels if isinstance(labels, str) else tuple(labels)  # a text is no list of labels, and refused
        key = (named, tuple(map(tuple, examples)), multi, abstain, length_normalized, template)
        made = self._classifier(
            (*key, calibration if isinstance(calibration, str) else repr(calibration)),
            lambda: Classifier(
                cast("LanguageModel", self),
                labels,
                examples=examples,
                calibration=calibration,
                multi=multi,
                abstain=abstain,
                length_normalized=length_normalized,
                template=template,
            ),
        )
        if deadline_ms is not None:
            cast("LanguageModel", self).prepare_deadlines(deadline_ms)
        found = made.classify([texts] if isinstance(texts, str) else texts, deadline_ms)
        return found[0] if isinstance(texts, str) else found

    def calibrate(self, samples: Sequence[Example], labels: Sequence[str], **options: Any) -> Calibration:
        """A calibration for `classify` with these labels, from (text, label) pairs: contextual, with a temperature.

        options: examples, length_normalized and template, as `classify` will have them.
        """
        return Classifier(cast("LanguageModel", self), labels, **options).fit(samples)

    def extract(
        self,
        texts: str | Sequence[str],
        schema: Any,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 512,
        instruction: str | None = None,
    ) -> Any:
        """What a text says as JSON of `schema`, a JSON schema or a pydantic model: an Extraction, or a list of them.

        instruction: the question, with {text} and, if wanted, {schema} in it. GrammarError: the schema is too much.
        """
        return extract(
            cast("LanguageModel", self),
            texts,
            schema,
            deadline_ms=deadline_ms,
            max_tokens=max_tokens,
            instruction=instruction,
        )

    def translate(
        self,
        texts: str | Sequence[str],
        to: str,
        *,
        source: str | None = None,
        glossary: Mapping[str, str] | None = None,
        deadline_ms: float | None = None,
        max_tokens: int | None = None,
    ) -> Any:
        """A text in `to`, "zh" or "en": a Translation, or a list of them. Unless `source` says it, the characters of a
        text tell its language; what is in the target language already stays as it is.

        glossary: term → translation. Terms that occur are part of the instruction; a translation that lacks one is
        asked for once more where there is no deadline, and `missing` names what is lacking in the end.
        """
        return translate(
            cast("LanguageModel", self),
            texts,
            to,
            source=source,
            glossary=glossary,
            deadline_ms=deadline_ms,
            max_tokens=max_tokens,
        )

    def summarize(
        self,
        texts: str | Sequence[str],
        *,
        words: int | None = None,
        sentences: int | None = None,
        characters: int | None = None,
        deadline_ms: float | None = None,
    ) -> Any:
        """A summary of at most so many words, sentences (3 unless said) or characters: a Summary, or a list of them.

        It ends with a sentence where one fits. A text that is longer than the context is cut into parts: each is
        summarized, then the summaries are; with a deadline as many parts, evenly spread, as there is time for.
        """
        return summarize(
            cast("LanguageModel", self),
            texts,
            words=words,
            sentences=sentences,
            characters=characters,
            deadline_ms=deadline_ms,
        )

    def moderate(
        self,
        texts: str | Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        threshold: float = 0.5,
        deadline_ms: float | None = None,
    ) -> Any:
        """Whether a text is safe, and which categories of harm it shows: a Moderation, or a list of them."""
        lm = cast("LanguageModel", self)
        key = ("moderate", None if categories is None else tuple(categories))
        judge = self._classifier(key, lambda: moderator(lm, categories))
        if deadline_ms is not None:
            lm.prepare_deadlines(deadline_ms)
        return moderate(judge, texts, threshold=threshold, deadline_ms=deadline_ms)

    def _classifier(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for `key`, or is made now."""
        found = self._classifiers.pop(key, None)
        made: T = make() if found is None else found
        while len(self._classifiers) >= KEPT:
            self._classifiers.pop(next(iter(self._classifiers)), None)
        self._classifiers[key] = made
        return made
