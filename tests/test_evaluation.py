"""Evaluation: known answers give known metrics, heads count as classifiers, and the command prints it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from millis import cli
from millis.commands import evaluate
from millis.tasks.evaluation import (
    evaluate_answer,
    evaluate_classify,
    evaluate_extract,
    evaluate_summarize,
    evaluate_translate,
)
from millis.tasks.methods import TaskMethods
from millis.types import DeadlineError, RequestError
from shell import error_line
from shell import millis as shell

ROWS = [{"text": text, "label": label} for text, label in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "y"))]


@dataclass
class Said:
    """What a trained head might say."""

    label: str | None
    scores: dict[str, float] = field(default_factory=dict)


def test_a_classifier_is_whatever_says_labels() -> None:
    says = {
        "a": Said("x", {"x": 0.9, "y": 0.1}),
        "b": Said("x", {"x": 0.6, "y": 0.4}),
        "c": Said(None, {"x": 0.7, "y": 0.3}),
    }
    says["d"] = Said("y", {"y": 1.0, "x": 0.0})
    out = evaluate_classify(lambda text: says[text], ROWS)
    assert out.metrics["accuracy"] == 0.5 and out.metrics["answered"] == 0.75
    assert out.metrics["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.0) / 4)
    assert out.count == 4 and 0 <= out.p50_ms <= out.p99_ms
    bare = evaluate_classify(lambda text: [Said("x")], ROWS)  # a list of one, and no scores
    assert bare.metrics == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "answered": 1.0} and not bare.bins


def test_what_is_refused_counts_as_wrong() -> None:
    def classify(text: str) -> Said:
        if text in "ab":
            raise DeadlineError("late", predicted_ms=1.0, retry_after_s=1.0)
        return Said("x", {"x": 1.0})

    out = evaluate_classify(classify, ROWS)
    assert out.refused == 2 and out.metrics["accuracy"] == 0.25


def test_translations_are_measured_by_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rows = [
        {"source": "the cat sat on the mat", "target": "猫坐在垫子上。"},
        {"source": "he came home late", "target": "他很晚才回家。"},
    ]
    said = {"the cat sat on the mat": "猫坐在垫子上。", "he came home late": "他回家很晚。"}
    asked = []

    def translate(text: str, to: str) -> str:
        asked.append(to)
        return said[text]

    out = evaluate_translate(translate, rows)
    references = [[row["target"] for row in rows]]
    assert asked == ["zh", "zh"]
    assert out.metrics["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(list(said.values()), references, tokenize="zh").score
    )
    assert out.metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(list(said.values()), references).score)


def test_summaries_answers_and_extractions() -> None:
    rows = [{"source": "x", "target": "police killed the gunman"}]
    out = evaluate_summarize(lambda text: "police kill the gunman", rows)
    assert out.metrics == pytest.approx({"rouge1": 0.75, "rouge2": 1 / 3, "rougeL": 0.75})
    asked = [
        {"question": "谁？", "context": "他", "answers": ["他"]},
        {"question": "who?", "context": "I", "answers": ["me"]},
    ]
    assert evaluate_answer(lambda q, c: c, asked).metrics == {"exact_match": 0.5, "f1": 0.5}
    values = [{"text": "a", "value": {"n": "Anna", "age": 3}}, {"text": "b", "value": '{"n": "Bo", "age": 4}'}]
    said: dict[str, Any] = {"a": {"n": "anna", "age": 3}, "b": None}

    class Got:
        def __init__(self, value: Any) -> None:
            self.value = value

    out = evaluate_extract(lambda text: Got(said[text]), values)
    assert out.metrics == {"exact": 0.0, "fields": 0.5, "valid": 0.5}
    for value, why in (("3", "the value of example 3 must be an object"), ("x", "of example 3 is no JSON")):
        asked_of: list[str] = []
        with pytest.raises(RequestError, match=why):
            evaluate_extract(asked_of.append, [*values, {"text": "c", "value": value}])
        assert not asked_of  # it is said before anything is computed


def test_figures_are_printed_before_they_are_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise RequestError("cannot write plot.svg: No space left on device")

    data = tmp_path / "films.csv"
    data.write_text("text,label\nI love this film,positive\n", encoding="utf-8")
    found = evaluate_classify(lambda text: Said("positive", {"positive": 0.9}), [{"text": "a", "label": "positive"}])
    monkeypatch.setattr(evaluate, "_evaluate", lambda *_: found)
    monkeypatch.setattr(evaluate, "reliability_plot", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "classify", str(data), "--json", "--plot", str(tmp_path / "plot.svg")])
    shown = capsys.readouterr()
    assert ended.value.code == 1 and json.loads(shown.out)["metrics"]["accuracy"] == 1
    assert "No space left" in shown.err


def test_a_plot_of_a_file_with_dollars_in_its_name(tmp_path: Path) -> None:
    found = evaluate_classify(lambda text: Said("x", {"x": 0.9}), ROWS)
    evaluate.reliability_plot(found, tmp_path / "a.png", "model on a$b_{$.csv")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_labels_and_confidence_are_read_as_classify_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    class Writer(TaskMethods):
        def __init__(self) -> None:
            pass

        def classify(self, text: Any, labels: Any, **options: Any) -> Any:
            asked.append(list(labels))
            return Said("x", {"x": 0.9})

    (tmp_path / "labels.txt").write_text("late, lost\nfound\n", encoding="utf-8")
    given = dict.fromkeys(("abstain", "calibration", "examples"))
    for labels, names in (("x，y,", ["x", "y"]), (f"@{tmp_path / 'labels.txt'}", ["late, lost", "found"])):
        evaluate._classifier(Writer(), ROWS, given | {"labels": labels}, None)("a")
        assert asked[-1] == names
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "classify", "none.csv", "-m", "one", "--confidence", "0.5"])
    assert ended.value.code == 2 and "--confidence is for two models" in capsys.readouterr().err


def test_the_command_prints_and_plots(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    data, plot = tmp_path / "films.csv", tmp_path / "plot.svg"
    data.write_text("text,label\nI love this film,positive\nAwful and boring,negative\n", encoding="utf-8")
    common = ("-m", model_path("smollm2"), "--threads", "1")
    done = shell("evaluate", "classify", data, *common, "--json", "--plot", plot, "--calibration", "contextual")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["metrics"]["accuracy"] in (0.0, 0.5, 1.0)
        and found["count"] == 2
        and found["p99_ms"] >= found["p50_ms"] > 0
    )
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    assert "no task 'sing'" in error_line(shell("evaluate", "sing", data), 2)
    assert "--schema is not for classify" in error_line(shell("evaluate", "classify", data, "--schema", data), 2)
    assert "extract needs --schema" in error_line(shell("evaluate", "extract", data), 2)
    (tmp_path / "gap.csv").write_text("text,label\n,positive\n", encoding="utf-8")
    assert "1 empty), the first at" in error_line(shell("evaluate", "classify", tmp_path / "gap.csv"))
    assert "line 2: no column question" in error_line(shell("evaluate", "answer", data))
