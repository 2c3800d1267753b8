"""Arguments that cannot be used: every task refuses them as RequestError, by name, before any work."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import millis
from millis.tasks import checks
from millis.tasks.ask import within
from millis.tasks.cascade import Cascade
from millis.types import DeadlineError, OverloadError, RequestError

TWO = ["a", "b"]
DOCUMENTS = [{"id": "fees", "text": "The fee is 5 euros."}]
Call = Callable[[Any], object]


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> millis.LanguageModel:
    return millis.LanguageModel(model_path("smollm2"), threads=1, context=512)


TIMED: dict[str, Callable[[Any, Any], object]] = {
    "generate": lambda lm, ms: lm.generate("x", deadline_ms=ms),
    "stream": lambda lm, ms: lm.stream("x", deadline_ms=ms),
    "chat": lambda lm, ms: lm.chat([{"role": "user", "content": "x"}], deadline_ms=ms),
    "classify": lambda lm, ms: lm.classify("x", TWO, deadline_ms=ms),
    "extract": lambda lm, ms: lm.extract("x", True, deadline_ms=ms),
    "translate": lambda lm, ms: lm.translate("what is English", "en", deadline_ms=ms),
    "summarize": lambda lm, ms: lm.summarize("x", deadline_ms=ms),
    "moderate": lambda lm, ms: lm.moderate("x", deadline_ms=ms),
    "answer": lambda lm, ms: lm.answer("fee?", DOCUMENTS, embedder=None, deadline_ms=ms),
    "embed": lambda lm, ms: lm.embed(["x"], deadline_ms=ms),
    "cascade": lambda lm, ms: Cascade([lm, lm]).classify("x", TWO, deadline_ms=ms),
    "prepare_deadlines": lambda lm, ms: lm.prepare_deadlines(ms),
}


@pytest.mark.parametrize("task", TIMED)
def test_no_task_takes_a_deadline_that_is_none(task: str, lm: millis.LanguageModel) -> None:
    for wrong in ("x", -1, 0, math.nan, math.inf, True, 10**400, [5], 2e9):
        with pytest.raises(RequestError, match="deadline_ms must be a positive number of milli") as refused:
            TIMED[task](lm, wrong)
        assert repr(wrong)[:50] in str(refused.value)


TEXTS: dict[str, Callable[[Any, Any], object]] = {
    "classify": lambda lm, texts: lm.classify(texts, TWO),
    "extract": lambda lm, texts: lm.extract(texts, True),
    "translate": lambda lm, texts: lm.translate(texts, "zh"),
    "summarize": lambda lm, texts: lm.summarize(texts),
    "moderate": lambda lm, texts: lm.moderate(texts),
    "embed": lambda lm, texts: lm.embed(texts),
    "cascade": lambda lm, texts: Cascade([lm, lm]).classify(texts, TWO),
}


@pytest.mark.parametrize("task", TEXTS)
def test_no_task_takes_what_is_no_text(task: str, lm: millis.LanguageModel) -> None:
    for wrong in (None, 5, b"ab", {"a": "b"}):
        with pytest.raises(RequestError, match="texts must be a list"):
            TEXTS[task](lm, wrong)
    for wrong, message in (
        ([None], "text 0 must be a str"),
        (["a", " "], "text 1 is empty"),
        (["a", "b\ud800"], "text 1 holds a lone surrogate at position 1"),
    ):
        with pytest.raises(RequestError, match=message):
            TEXTS[task](lm, wrong)


@pytest.mark.parametrize("task", sorted(TEXTS.keys() - {"embed"}))
def test_no_texts_have_no_answers(task: str, lm: millis.LanguageModel) -> None:
    assert TEXTS[task](lm, []) == []


A = {"id": "a", "text": "x"}
REFUSED: list[tuple[str, Call]] = [
    ("a term of the glossary must be a str", lambda lm: lm.translate("x", "zh", glossary={5: "y"})),
    ("glossary's translation of 'x' must be a str", lambda lm: lm.translate("x", "zh", glossary={"x": None})),
    ("glossary must map", lambda lm: lm.translate("x", "zh", glossary="x")),
    ("a term of the glossary is empty", lambda lm: lm.translate("x", "zh", glossary={"": "y"})),
    (r"max_tokens must be a whole number in \[1", lambda lm: lm.translate("x", "zh", max_tokens=0)),
    ("max_tokens must be a whole number", lambda lm: lm.answer("fee?", DOCUMENTS, embedder=None, max_tokens="5")),
    ("number 0 is \\('a',\\)", lambda lm: lm.classify("x", TWO, examples=[("a",)])),
    ("examples must be a list, not None", lambda lm: lm.classify("x", TWO, examples=None)),
    ("number 0 is 'ab'", lambda lm: lm.classify("x", TWO, examples=["ab"])),
    ("the template must be a str", lambda lm: lm.classify("x", TWO, template=5)),
    ("the template must hold {text}", lambda lm: lm.classify("x", TWO, template="")),
    ("calibration must be .* not 5", lambda lm: lm.classify("x", TWO, calibration=5)),
    ("abstain must lie", lambda lm: lm.classify("x", TWO, abstain=[1])),
    ("labels must be a list", lambda lm: lm.classify("x", None)),
    ("labels must be a list of texts, not of int", lambda lm: lm.classify("x", [1, 2])),
    ("differ only in the white space", lambda lm: lm.classify("x", ["a", "a "])),
    ("calibrate has no option 'foo'", lambda lm: lm.calibrate([("x", "a")], TWO, foo=1)),
    ("samples must be .* pairs", lambda lm: lm.calibrate([5], TWO)),
    ("the bias of 'a' must lie", lambda lm: millis.Calibration({"a": "x"})),  # type: ignore[dict-item]
    ("a finite bias for every label", lambda lm: millis.Calibration(None)),  # type: ignore[arg-type]
    ("words must be a whole number", lambda lm: lm.summarize("x", words="5")),
    ("words must be a whole number", lambda lm: lm.summarize("x", words=1.5)),
    ("sentences must be a whole number", lambda lm: lm.summarize("x", sentences=math.nan)),
    ("characters must be a whole number", lambda lm: lm.summarize("x", characters=10**400)),
    ("threshold must lie", lambda lm: lm.moderate("x", threshold="x")),
    ("threshold must be above 0", lambda lm: lm.moderate("x", threshold=0)),
    ("categories must be a list, not 5", lambda lm: lm.moderate("x", categories=5)),
    ("categories must be a list, not 'ab'", lambda lm: lm.moderate("x", categories="ab")),
    ("categories: at least 2 labels are needed, not 1", lambda lm: lm.moderate("x", categories=["a"])),
    ("the instruction must be a str", lambda lm: lm.extract("x", True, instruction=5)),
    ("confidence must lie", lambda lm: Cascade([lm, lm], confidence="x")),  # type: ignore[arg-type]
    ("number 1 of labels holds a lone surrogate", lambda lm: lm.classify("x", ["a", "\ud800"])),
    ("number 0 of examples holds a lone surrogate", lambda lm: lm.classify("x", TWO, examples=[("\ud800", "a")])),
    ("the template holds a lone surrogate", lambda lm: lm.classify("x", TWO, template="{text}\ud800")),
    ("the question holds a lone surrogate", lambda lm: lm.answer("\ud800", DOCUMENTS, embedder=None)),
    ("the schema holds a lone surrogate", lambda lm: lm.extract("x", {"const": "\ud800"})),
    ("cannot be written as JSON: .*object is not JSON", lambda lm: lm.extract("x", {"const": object()})),
    (r"a JSON schema is an object, true or false, not \[\]", lambda lm: lm.extract("x", "[]")),
    ("a model's name must be a path, not None", lambda lm: millis.load(None)),
    ("tokens; the context holds .*: shorten it", lambda lm: lm.classify("x " * 20_000, TWO)),
    ("two documents have the id 'a'; give each", lambda lm: lm.answer("fee?", [A, {**A, "text": "y"}], embedder=None)),
    ("models must be a list, not None", lambda lm: millis.cascade(None)),  # type: ignore[arg-type]
    ("confidence must lie", lambda lm: millis.cascade(["a", "b"], confidence="x")),  # type: ignore[arg-type]
    ("continuations must be a list, not None", lambda lm: lm.score("a", None)),
    ("an adapter must be a path, not 5", lambda lm: lm.load_adapter(5)),
    ("an adapter's name must be a str", lambda lm: lm.generate("x", adapter=[])),
    ("an adapter's name must be a str", lambda lm: lm.unload_adapter(None)),
    ("documents must be a list of documents, not None", lambda lm: lm.answer("fee?", None)),
    ("documents must be .* not '/path/to/x.idx'; .*Index.open", lambda lm: lm.answer("fee?", "/path/to/x.idx")),
    ("embedder must be .* not 5", lambda lm: lm.answer("fee?", DOCUMENTS, embedder=5)),
    ("questions must be a list", lambda lm: lm.answer(None, DOCUMENTS, embedder=None)),
    ("an index must be a path, not 5", lambda lm: millis.Index.open(5)),  # type: ignore[arg-type]
    ("temperature must lie", lambda lm: lm.generate("x", temperature=10**400)),
    (r"logit_bias\[5\] must lie", lambda lm: lm.generate("x", logit_bias={5: 10**400})),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_used_is_refused_by_name(message: str, call: Call, lm: millis.LanguageModel) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        call(lm)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_numpys_numbers_are_numbers(lm: millis.LanguageModel) -> None:
    out = lm.generate("x", max_tokens=np.int64(2), seed=np.int64(5), temperature=np.float32(0.5), ignore_eos=True)
    again = lm.generate("x", max_tokens=2, seed=5, temperature=0.5, ignore_eos=True)
    assert out.tokens == again.tokens
    assert lm.classify("x", np.array(TWO), abstain=np.float64(0)).label in TWO  # type: ignore[call-overload]


def test_a_refusal_names_the_deadline_of_the_call_not_that_of_a_part(lm: millis.LanguageModel) -> None:
    for ask in (
        lambda: lm.moderate("You are. " * 40, deadline_ms=7),
        lambda: lm.summarize("He is. " * 40, deadline_ms=7),
    ):
        with pytest.raises(DeadlineError, match="the deadline of 7 ms cannot be met"):
            ask()
    with pytest.raises(DeadlineError, match="the deadline of 0.001 ms cannot be met"):
        lm.classify("x", TWO, deadline_ms=0.001)
    with pytest.raises(DeadlineError, match="of 100 ms cannot be met: it would take 4") as refused:
        with within(100, 0.0, share=0.5):
            raise DeadlineError("the deadline of 50 ms", predicted_ms=2e10, retry_after_s=0.5)
    assert refused.value.predicted_ms > 4e10 and refused.value.retry_after_s == 0.5


def test_a_cascade_says_which_model_could_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, **options: Any) -> Any:
        raise OverloadError("no room", retry_after_s=2.0)

    monkeypatch.setattr("millis.tasks.load.load", fails)
    with pytest.raises(OverloadError, match="^smollm2: no room$") as refused:
        millis.cascade(["smollm2", "qwen2.5-0.5b"])
    assert copy.copy(refused.value).retry_after_s == 2.0


def test_a_loaded_model_is_neither_pickled_nor_copied(lm: millis.LanguageModel) -> None:
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RequestError, match="cannot be pickled or copied; load it in each process"):
            use(lm)


def test_what_is_like_a_list_is_taken() -> None:
    assert checks.texts(("a", "b")) == (["a", "b"], False) and checks.texts("a") == (["a"], True)
    assert checks.strings((c for c in "ab"), "x") == ["a", "b"] and checks.pairs([["a", "b"]], "x") == [("a", "b")]
    assert checks.deadline(np.float32(5)) == 5.0 and checks.deadline(None) is None
    assert checks.texts(np.array(["a"]))[0] == ["a"]  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="not SimpleNamespace|not namespace"):
        checks.sequence(SimpleNamespace(), "x")  # type: ignore[arg-type]
