"""millis train: fine-tune a model, or train one from scratch, and keep what can be served."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from millis.commands import common
from millis.types import ModelError

EXAMPLE = "millis train intents.csv --task classify -m minilm --out intents --eval-split 0.1"

Data = Annotated[list[Path], typer.Argument(metavar="DATA...", help="CSV, TSV, JSON, JSONL or text files, or folders.")]
Out = Annotated[Path, typer.Option(file_okay=False, help="Folder for the model and all that belongs to the run.")]
Epochs = Annotated[float | None, typer.Option(min=0.001, max=1e6, help="How often to go through the data.")]
Steps = Annotated[int | None, typer.Option(min=1, help="At most so many updates.")]
TimeLimit = Annotated[
    str | None, typer.Option(help="Stop by then, with the learning rate down: 90s, 30m, 2h. Evaluation follows.")
]
Lr = Annotated[float | None, typer.Option(min=1e-9, max=10, help="Highest learning rate; it rises, then falls.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Samples an update.")]
MaxTokens = Annotated[int | None, typer.Option(min=8, help="Longest sample in tokens.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Same seed, same machine: same model.")]
Resume = Annotated[
    bool | None,
    typer.Option("--resume/--no-resume", help="Go on with the run in --out, or start over. Default: go on."),
]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Updates between checkpoints; default: by time, for a few percent of it.")
]
Numbers = Annotated[
    Literal["auto", "bf16", "f32"], typer.Option(help="Matrix products; auto: bf16 where this processor is faster so.")
]
Gguf = Annotated[
    Literal["F16", "Q8_0"] | None, typer.Option(help="Also write OUT/model.gguf, stored so.", case_sensitive=False)
]


def command(
    data: Data,
    task: Annotated[Literal["classify", "embed", "lm", "chat"], typer.Option(help="What the model is for.")],
    out: Out,
    model: Annotated[str | None, typer.Option("-m", "--model", help="The model to start from.")] = None,
    shape: Annotated[
        Literal["llama", "gpt2"] | None, typer.Option(help="lm: start from nothing, with a model of this shape.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Weights of a new model; default 15M.")] = None,
    vocab: Annotated[
        int | None, typer.Option(min=300, max=1 << 20, help="Tokens of a new model's vocabulary; default 8000.")
    ] = None,
    finetune: Annotated[Literal["full", "lora"], typer.Option(help="lm, chat: all weights, or an adapter.")] = "full",
    rank: Annotated[int | None, typer.Option(min=1, max=1024, help="Of the adapter; default 16.")] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    time_limit: TimeLimit = None,
    lr: Lr = None,
    batch: Batch = None,
    max_tokens: MaxTokens = None,
    layers: Annotated[int | None, typer.Option(min=1, help="classify: keep only the first so many layers.")] = None,
    freeze_layers: Annotated[
        int | None,
        typer.Option(min=0, help="classify: the embedding and so many of the first layers stay."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, max=10)] = None,
    label_smoothing: Annotated[float | None, typer.Option(min=0, max=0.99, help="classify.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.99, help="classify.")] = None,
    elsewhere: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="classify: how often a text that is too long is read from a random place."),
    ] = None,
    ngrams: Annotated[
        bool | None,
        typer.Option(
            "--ngrams/--no-ngrams",
            help="classify: add what words and pairs of them say; models that Millis runs have it unless told not to.",
        ),
    ] = None,
    ema: Annotated[
        float | None, typer.Option(min=0, max=0.99999, help="Keep weights averaged with this decay; 0: the last ones.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="classify, embed: train so often from the same start, each for --epochs or --steps, --time-limit for "
            "all together, and keep the mean of the weights.",
        ),
    ] = None,
    eval_split: Annotated[float, typer.Option(min=0, max=0.9, help="Hold out this share for evaluation.")] = 0.0,
    eval_data: Annotated[list[Path] | None, typer.Option("--eval", help="Evaluate on this file; repeatable.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Where the text is, if not in an obvious column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Where the label is.")] = None,
    numbers: Numbers = "auto",
    gguf: Gguf = None,
    seed: Seed = 0,
    threads: common.Threads = None,
    resume: Resume = None,
    checkpoint_every: CheckpointEvery = None,
    json: common.Json = False,
) -> None:
    """Train on your data. Killed, it goes on where it was when you run the same again."""
    from millis.samples.read import files_of

    if gguf is not None and task not in ("lm", "chat"):
        raise typer.BadParameter(f"--gguf is for lm and chat, not for {task}")
    files_of([*data, *(eval_data or [])])  # what is not there is said before anything large is loaded
    prepare_torch(threads)
    from millis.train.gguf_out import add_gguf
    from millis.train.settings import amount
    from millis.train.start import settings_of, train

    given: dict[str, Any] = dict(
        model=model, shape=shape, vocab=vocab, finetune=finetune, rank=rank, epochs=epochs, steps=steps, lr=lr,
        batch=batch, max_tokens=max_tokens, layers=layers, freeze_layers=freeze_layers, weight_decay=weight_decay,
        label_smoothing=label_smoothing, dropout=dropout, elsewhere=elsewhere, ngrams=ngrams, ema=ema, rounds=rounds,
        eval_split=eval_split, text_column=text_column, label_column=label_column, seed=seed,
    )  # fmt: skip
    with common.usage():
        given["parameters"] = None if params is None else amount(params)
        settings = settings_of(task, data, eval_data or [], given | limits(time_limit, numbers))
    report = train(settings, out, common.resolve, resume=resume, checkpoint_steps=checkpoint_every)
    if gguf is not None:
        source = None if settings.model is None else common.resolve(settings.model)
        report["gguf_bytes"] = add_gguf(out, gguf, source)
    show(report, json)


def prepare_torch(threads: int | None) -> None:
    """PyTorch with the threads that were asked for. ModelError where the extra is not installed."""
    common.tell("reading models and data")
    from millis.config import usable_cores
    from millis.models.transformers_model import torch_module

    torch = torch_module("training")
    for library in ("matplotlib", "tensorboardX"):
        if find_spec(library) is None:
            raise ModelError(f"training needs {library}; install it with: pip install 'millis[train]'")
    torch.set_num_threads(threads or usable_cores())


def limits(time_limit: str | None, numbers: str) -> dict[str, Any]:
    """The options that are said in words, as settings."""
    from millis.train.settings import seconds
    from millis.train.start import bf16_is_faster

    return {
        "time_limit_s": None if time_limit is None else seconds(time_limit),
        "bf16": bf16_is_faster() if numbers == "auto" else numbers == "bf16",
    }


def show(report: dict[str, Any], json: bool) -> None:
    """The report, as a table or as JSON."""
    if json:
        common.print_json(report)
        return
    from rich.table import Table

    table = Table(show_header=False)
    if report.get("already_done"):
        common.say("this run was done already; its report:")
    for name, value in _lines(report):
        table.add_row(name, value)
    common.print_table(table)


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    trained = f"{common.count(report['steps'], 'step')}, {report['epochs']:.2f} epochs, {report['tokens']:,} tokens"
    lines = [("trained", f"{trained} in {report['seconds']:.1f} s ({report['tokens_s']:,.0f} tokens/s)")]
    if "utilisation" in report:
        share = f"{100 * report['utilisation']:.0f} % of a large matrix product's {report['matmul_gflops']:.0f} GFLOP/s"
        lines.append(("speed", f"{report['gflops']:.0f} GFLOP/s, {share}"))
    if report["resumed_at"] is not None:
        lines.append(("resumed", f"after step {report['resumed_at']}"))
    if report["loss"] is not None:
        lines.append(("loss", f"{report['loss']:.4f}"))
    for name, value in report["quality"].items():
        if value is not None:
            text = f"{value:.2f} ms a text, one at a time, in PyTorch" if name == "latency_ms" else f"{value:.4f}"
            lines.append((name.replace("_", " "), text))
    for name, value in (report.get("served") or {}).items():
        if value is not None:
            lines.append((name.replace("_", " "), f"{value:.4g}" + (" ms, in Millis" if "_ms_" in name else "")))
    if report["skipped_rows"]:
        lines.append(("skipped", f"{common.count(report['skipped_rows'], 'row')}: {report['out']}/train/skipped.jsonl"))
    written = [*report["written"], *(["model.gguf"] if "gguf_bytes" in report else [])]
    return [*lines, ("written", f"{report['out']}: {', '.join(written)}"), ("curve", f"{report['out']}/train/loss.png")]
