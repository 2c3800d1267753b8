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
    context = max(lengths) + new_tokens + 1
    lm = common.load(model, threads=threads, context=context, speculation="off")  # random ids invite repetition
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


@app.command(epilog="Example: millis bench speculation -m qwen2.5-1.5b --draft qwen2.5-0.5b")
def speculation(
    model: common.Model = "smollm2",
    draft: common.Draft = None,
    kinds: Annotated[str, typer.Option(help="Of prompts: chat, code, edit, extract.")] = "chat,code,edit,extract",
    new_tokens: Annotated[int, typer.Option(min=2, max=4096, help="Longest answer in tokens.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Times each prompt is answered both ways.")] = 1,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of each kind; default: all.")] = None,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Tokens a second with guesses and without, in turn, and whether the greedy answers are the same."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from millis.bench.speculation import PROMPTS, measure, summary

    names = [kind.strip() for kind in kinds.split(",")]
    if unknown := sorted(set(names) - set(PROMPTS)):
        raise typer.BadParameter(f"--kinds knows {', '.join(PROMPTS)}, not {', '.join(map(repr, unknown))}")
    lm = common.load(model, threads=threads, context=2048, draft=draft)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        total = 2 * rounds * sum(len(PROMPTS[kind][:prompts]) for kind in names)
        task = progress.add_task("measuring", total=total)
        rows = measure(
            lm, names, new_tokens=new_tokens, rounds=rounds, limit=prompts, advance=lambda: progress.advance(task)
        )
    found = summary(rows)
    if json:
        common.print_json({"model": model, "draft": draft, "summary": found, "rows": [asdict(row) for row in rows]})
    else:
        _print_speculation(found)


def _print_speculation(found: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in (
        "prompts",
        "",
        "plain tokens/s",
        "guessing",
        "ratio",
        "median",
        "least",
        "guesses right",
        "same text",
    ):
        table.add_column(title, justify="left" if title == "prompts" else "right")
    for kind, row in found.items():
        table.add_row(
            kind,
            f"{row['prompts']:.0f}",
            f"{row['plain_tokens_per_s']:.1f}",
            f"{row['speculated_tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['median_ratio']:.2f}",
            f"{row['least_ratio']:.2f}",
            f"{100 * row['right']:.0f} %",
            f"{row['same']:.0f}",
        )
    common.print_table(table)
