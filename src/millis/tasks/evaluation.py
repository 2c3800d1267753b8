"""Quality of a task on examples, with what each answer took: what `millis evaluate` prints.

A classifier is anything with `classify(text)` that gives `label` and, for the calibration error, `scores`: a language
model with labels, a cascade, or a model with a trained head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from millis.tasks import metrics as measures
from millis.tasks.language import language
from millis.types import DeadlineError, RequestError

Row = Mapping[str, Any]
Answer = TypeVar("Answer")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "classify": ("text", "label"),
    "translate": ("source", "target"),
    "summarize": ("source", "target"),
    "answer": ("question", "context", "answers"),
    "extract": ("text", "value"),
}


class Labelled(Protocol):
    """What a classifier says of a text."""

    @property
    def label(self) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """metrics: name → value, shares in [0, 1], BLEU and chrF in [0, 100]. Milliseconds are those of whole calls.

    refused: examples whose deadline could not be met; they count as wrong. bins: of confidence, for a reliability plot.
    """

    task: str
    count: int
    metrics: dict[str, float]
    p50_ms: float
    p99_ms: float
    refused: int = 0
    bins: tuple[measures.Bin, ...] = ()

    def asdict(self) -> dict[str, Any]:
        """Without the bins."""
        names = ("task", "count", "metrics", "p50_ms", "p99_ms", "refused")
        return {name: getattr(self, name) for name in names}


class Timed:
    """Answers to rows one after the other, with the milliseconds of each call."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.took_ms: list[float] = []
        self.refused = 0
        self._advance = advance

    def answers(self, rows: Sequence[Row], ask: Callable[[Row], Answer]) -> list[Answer | None]:
        """None where a deadline was refused."""
        found: list[Answer | None] = []
        for row in rows:
            begin = time.perf_counter()
            try:
                found.append(ask(row))
            except DeadlineError:
                found.append(None)
                self.refused += 1
            self.took_ms.append(1000 * (time.perf_counter() - begin))
            self._advance()
        return found

    def result(self, task: str, found: dict[str, float], bins: Sequence[measures.Bin] = ()) -> Evaluation:
        """The evaluation."""
        return Evaluation(
            task=task,
            count=len(self.took_ms),
            metrics=found,
            p50_ms=measures.percentile(self.took_ms, 0.5),
            p99_ms=measures.percentile(self.took_ms, 0.99),
            refused=self.refused,
            bins=tuple(bins),
        )


def _nothing() -> None:
    pass


def evaluate_classify(
    classify: Callable[[str], Any], rows: Sequence[Row], advance: Callable[[], None] = _nothing
) -> Evaluation:
    """Accuracy, macro-F1 and, where answers have scores, the calibration error and the share that was answered."""
    timed = Timed(advance)
    answers = timed.answers(rows, lambda row: _one(classify(row["text"])))
    true = [str(row["label"]) for row in rows]
    predicted = [None if one is None else one.label for one in answers]
    found = {"accuracy": measures.accuracy(predicted, true), "macro_f1": measures.macro_f1(predicted, true)}
    bins: list[measures.Bin] = []
    scored = [
        (one, t) for one, t in zip(answers, true, strict=True) if one is not None and getattr(one, "scores", None)
    ]
    if scored:
        best = [max(one.scores, key=one.scores.__getitem__) for one, _ in scored]
        sure = [float(one.scores[name]) for (one, _), name in zip(scored, best, strict=True)]
        bins = measures.reliability(sure, [name == t for name, (_, t) in zip(best, scored, strict=True)])
        found["ece"] = measures.calibration_error(bins)
    found["answered"] = sum(label is not None for label in predicted) / len(predicted)
    return timed.result("classify", found, bins)


def evaluate_translate(
    translate: Callable[[str, str], Any], rows: Sequence[Row], advance: Callable[[], None] = _nothing
) -> Evaluation:
    """BLEU and chrF of the whole (Papineni et al., 2002; Popović, 2015), by sacrebleu. translate(text, to)."""
    bleu, chrf = _sacrebleu()
    timed = Timed(advance)
    target = language("".join(str(row["target"]) for row in rows))
    answers = timed.answers(rows, lambda row: _text(translate(row["source"], target)))
    texts, references = [one or "" for one in answers], [[str(row["target"]) for row in rows]]
    found = {
        "bleu": bleu(tokenize="zh" if target == "zh" else "13a").corpus_score(texts, references).score,
        "chrf": chrf().corpus_score(texts, references).score,
    }
    return timed.result("translate", found)


def evaluate_summarize(
    summarize: Callable[[str], Any], rows: Sequence[Row], advance: Callable[[], None] = _nothing
) -> Evaluation:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L."""
    timed = Timed(advance)
    answers = timed.answers(rows, lambda row: _text(summarize(row["source"])))
    pairs = [(one or "", str(row["target"])) for one, row in zip(answers, rows, strict=True)]
    found = {
        "rouge1": _mean([measures.rouge_n(*pair, 1) for pair in pairs]),
        "rouge2": _mean([measures.rouge_n(*pair, 2) for pair in pairs]),
        "rougeL": _mean([measures.rouge_l(*pair) for pair in pairs]),
    }
    return timed.result("summarize", found)


def evaluate_answer(
    answer: Callable[[str, str], Any], rows: Sequence[Row], advance: Callable[[], None] = _nothing
) -> Evaluation:
    """Mean exact match and F1 against the best of the expected answers. answer(question, context)."""
    timed = Timed(advance)
    answers = timed.answers(rows, lambda row: _text(answer(row["question"], row["context"])))
    pairs = [(one or "", row["answers"]) for one, row in zip(answers, rows, strict=True)]
    found = {
        "exact_match": _mean([float(measures.exact_match(*pair)) for pair in pairs]),
        "f1": _mean([measures.answer_f1(*pair) for pair in pairs]),
    }
    return timed.result("answer", found)


def evaluate_extract(
    extract: Callable[[str], Any], rows: Sequence[Row], advance: Callable[[], None] = _nothing
) -> Evaluation:
    """Share of whole values that are right, of their top fields, and of answers that are JSON of the schema."""
    wanted = [_value(row["value"], number) for number, row in enumerate(rows, 1)]  # before anything is computed
    timed = Timed(advance)
    answers = timed.answers(rows, lambda row: extract(row["text"]))
    exact = fields = expected = valid = 0
    for one, want in zip(answers, wanted, strict=True):
        got = None if one is None else one.value
        valid += got is not None
        exact += got == want
        expected += len(want)
        fields += sum(isinstance(got, dict) and name in got and _same(got[name], value) for name, value in want.items())
    found = {"exact": exact / len(rows), "fields": fields / max(1, expected), "valid": valid / len(rows)}
    return timed.result("extract", found)


def _value(given: Any, number: int) -> dict[str, Any]:
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the value of example {number} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the value of example {number} must be an object")
    return value


def _same(got: Any, want: Any) -> bool:
    if isinstance(got, str) and isinstance(want, str):
        return got.strip().casefold() == want.strip().casefold()
    return bool(got == want)


def _one(found: Any) -> Any:
    return found[0] if isinstance(found, list) else found


def _text(found: Any) -> str:
    one = _one(found)
    return str(getattr(one, "text", one))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sacrebleu() -> tuple[Any, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise RequestError("BLEU and chrF need sacrebleu: pip install 'millis[evaluate]'") from None
    return BLEU, CHRF
