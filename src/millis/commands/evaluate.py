"""millis evaluate: the quality of a task on examples, with what each answer took."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.tasks.evaluation import Evaluation

EXAMPLE = "millis evaluate classify test.csv -m smollm2 --limit 200 --plot reliability.svg"


def command(
    task: Annotated[
        str | None, typer.Argument(help="classify, translate, summarize, answer or extract; none with --perplexity.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="CSV or JSONL: text, label | source, target | question, context, answers | text, value; "
            "SQuAD's .json; classify also takes what train reads."
        ),
    ] = None,
    model: Annotated[str, typer.Option("-m", "--model", help="A model; for classify also SMALL,LARGE.")] = "smollm2",
    rows: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many examples, spread evenly.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Labels, instead of those of the file; @FILE: one a line.")
    ] = None,
    examples: Annotated[Path | None, typer.Option(metavar="FILE", help="Labelled texts shown to the model.")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="contextual|FILE", help="Calibration of the labels' scores.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="classify: where the text is.")] = None,
    label_column: Annotated[str | None, typer.Option(help="classify: where the label is.")] = None,
    abstain: Annotated[float | None, typer.Option(min=0, max=1, help="No label below this score.")] = None,
    schema: Annotated[Path | None, typer.Option(metavar="FILE", help="extract: the JSON schema.")] = None,
    words: Annotated[int | None, typer.Option(min=1, help="summarize: words at most.")] = None,
    sentences: Annotated[int | None, typer.Option(min=1, help="summarize: sentences at most; 3 unless said.")] = None,
    characters: Annotated[int | None, typer.Option(min=1, help="summarize: characters at most.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="classify: a reliability plot, .svg or .png.")
    ] = None,
    deadline_ms: common.DeadlineMs = None,
    confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of SMALL,LARGE: what the small one keeps; 0.9 unless said.")
    ] = None,
    perplexity: Annotated[
        Path | None, typer.Option("--perplexity", metavar="FILE", help="A text file: its perplexity instead of a task.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="perplexity: tokens that are predicted together; 512 unless said.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--windows", min=1, help="perplexity: only so many windows, spread evenly.")
    ] = None,
    reference: Annotated[
        bool | None,
        typer.Option(help="perplexity: also run transformers in float32 on the same weights."),
    ] = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Accuracy, F1, BLEU, ROUGE and the like of a task, with p50 and p99 milliseconds; or the perplexity of a text."""
    given = {
        "labels": labels,
        "examples": examples,
        "calibration": calibration,
        "abstain": abstain,
        "schema": schema,
        "text_column": text_column,
        "label_column": label_column,
        "words": words,
        "sentences": sentences,
        "characters": characters,
    }
    if perplexity is not None:
        if task is not None:
            raise typer.BadParameter("a task and --perplexity exclude each other")
        others = {"limit": rows, "plot": plot, "deadline-ms": deadline_ms, "confidence": confidence}
        _refuse_given(given | others, "--perplexity")
        from millis.commands.evaluate_perplexity import perplexity_of

        return perplexity_of(
            perplexity,
            model=model,
            window=512 if window is None else window,
            limit=limit,
            reference=reference is not False,
            threads=threads,
            context=context,
            precision=precision,
            json=json,
        )
    if confidence is not None and "," not in model:
        raise typer.BadParameter("--confidence is for two models, as -m SMALL,LARGE")
    if task is None or file is None:
        raise typer.BadParameter("give a task and a file, or --perplexity FILE")
    _refuse_given({"window": window, "windows": limit, "reference": reference}, task)
    _check(task, {name: value for name, value in {**given, "plot": plot}.items() if value is not None})
    if plot is not None:
        _check_plot(plot)
    keep = 0.9 if confidence is None else confidence
    found = _evaluate(task, file, rows, given, deadline_ms, lambda: common.load_reader(
        model, keep, threads=threads, context=context, precision=precision))  # fmt: skip
    if json:
        common.print_json({"model": model, "file": str(file), "precision": precision, **found.asdict()})
    else:
        _print(found, model, file)
    if plot is not None:
        reliability_plot(found, plot, f"{model} on {file.name}")


ALLOWED = {
    "classify": {"labels", "examples", "calibration", "abstain", "plot", "text_column", "label_column"},
    "translate": set[str](),
    "summarize": {"words", "sentences", "characters"},
    "answer": set[str](),
    "extract": {"schema"},
}


def _check(task: str, given: dict[str, Any]) -> None:
    if task not in ALLOWED:
        raise typer.BadParameter(f"no task {task!r}; there are {', '.join(ALLOWED)}")
    _refuse_given({name: value for name, value in given.items() if name not in ALLOWED[task]}, task)
    if task == "extract" and "schema" not in given:
        raise typer.BadParameter("extract needs --schema FILE")


def _refuse_given(options: dict[str, Any], task: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is not for {task}")


def _check_plot(path: Path) -> None:
    """What would keep a plot from being written, said before the work that it shows is done."""
    if path.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"{path}: a plot is .svg or .png")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent} to write {path.name} to")
    if find_spec("matplotlib") is None:
        raise RequestError("a plot needs matplotlib: pip install 'millis[evaluate]'")


def _evaluate(
    task: str,
    file: Path,
    limit: int | None,
    given: dict[str, Any],
    deadline_ms: float | None,
    load: Callable[[], Any],
) -> Evaluation:
    from millis.tasks import evaluation
    from millis.tasks.dataset import read_rows, spread

    everything = _labelled(file, given) if task == "classify" else read_rows(file, evaluation.COLUMNS[task])
    some = spread(everything, limit)
    form = lines.read_schema(given["schema"]) if task == "extract" else ""
    lm = load()
    with common.progress(task, len(some)) as progress:

        def advance() -> None:
            progress(advance=1)

        if task == "classify":
            return evaluation.evaluate_classify(_classifier(lm, everything, given, deadline_ms), some, advance)
        _whole_model(lm, task)
        if task == "translate":
            return evaluation.evaluate_translate(
                lambda text, to: lm.translate(text, to, deadline_ms=deadline_ms), some, advance
            )
        if task == "summarize":
            size = {name: given[name] for name in ("words", "sentences", "characters")}
            return evaluation.evaluate_summarize(
                lambda text: lm.summarize(text, **size, deadline_ms=deadline_ms), some, advance
            )
        if task == "answer":
            from millis.tasks.question import question

            return evaluation.evaluate_answer(lambda q, text: question(lm, q, text, deadline_ms), some, advance)
        return evaluation.evaluate_extract(lambda text: lm.extract(text, form, deadline_ms=deadline_ms), some, advance)


def _labelled(file: Path, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The labelled texts of a file; what of it was left out is said."""
    from millis.samples.read import Skipped
    from millis.tasks.dataset import read_labelled

    skipped = Skipped()
    found = read_labelled(file, skipped, given["text_column"], given["label_column"])
    for line in skipped.said():
        common.say(line)
    return [{"text": text, "label": label} for text, label in found]


def _classifier(lm: Any, rows: list[Any], given: dict[str, Any], deadline_ms: float | None) -> Callable[[str], Any]:
    """A call that classifies a text: with the labels of the file, or by a head that knows its own."""
    from millis.tasks.calibration import Calibration
    from millis.tasks.cascade import Cascade
    from millis.tasks.dataset import read_labelled
    from millis.tasks.methods import TaskMethods

    if not isinstance(lm, (TaskMethods, Cascade)):
        if any(value is not None for name, value in given.items() if not name.endswith("_column")):
            raise RequestError("a model with a trained head takes no labels, examples or calibration")
        if deadline_ms is not None:
            lm.prepare_deadlines(deadline_ms)
        return lambda text: lm.classify(text, truncate=True, deadline_ms=deadline_ms)
    names = given["labels"]
    names = sorted({str(row["label"]) for row in rows}) if names is None else lines.labels_of(names)
    kind = given["calibration"]
    options: dict[str, Any] = {"abstain": given["abstain"]}
    options["calibration"] = kind if kind in (None, "contextual") else Calibration.loads(lines.read_text(Path(kind)))
    options["examples"] = [] if given["examples"] is None else read_labelled(given["examples"])
    if rows:  # what is done once is no part of the first answer's time
        lm.classify(str(rows[0]["text"]), names, **options)
    return lambda text: lm.classify(text, names, deadline_ms=deadline_ms, **options)


def _whole_model(lm: Any, task: str) -> None:
    from millis.tasks.methods import TaskMethods

    if not isinstance(lm, TaskMethods):
        raise RequestError(f"{task} takes one language model with -m")


def reliability_plot(found: Evaluation, path: Path, title: str) -> None:
    """Accuracy over confidence (Guo et al., 2017), as .svg or .png. RequestError: no scores, or no writing."""
    if not found.bins:
        raise RequestError("the answers have no scores to plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfectly calibrated")
    width = found.bins[0].high - found.bins[0].low
    axes.bar([b.low for b in found.bins], [b.accuracy for b in found.bins], width, align="edge", edgecolor="white")
    axes.plot(
        [b.confidence for b in found.bins], [b.accuracy for b in found.bins], "o", color="C1", label="mean confidence"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_title(f"{title}\nECE {found.metrics['ece']:.3f}, {found.count} texts", fontsize=10, parse_math=False)
    axes.legend(fontsize=8, loc="upper left")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def _print(found: Evaluation, model: str, file: Path) -> None:
    from rich.table import Table

    table = Table(
        title=f"{found.task}: {model} on {file.name}, {common.count(found.count, 'example')}", title_justify="left"
    )
    for name in (*found.metrics, "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    values = [f"{value:.1f}" if name in ("bleu", "chrf") else f"{value:.4f}" for name, value in found.metrics.items()]
    table.add_row(*values, f"{found.p50_ms:.1f}", f"{found.p99_ms:.1f}")
    common.print_table(table)
    if found.refused:
        refused = common.count(found.refused, "example")
        common.say(f"{refused} refused, whose deadline could not be met; counted as wrong")
