"""Classification on a real model: scores are those of one label at a time; lists, calibration, deadlines, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millis
from millis.tasks.calibration import CONTENT_FREE, Calibration, softmax
from millis.tasks.labels import Question, exclusive, shown
from millis.types import DeadlineError, RequestError
from shell import error_line
from shell import millis as shell

LABELS = ["card_arrival", "card_lost", "exchange_rate"]
TEXT = "Where is my new card? I ordered it two weeks ago."


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> millis.LanguageModel:
    return millis.load(model_path("smollm2"), threads=1, precision="exact", context=1024)


@pytest.fixture
def scores_of(lm: millis.LanguageModel) -> Iterator[Callable[[str], list[float]]]:
    """The labels' log-probabilities, each by a forward of its own without cache: a path that shares nothing."""

    def one_by_one(text: str) -> list[float]:
        named = ", ".join(shown(LABELS))
        asked = f"Classify the text below as one of: {named}.\nAnswer with the label alone.\n\nText: {text}\n\nLabel:"
        assert asked == Question(LABELS).text(text)
        prompt = lm.tokenizer.encode_chat([{"role": "user", "content": asked}])
        return [lm.score(prompt, [lm.tokenizer.encode(label, add_special=False)])[0] for label in shown(LABELS)]

    yield one_by_one


def test_scores_are_those_of_one_label_at_a_time(lm: Any, scores_of: Callable[[str], list[float]]) -> None:
    out = lm.classify(TEXT, LABELS)
    want = dict(zip(LABELS, softmax(scores_of(TEXT)), strict=True))
    assert out.scores == pytest.approx(want, abs=2e-3)
    assert out.label == max(want, key=want.__getitem__) == next(iter(out.scores))
    assert sum(out.scores.values()) == pytest.approx(1) and out.complete
    assert out.timings.steps == 1
    again = lm.classify(TEXT.replace("two", "three"), LABELS)
    assert again.timings.steps == 1 and again.timings.cached_tokens > again.timings.prompt_tokens / 2


def test_labels_that_others_begin_with_exclude_them(lm: Any) -> None:
    log, labels = math.log, [[1], [1, 2], [1, 2, 3], [1, 4], [5]]
    values = exclusive([log(0.8), log(0.4), log(0.1), log(0.2), log(0.1)], labels)
    assert [math.exp(value) for value in values] == pytest.approx([0.2, 0.3, 0.1, 0.2, 0.1])
    assert exclusive([log(0.5), -math.inf], [[1], [1, 2]]) == [log(0.5), -math.inf]
    assert exclusive([log(0.5), log(0.5)], [[1], [1, 2]])[0] < -20
    names = ["intent number 1", "intent number 17", "intent number 2"]
    out = lm.classify("intent number 17", names)
    prompt = lm.tokenizer.encode_chat([{"role": "user", "content": Question(names).text("intent number 17")}])
    one, other, two = (math.exp(value) for value in lm.score(prompt, names))
    assert one > other  # as every text is likelier than the same and more
    want = [(one - other) / (one + two), other / (one + two), two / (one + two)]
    assert [out.scores[name] for name in names] == pytest.approx(want, abs=2e-3)


def test_what_looks_like_a_place_in_a_template_stays_as_it_is() -> None:
    names = ["{text}", "{examples}", "{label}"]
    for multi in (False, True):
        question = Question(names, [("a {label} of {labels}", "{text}")], multi=multi).text("the {examples}")
        assert "Text: a {label} of {labels}\n\nLabel: {text}\n" in question and "Text: the {examples}\n" in question
    assert "one of: {text}, {examples}, {label}." in Question(names).text("x")


def test_a_list_is_answered_as_its_texts_are_in_fewer_steps(lm: Any) -> None:
    texts = [TEXT, "What is the rate for euros?", "I want my money back", "我的卡丢了"]
    alone = [lm.classify(text, LABELS) for text in texts]
    before = lm.engine.counters.steps
    together = lm.classify(texts, LABELS)
    assert lm.engine.counters.steps - before < len(texts)
    for one, other in zip(alone, together, strict=True):
        assert other.scores == pytest.approx(one.scores, abs=2e-3)


def test_contextual_calibration_is_zhaos(lm: Any, scores_of: Callable[[str], list[float]]) -> None:
    free = [softmax(scores_of(text)) for text in CONTENT_FREE]
    prior = [sum(column) / len(free) for column in zip(*free, strict=True)]
    raw = [p / q for p, q in zip(softmax(scores_of(TEXT)), prior, strict=True)]
    want = {label: value / sum(raw) for label, value in zip(LABELS, raw, strict=True)}
    assert lm.classify(TEXT, LABELS, calibration="contextual").scores == pytest.approx(want, abs=5e-3)


def test_a_fitted_calibration_makes_the_labels_likelier(lm: Any) -> None:
    samples = [(TEXT, "card_arrival"), ("My card was stolen", "card_lost"), ("Euro to dollar?", "exchange_rate")]
    made = lm.calibrate(samples, LABELS)

    def loss(calibration: Any) -> float:
        found = lm.classify([text for text, _ in samples], LABELS, calibration=calibration)
        return -sum(math.log(one.scores[label]) for one, (_, label) in zip(found, samples, strict=True))

    assert loss(made) <= loss(Calibration(made.bias, 1.0)) + 1e-6
    with pytest.raises(RequestError, match="'other', which is none"):
        lm.calibrate([("a", "other")], LABELS)


def test_labels_that_fit_by_themselves(lm: Any) -> None:
    out = lm.classify(TEXT, LABELS, multi=True, abstain=0.0)
    assert set(out.labels) == set(LABELS) and out.timings.steps == 1
    asked = f'Text: {TEXT}\n\nDoes the label "card arrival" fit this text? Answer yes or no.'
    prompt = lm.tokenizer.encode_chat([{"role": "user", "content": asked}])
    yes, no = lm.score(prompt, ["Yes", "No"])
    assert out.scores["card_arrival"] == pytest.approx(1 / (1 + math.exp(no - yes)), abs=2e-3)
    none = lm.classify(TEXT, LABELS, multi=True, abstain=1.0)
    assert none.labels == () and none.label is None


def test_examples_abstaining_and_length(lm: Any, scores_of: Callable[[str], list[float]]) -> None:
    plain = lm.classify(TEXT, LABELS)
    shown_one = lm.classify(TEXT, LABELS, examples=[("I lost it", "card_lost")])
    assert shown_one.timings.prompt_tokens > plain.timings.prompt_tokens
    assert lm.classify(TEXT, LABELS, abstain=1.0).label is None
    mean = lm.classify(TEXT, LABELS, length_normalized=True)
    lengths = [len(lm.tokenizer.encode(label, add_special=False)) for label in shown(LABELS)]
    want = softmax([value / n for value, n in zip(scores_of(TEXT), lengths, strict=True)])
    assert mean.scores == pytest.approx(dict(zip(LABELS, want, strict=True)), abs=0.01)


def test_a_deadline_is_kept_or_refused(lm: Any) -> None:
    out = lm.classify(TEXT, LABELS, deadline_ms=900_000)
    assert out.complete and out.timings.deadline_ms == pytest.approx(900_000)
    with pytest.raises(DeadlineError):
        lm.classify(TEXT + " please" * 500, LABELS, deadline_ms=1)
    lm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("multi", [False, True])
def test_the_question_is_computed_before_the_first_deadline_begins(lm: Any, multi: bool) -> None:
    labels, before = ["speed limit", "school zone", f"no parking, {multi}"], lm.engine.counters.steps
    out = lm.classify("SPEED LIMIT 40", labels, multi=multi, deadline_ms=900_000)
    assert out.timings.cached_tokens > 0
    steps = lm.engine.counters.steps - before
    lm.classify("SCHOOL ZONE", labels, multi=multi, deadline_ms=900_000)
    assert lm.engine.counters.steps - before < 2 * steps


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a"], {}, "at least 2 labels"),
        (["a", "a"], {}, "given twice"),
        (["a", " "], {}, "non-empty"),
        ("ab", {}, "labels must be a list"),
        (["a", "b"], {"abstain": 2}, "abstain"),
        (["a", "b"], {"calibration": "other"}, "calibration must be"),
        (["a", "b"], {"calibration": Calibration({"a": 0.0})}, "without the label 'b'"),
        (["a", "b"], {"multi": True, "calibration": "contextual"}, "exclude each other"),
        (["a", "b"], {"template": "no place"}, "must hold {text}"),
        (["a", "b"], {"examples": [("x", "c")]}, "'c', which is none"),
    ],
)
def test_what_cannot_be_asked_is_refused(lm: Any, labels: Any, options: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lm.classify("text", labels, **options)
    with pytest.raises(RequestError, match="empty"):
        lm.classify(" ", ["a", "b"])


def test_identifiers_are_shown_as_words_unless_two_become_one() -> None:
    assert shown(["card_arrival", "b"]) == ["card arrival", "b"]
    assert shown(["a_b", "a b"]) == ["a_b", "a b"]


def test_the_command_takes_lines_and_files(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "some.csv"
    data.write_text("text,label\nI love it,good\nAwful,bad\n", encoding="utf-8")
    common = ("-m", model_path("smollm2"), "--labels", "good,bad", "--threads", "1")
    kept = tmp_path / "c.json"
    done = shell("classify", "-", *common, "--calibrate", data, "--save", kept, stdin="I love it\n\n太差了\n")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 and all(set(line["scores"]) == {"good", "bad"} for line in lines)
    assert set(json.loads(kept.read_text())["bias"]) == {"good", "bad"}
    for option in (("--calibrate", data), ("--calibration", kept)):
        wrong = ("classify", "x", *common[:2], "--labels", "good,other", *option)
        assert "the label 'bad'" in (said := error_line(shell(*wrong), 2)) or "the label 'other'" in said
        assert "exclude each other" in error_line(shell("classify", "x", *common, "--multi", *option), 2)
    assert shell("classify", "x", *common, "--multi", "--abstain", "1").stdout == "(none)\n"
    assert "--save keeps" in error_line(shell("classify", "x", *common, "--save", kept), 2)
    assert "give the labels" in error_line(shell("classify", "x", *common[:2]), 2)
    assert "no file or folder" in error_line(shell("classify", "x", *common, "--examples", tmp_path / "none.csv"))
