"""millis bench: numbers, with the machine's limit first."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from millis import _native
from millis.commands import common

EXAMPLE = "millis bench engine --peers transformers"

app = typer.Typer(help="Numbers: speed on this machine, beside other engines.", epilog=f"Example: {EXAMPLE}")


@app.callback()
def _group() -> None:
    """Numbers: speed on this machine, beside other engines."""


@app.command(epilog=f"Example: {EXAMPLE}")
def engine(
    model: common.Model = "smollm2",
    peers: Annotated[
        str, typer.Option(help="Others to measure beside: transformers, llama.cpp; comma-separated.")
    ] = "",
    prompts: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "16,128,512",
    new_tokens: Annotated[int, typer.Option(min=2, max=4096, help="Tokens decoded after each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measured rounds; one more warms up.")] = 5,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Milliseconds to the first and the next token, one request at a time, beside the machine's limit."""
    from rich.console import Console
    from rich.progress import Progress

    from millis.bench.engine import Millis, measure, report
    from millis.bench.peers import make

    lengths = _lengths(prompts)
    lm = common.load(model, threads=threads, context=max(lengths) + new_tokens + 1)
    engines = [Millis(lm), *make([name.strip() for name in peers.split(",") if name.strip()], lm)]
    weight_bytes = lm.runner.weight_bytes
    bandwidth = _native.read_bandwidth(max(64, weight_bytes >> 20), lm.config.threads)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(engines) * (rounds + 1) * len(lengths))
        rows = measure(
            engines,
            lengths,
            vocab=lm.runner.vocab,
            new_tokens=new_tokens,
            rounds=rounds,
            advance=lambda: progress.advance(task),
        )
    result = {
        "model": model,
        "threads": lm.config.threads,
        "isa": lm.runner.isa,
        **report(rows, weight_bytes, bandwidth),
    }
    if json:
        common.print_json(result)
    else:
        _print(result)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--prompts must be whole numbers with commas between, not {text!r}") from None
    if not all(1 <= length <= 1 << 20 for length in lengths):
        raise typer.BadParameter(f"--prompts must be positive, not {text!r}")
    return lengths


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    limit = result["limit_next_ms"]
    print(
        f"{result['model']}, {result['threads']} threads, {result['isa']}: a token reads "
        f"{result['bytes_per_token'] / 1e6:.0f} MB; at {result['read_gb_per_s']:.1f} GB/s no faster than {limit:.2f} ms"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("prompt", "engine", "first ms", "min–max", "next ms", "min–max", "of limit", "first ×", "next ×"):
        table.add_column(title, justify="left" if title == "engine" else "right")
    for row in result["rows"]:
        table.add_row(
            str(row["prompt_tokens"]),
            row["engine"],
            f"{row['first_ms']:.1f}",
            "{:.1f}–{:.1f}".format(*row["first_spread_ms"]),
            f"{row['next_ms']:.2f}",
            "{:.2f}–{:.2f}".format(*row["next_spread_ms"]),
            f"{100 * limit / row['next_ms']:.0f} %",
            f"{row['first_over_millis']:.2f}",
            f"{row['next_over_millis']:.2f}",
        )
    common.print_table(table)
    print("first × and next ×: the engine's time over Millis's in the same run")
