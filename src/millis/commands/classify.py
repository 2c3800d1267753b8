"""millis classify: which of some labels a text is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines

if TYPE_CHECKING:
    from millis.types import Classification

EXAMPLE = 'millis classify -m qwen2.5-0.5b --labels 正面,负面 "这部电影太好看了"'
Labelled = Annotated[Path | None, typer.Option(metavar="FILE", help="CSV or JSONL with text and label.")]


def command(
    text: lines.Text,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="The labels, by commas; @FILE: one a line. A trained head knows its own."),
    ] = None,
    model: Annotated[
        str, typer.Option("-m", "--model", help="A model; SMALL,LARGE: the large one answers where there is time.")
    ] = "smollm2",
    examples: Annotated[
        Path | None, typer.Option("--examples", metavar="FILE", help="Labelled texts shown to the model: CSV or JSONL.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="FILE", help="Labelled texts to fit the scores to.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", metavar="contextual|FILE", help="A calibration made before.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Where to keep what --calibrate found.")
    ] = None,
    multi: Annotated[bool, typer.Option("--multi", help="Every label by itself fits or does not.")] = False,
    abstain: Annotated[float | None, typer.Option("--abstain", min=0, max=1, help="No label below this score.")] = None,
    length_normalized: Annotated[
        bool, typer.Option("--length-normalized", help="Mean over a label's tokens instead of their sum.")
    ] = False,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Of SMALL,LARGE: from here on the small model's answer stays.")
    ] = 0.9,
    batch: lines.Together = 32,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Which of some labels a text is; with - one JSON line for each line of standard input."""
    from millis.models.load import is_encoder
    from millis.tasks.calibration import Calibration
    from millis.tasks.cascade import Cascade
    from millis.tasks.dataset import read_labelled
    from millis.tasks.encoder import Encoder
    from millis.tasks.labels import Question, check_labelled

    if calibrate is not None and calibration is not None:
        raise typer.BadParameter("--calibrate and --calibration exclude each other; give one of them")
    if multi and (calibrate is not None or calibration is not None):
        raise typer.BadParameter("--multi and a calibration exclude each other; leave one of them out")
    if save is not None and calibrate is None:
        raise typer.BadParameter("--save keeps what --calibrate finds; give both")
    if calibrate is not None and "," in model:
        raise typer.BadParameter("a calibration belongs to one model; give one with -m")
    if save is not None and not save.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {save.absolute().parent} to write {save.name} to")
    names = [] if labels is None else lines.labels_of(labels)
    options: dict[str, Any] = {"length_normalized": length_normalized}
    options["examples"] = [] if examples is None else read_labelled(examples)
    samples = None if calibrate is None else read_labelled(calibrate)
    made: Any = (
        calibration if calibration in (None, "contextual") else Calibration.loads(lines.read_text(Path(calibration)))
    )
    if labels is not None:
        with common.usage():
            Question(names, options["examples"], multi=multi)
            check_labelled(samples or [], names)
            if isinstance(made, Calibration):
                made.apply(names, [0.0] * len(names))
    encoder = "," not in model and is_encoder(common.resolve(model))
    given = [labels, examples, calibrate, calibration, abstain, multi or None, length_normalized or None]
    if encoder and any(value is not None for value in given):
        raise typer.BadParameter(f"{model} has labels of its own; give the text, and --deadline-ms if need be")
    if labels is None and not encoder:
        raise typer.BadParameter(f"{model} has no trained head; give the labels: --labels a,b,c")
    lm = common.load_reader(model, confidence, threads=threads, context=context, precision=precision)
    if samples is not None:
        assert not isinstance(lm, Cascade | Encoder)
        made = lm.calibrate(samples, names, **options)
        common.say(f"temperature {made.temperature:.3f} from {common.count(len(samples), 'text')}")
        if save is not None:
            common.write_text(save, made.dumps() + "\n")
    options |= {"calibration": made, "multi": multi, "abstain": abstain, "deadline_ms": deadline_ms}

    def run(texts: list[str]) -> list[Classification]:
        if isinstance(lm, Encoder):
            return lm.classify(texts, truncate=True, deadline_ms=deadline_ms)
        return lm.classify(texts, names, **options)

    lines.answer(text, batch, run, _record, lambda one: _show(one, multi), as_json=json)


def _record(one: Classification) -> dict[str, Any]:
    found: dict[str, Any] = {"label": one.label, "scores": one.scores}
    if one.labels:
        found["labels"] = list(one.labels)
    return {**found, "complete": one.complete, "timings": one.timings.asdict()}


def _show(one: Classification, multi: bool) -> str:
    common.say(lines.status(one.timings) + ("" if one.complete else " · first tokens only: no time for more"))
    best = list(one.scores.items())[:5]
    common.say(" · ".join(f"{label} {score:.3f}" for label, score in best))
    return (", ".join(one.labels) if multi else one.label) or "(none)"
