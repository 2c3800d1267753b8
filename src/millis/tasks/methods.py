"""The tasks as methods of LanguageModel, for a text or a list: classify, extract, translate, summarize, moderate."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from millis.tasks import checks
from millis.tasks.calibration import Calibration
from millis.tasks.classify import Classifier
from millis.tasks.extract import Extraction, extract
from millis.tasks.labels import Example
from millis.tasks.moderate import Moderation, moderate, moderator
from millis.tasks.summarize import Summary, summarize
from millis.tasks.translate import Translation, translate
from millis.types import Classification, RequestError, number

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

T = TypeVar("T")
KEPT = 16  # classifiers whose labels stay encoded
ASKED = ("examples", "length_normalized", "template")  # options of calibrate


class TaskMethods:
    """With `deadline_ms`, counted from the call, an answer is there by then: shorter, closed or of first tokens only if
    need be, and DeadlineError where not even that can be. The texts of a list share steps; the deadline is each one's.
    """

    # A text is a sequence of texts, too, for a type checker; the first signature that fits counts.

    _classifiers: dict[Hashable, Any]

    @overload
    def classify(  # type: ignore[overload-overlap]
        self,
        texts: str,
        labels: Sequence[str],
        *,
        deadline_ms: float | None = None,
        examples: Sequence[Example] = (),
        calibration: Calibration | str | None = None,
        multi: bool = False,
        abstain: float | None = None,
        length_normalized: bool = False,
        template: str | None = None,
    ) -> Classification: ...
    @overload
    def classify(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        deadline_ms: float | None = None,
        examples: Sequence[Example] = (),
        calibration: Calibration | str | None = None,
        multi: bool = False,
        abstain: float | None = None,
        length_normalized: bool = False,
        template: str | None = None,
    ) -> list[Classification]: ...
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
    ) -> Classification | list[Classification]:
        """Which of `labels` a text is, with scores that sum to 1: a Classification, or a list of them.

        examples: (text, label) pairs shown to the model. calibration: "contextual" takes from each label what the model
        gives it behind texts that say nothing (Zhao et al., 2021); `calibrate` gives one with a temperature, too.
        multi: each label by itself fits or does not. abstain: no label where the best score is lower.
        length_normalized: a label's score is the mean over its tokens, not their sum. template: the question, with
        {text} and, if wanted, {labels} and {examples} in it.

        The question up to the text is computed once and cached; then one forward computes a text and all labels. The
        first call with these labels and a deadline does so beforehand.
        """
        given, single = checks.texts(texts)
        deadline_ms = checks.deadline(deadline_ms)
        made = self.classifier(
            labels,
            examples=examples,
            calibration=calibration,
            multi=multi,
            abstain=abstain,
            length_normalized=length_normalized,
            template=template,
        )
        if deadline_ms is not None:
            cast("LanguageModel", self).prepare_deadlines(deadline_ms)
            made.prepare()
        found = made.classify(given, deadline_ms)
        return found[0] if single else found

    def classifier(
        self,
        labels: Sequence[str],
        *,
        examples: Sequence[Example] = (),
        calibration: Calibration | str | None = None,
        multi: bool = False,
        abstain: float | None = None,
        length_normalized: bool = False,
        template: str | None = None,
    ) -> Classifier:
        """What `classify` asks with these labels, made when they first come."""
        labels, examples = checks.strings(labels, "labels"), checks.pairs(examples, "examples")
        template = checks.template(template)
        abstain = None if abstain is None else number("abstain", abstain, 0, 1)
        key = (tuple(labels), tuple(examples), bool(multi), abstain, bool(length_normalized), template)
        return self._classifier(
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

    def calibrate(self, samples: Sequence[Example], labels: Sequence[str], **options: Any) -> Calibration:
        """A calibration for `classify` with these labels, from (text, label) pairs: contextual, with a temperature.

        options: examples, length_normalized and template, as `classify` will have them.
        """
        for option in options:
            if option not in ASKED:
                raise RequestError(f"calibrate has no option {option!r}; it has {', '.join(ASKED)}")
        return Classifier(cast("LanguageModel", self), labels, **options).fit(samples)

    @overload
    def extract(
        self,
        texts: str,
        schema: Any,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 512,
        instruction: str | None = None,
    ) -> Extraction: ...
    @overload
    def extract(
        self,
        texts: Sequence[str],
        schema: Any,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 512,
        instruction: str | None = None,
    ) -> list[Extraction]: ...
    def extract(
        self,
        texts: str | Sequence[str],
        schema: Any,
        *,
        deadline_ms: float | None = None,
        max_tokens: int = 512,
        instruction: str | None = None,
    ) -> Extraction | list[Extraction]:
        """What a text says as JSON of `schema`: an Extraction, or a list of them.

        schema: a JSON schema, as a mapping or text, which is taken as it is; or a type that pydantic knows: one of its
        models, a dataclass, a TypedDict, list[Item], Literal["a", "b"]. Objects of such a type have the fields that it
        names and no others, unless it says so (extra="allow").
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

    @overload
    def translate(  # type: ignore[overload-overlap]
        self,
        texts: str,
        to: str,
        *,
        source: str | None = None,
        glossary: Mapping[str, str] | None = None,
        deadline_ms: float | None = None,
        max_tokens: int | None = None,
    ) -> Translation: ...
    @overload
    def translate(
        self,
        texts: Sequence[str],
        to: str,
        *,
        source: str | None = None,
        glossary: Mapping[str, str] | None = None,
        deadline_ms: float | None = None,
        max_tokens: int | None = None,
    ) -> list[Translation]: ...
    def translate(
        self,
        texts: str | Sequence[str],
        to: str,
        *,
        source: str | None = None,
        glossary: Mapping[str, str] | None = None,
        deadline_ms: float | None = None,
        max_tokens: int | None = None,
    ) -> Translation | list[Translation]:
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

    @overload
    def summarize(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        words: int | None = None,
        sentences: int | None = None,
        characters: int | None = None,
        deadline_ms: float | None = None,
    ) -> Summary: ...
    @overload
    def summarize(
        self,
        texts: Sequence[str],
        *,
        words: int | None = None,
        sentences: int | None = None,
        characters: int | None = None,
        deadline_ms: float | None = None,
    ) -> list[Summary]: ...
    def summarize(
        self,
        texts: str | Sequence[str],
        *,
        words: int | None = None,
        sentences: int | None = None,
        characters: int | None = None,
        deadline_ms: float | None = None,
    ) -> Summary | list[Summary]:
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

    @overload
    def moderate(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        categories: Sequence[str] | None = None,
        threshold: float = 0.5,
        deadline_ms: float | None = None,
    ) -> Moderation: ...
    @overload
    def moderate(
        self,
        texts: Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        threshold: float = 0.5,
        deadline_ms: float | None = None,
    ) -> list[Moderation]: ...
    def moderate(
        self,
        texts: str | Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        threshold: float = 0.5,
        deadline_ms: float | None = None,
    ) -> Moderation | list[Moderation]:
        """Whether a text is safe, and which categories of harm it shows: a Moderation, or a list of them."""
        lm = cast("LanguageModel", self)
        deadline_ms = checks.deadline(deadline_ms)
        kinds = None if categories is None else tuple(checks.strings(categories, "categories"))
        judge = self._classifier(("moderate", kinds), lambda: moderator(lm, kinds))
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
