"""millis quantize: a smaller model as a GGUF file, by type or by what it may weigh, take or lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines
from millis.config import EngineConfig
from millis.files import place

if TYPE_CHECKING:
    from millis.quantize.run import Report, Target

EXAMPLE = "millis quantize smollm2 small.gguf --max-ppl-loss 1% --calibration text.txt"
TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS")


def command(
    source: Annotated[str, typer.Argument(help="Catalogue name, .gguf file, Hugging Face folder or hub repo id.")],
    out: Annotated[Path, typer.Argument(help="The file to write; an old one is replaced once the new one is whole.")],
    type: Annotated[
        str | None, typer.Option(help=f"{', '.join(TYPES)}. K-types become their nearest where rows do not fit.")
    ] = None,
    max_mb: Annotated[
        float | None, typer.Option(min=0.001, max=1e9, help="Best model in a file of so many MB.")
    ] = None,
    max_ms: Annotated[
        float | None, typer.Option(min=0.001, max=1e9, help="Best model of so many ms a token, here.")
    ] = None,
    max_ppl_loss: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Smallest whose perplexity rises at most by this, as 1%.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="Text of the kind the model is for, UTF-8.")
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --calibration: keep here what was learned from the text, and take it from here."
        ),
    ] = None,
    learn: Annotated[int, typer.Option(min=2, help="Windows of 256 tokens to learn from.")] = 8,
    windows: Annotated[int, typer.Option(min=2, help="Windows of 512 tokens to measure perplexity on.")] = 16,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Quantises a model: each matrix by what its errors cost. Exactly one of --type and the three limits."""
    from millis.quantize.run import Quantizer

    target = _target(type, max_mb, max_ms, max_ppl_loss)
    if target.type is None and text is None:
        raise typer.BadParameter("a limit needs --calibration FILE, to know what errors cost")
    if importance is not None and text is None:
        raise typer.BadParameter("--importance keeps what is learned from a text; give --calibration FILE, too")
    if out.suffix != ".gguf":
        raise typer.BadParameter(f"{out}: the name must end in .gguf, or no command takes it for a model")
    with common.usage():
        files = [place(file) for file in (out, importance) if file is not None]
    if len(set(files)) < len(files):
        raise typer.BadParameter(f"--importance names {out}, which is to be the model; give another name")
    for file in files:
        if not file.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {file.parent} to write to")
    count = EngineConfig().threads if threads is None else threads
    with common.terminated_as_interrupted(), common.progress("reading") as progress:
        job = Quantizer(
            common.resolve(source), count, lambda stage, done, total: progress(done, total, description=stage)
        )
        if text is not None:
            job.calibrate(lines.read_text(text), learn, windows, importance)
        report = job.write(out, target)
    if json:
        common.print_json(asdict(report) | {"path": str(report.path)})
    else:
        _print(report)


def _target(type: str | None, max_mb: float | None, max_ms: float | None, loss: str | None) -> Target:
    from millis.models.tensor import GgmlType
    from millis.quantize.run import Target

    if sum(value is not None for value in (type, max_mb, max_ms, loss)) != 1:
        raise typer.BadParameter("give exactly one of --type, --max-mb, --max-ms and --max-ppl-loss")
    if type is not None and type.upper() not in TYPES:
        raise typer.BadParameter(f"--type {type!r} is not one of {', '.join(TYPES)}")
    return Target(
        type=None if type is None else GgmlType[type.upper()],
        max_bytes=None if max_mb is None else int(max_mb * 1e6),
        max_ms=max_ms,
        max_ppl_loss=None if loss is None else _share(loss),
    )


def _share(text: str) -> float:
    """0.01 of "1%" and of "0.01"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 10:
        raise typer.BadParameter(f"--max-ppl-loss must be a share above 0, as 1% or 0.01, not {text!r}")
    return value


def _print(report: Report) -> None:
    from rich.table import Table

    table = Table("tensor", "was", "is", "MB", "error", "cost", box=None)
    for row in report.rows:
        cost = f"{row['loss_nats']:.2e}" if "loss_nats" in row else ""
        error = f"{row['relative_error']:.2%}"
        table.add_row(row["name"], row["from"], row["type"], f"{row['bytes'] / 1e6:.2f}", error, cost)
    common.print_table(table)
    for line in _lines(report.measured):
        print(line)
    print(
        f"{report.path}: {report.file_bytes / 1e6:.1f} MB; the source's tensors take {report.source_bytes / 1e6:.1f} MB"
    )


def _lines(measured: dict[str, Any]) -> Iterator[str]:
    if "perplexity_loss" in measured:
        yield (
            f"perplexity {measured['source_perplexity']:.3f} of the source, {measured['perplexity_loss']:+.2%} here, "
            f"at most {measured['perplexity_loss_at_most']:+.2%} allowing for the sample"
        )
    elif "predicted_loss" in measured:
        yield f"predicted rise of perplexity {measured['predicted_loss']:.2%}"
    if "predicted_ms" in measured:
        yield (
            f"a token takes {measured['predicted_ms']:.2f} ms by prediction, {measured['measured_ms']:.2f} measured; "
            f"the source {measured['source_ms']:.2f}"
        )
