"""What millis bench serve prints for people: a table, then what a reader must know to believe it."""

from __future__ import annotations

from typing import Any

DETAIL = frozenset(
    "input_lens output_lens ttfts itls latencies start_times queue_times generated_texts errors deadlines_ms statuses "
    "finish_reasons_each".split()
)
LATE_MS = 2.0  # p99 of the load generator's lateness from which it is said


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """The result without its lists of single requests."""
    return result | {"runs": [{k: v for k, v in run.items() if k not in DETAIL} for run in result["runs"]]}


def show(result: dict[str, Any]) -> None:
    """One line for every load and server."""
    from rich.console import Console
    from rich.table import Table

    runs = result["runs"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = [column for column in COLUMNS if any(column[1](run) for run in runs)]
    for title, _ in columns:
        table.add_column(title, justify="left" if title == "server" else "right", no_wrap=True)
    last = None
    for run in runs:
        if last is not None and last != _load(run) and len(result["servers"]) > 1:
            table.add_row()
        last = _load(run)
        table.add_row(*(cell(run) for _, cell in columns))
    print(_heading(result))
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)  # where the terminal is too narrow, its lines wrap, and nothing is cut off
    for line in _remarks(result):
        print(line)


def _heading(result: dict[str, Any]) -> str:
    size = f"{result['prompt_tokens']} tokens" if result["prompt_tokens"] else f"{result['prompt_words']} words"
    asked = f"{size} in, {result['output_tokens']} tokens out" if result["output_tokens"] else "lengths of the trace"
    parts = [f"{result['trace']} arrivals", asked, result["endpoint"]]
    if result["shared_prefix_tokens"]:
        parts.append(f"shared prefix of {result['shared_prefix_tokens']} tokens")
    if result["deadline_ms"]:
        parts.append(f"deadline {result['deadline_ms']} ms")
    if result["slo_ms"]:
        parts.append("limits " + ", ".join(f"{name} {limit:g} ms" for name, limit in result["slo_ms"].items()))
    return ", ".join(parts) + "; latencies in ms from the scheduled arrival: p50/p99"


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = []
    for run in result["runs"]:
        where = f"{run['server']} at {_load(run)}"
        if run["refused"]:
            codes = ", ".join(f"{code} {count}" for code, count in run["refused_by_code"].items())
            times = _pair(run, "refused")
            lines.append(f"{where}: refused {codes}; told after {times} ms (p50/p99)")
        if run["errors_by_kind"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in run["errors_by_kind"].items())
            lines.append(f"{where}: errors: {kinds}")
        if run["without_usage"]:
            lines.append(f"{where}: {run['without_usage']} answers gave no usage; their pieces are counted as tokens")
        if (late := run["p99_lateness_ms"]) and late > LATE_MS:
            lines.append(
                f"{where}: the load generator was late by p99 {late:.1f} ms, at most {run['max_lateness_ms']:.1f} ms; "
                "latencies count that in"
            )
    if result["interrupted"]:
        lines.append("interrupted: these are the requests that had ended by then")
    return lines


def _load(run: dict[str, Any]) -> str:
    if run["max_concurrency"]:
        return f"{run['max_concurrency']} at once"
    rate = run["request_rate"] or run["offered_rate"]
    return f"{rate:.3g}/s"


def _pair(run: dict[str, Any], name: str) -> str:
    p50, p99 = run[f"p50_{name}_ms"], run[f"p99_{name}_ms"]
    return "" if p50 is None else f"{_ms(p50)}/{_ms(p99)}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %".replace("100.00", "100")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _count(value: int) -> str:
    return str(value) if value else ""


def _valid(run: dict[str, Any]) -> str:
    return f"{run['schema_valid']}/{run['schema_checked']}" if run["schema_checked"] else ""


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("load", _load),
    ("server", lambda run: run["server"]),
    ("sent", lambda run: str(run["num_prompts"])),
    ("good/s", lambda run: _number(run["goodput"])),
    ("in time", lambda run: _share(run["admitted_in_time"])),
    ("refused", lambda run: _count(run["refused"])),
    ("landed", lambda run: _count(run["landed"])),
    ("errors", lambda run: _count(run["failed"] - run["refused"])),
    ("valid", _valid),
    ("TTFT", lambda run: _pair(run, "ttft")),
    ("TPOT", lambda run: _pair(run, "tpot")),
    ("ITL", lambda run: _pair(run, "itl")),
    ("E2E", lambda run: _pair(run, "e2el")),
    ("tokens/s", lambda run: f"{run['output_throughput']:.0f}"),
)
