"""What millis bench prints for people: the limit first, then tables, then what was not run and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from millis.commands import common

LEFT = ("engine", "version", "weights", "kernel")  # columns of words


def show_engines(result: dict[str, Any]) -> None:
    """Of `millis bench engine`."""
    low, high = result["read_spread_gb_per_s"]
    weights, kv = result["bytes_per_token"] / 1e6, result["cache_bytes_per_token"] / 1e3
    print(
        f"{result['model']}, {result['threads']} threads, {result['isa']}: reads {result['read_gb_per_s']:.1f} GB/s "
        f"({low:.1f}–{high:.1f} in the rounds); a token reads {weights:.0f} MB of weights and {kv:.1f} kB for every "
        f"token before it: no faster than {result['limit_next_ms']:.2f} ms"
    )
    lengths = sorted({row["tokens"] for row in result["rows"]})
    for length in lengths:
        rows = [row for row in result["rows"] if row["tokens"] == length]
        print(f"\n{length} tokens before" + (f"; limit {rows[0]['next_limit_ms']:.2f} ms" if rows[0]["next"] else ""))
        titles = ["engine", "first ms", "min–max", "×", "next ms", "min–max", "×", "of limit", "same first"]
        _table(titles, [_engine_line(row) for row in rows])
    print("\n×: the engine's time over Millis's in the same run; same first: first tokens that are Millis's")
    print()
    titles = ["engine", "version", "import ms", "load ms: first", "cold", "warm", "peak MB", "share MB"]
    _table(titles, [_load_line(row) for row in result["loads"]])
    for row in result["loads"]:
        if row["kept_in_cache"] > 0.01:
            print(f"{row['engine']}: {100 * row['kept_in_cache']:.0f} % of its files stayed cached at the cold load")
    for name, reason in result["failed"].items():
        print(f"not run: {name}: {reason}")


def show_kernels(lines: Iterable[dict[str, Any]]) -> None:
    """Of `millis bench kernels`: each line as soon as it is measured."""
    head = None
    for line in lines:
        if head is None:
            print(f"roofline: reading at {line['read_gb_per_s']:.1f} GB/s, or the byte dots of a plain loop")
            head = f"{'weights':<10}{'shape':>14}{'rows':>6}  {'isa':<11}{'µs':>10}{'GB/s':>8}{'GFLOP/s':>10}"
            print(f"{head}{'share':>8}", flush=True)
        shape = f"{line['rows']}×{line['cols']}" + (f" @{line['depth']}" if "depth" in line else "")
        share = "" if line["share_of_roofline"] is None else f"{100 * line['share_of_roofline']:.0f} %"
        print(
            f"{line['format']:<10}{shape:>14}{line['activations']:>6}  {line['isa']:<11}{line['us']:>10.1f}"
            f"{line['gb_per_s']:>8.1f}{line['gflop_per_s']:>10.1f}{share:>8}",
            flush=True,
        )


def show_jitter(result: dict[str, Any]) -> None:
    """Of `millis bench jitter`."""
    print(
        f"{result['model']}, {result['threads']} threads, {result['isa']}: {result['steps']} decode steps "
        f"of one sequence, anew at {result['depth']} tokens"
    )
    reads = result["reads"]
    print(f"{'':<6}{'a step':>12}{'its p50':>9}   a plain read of {result['read_mib']} MiB, in turn with the steps")
    for name in ("p50", "p90", "p99", "p99.9", "max", "mean"):
        key = name.replace(".", "_") + "_ms"
        both = [f"{one[key]:>9.3f} ms{one[key] / one['p50_ms']:>8.2f}×" for one in (result, reads)]
        print(f"{name:<6}{both[0]}{both[1]:>22}")
    print(
        f"{common.count(result['slow_steps'], 'step')} took more than {result['slow_over_ms']:.3f} ms, "
        "1.5 times the median",
        end="",
    )
    causes = [f"{cause.replace('_', ' ')} {count}" for cause, count in result["slow_by_cause"].items()]
    print(": " + ", ".join(causes) if causes else "")
    common_ones = [f"{cause.replace('_', ' ')} {count}" for cause, count in result["all_by_cause"].items()]
    print(f"of all {result['steps']} steps: " + ", ".join(common_ones))
    for step in result["slowest"]:
        print(f"  {step['ms']:8.3f} ms at {step['depth']:>5} tokens: {', '.join(step['causes']).replace('_', ' ')}")


def show_adapters(result: dict[str, Any]) -> None:
    """Of `millis bench adapters`."""
    print(
        f"{result['model']}, {result['threads']} threads, {result['isa']}: "
        f"{result['adapters']} adapters of rank {result['rank']} on every matrix, {result['adapter_mb']:.1f} MB each"
    )
    titles = ["sequences, each with its own", "without ms", "with ms", "×", "answers as alone"]
    _table(titles, [_adapters_line(row) for row in result["rows"]])


def _adapters_line(row: Any) -> list[str]:
    alone = "" if row.alone is None else "yes" if row.alone else "no"
    return [str(row.sequences), f"{row.base_ms:.2f}", f"{row.adapters_ms:.2f}", f"{row.ratio:.2f}", alone]


def _engine_line(row: dict[str, Any]) -> list[str]:
    first, next_token = row["first"], row["next"]
    line = [row["engine"], f"{first['median_ms']:.1f}", f"{first['min_ms']:.1f}–{first['max_ms']:.1f}"]
    line.append(_number(row["first_over_millis"], "{:.2f}"))
    if next_token:
        line += [f"{next_token['median_ms']:.2f}", f"{next_token['min_ms']:.2f}–{next_token['max_ms']:.2f}"]
        line += [_number(row["next_over_millis"], "{:.2f}"), f"{100 * row['next_share_of_limit']:.0f} %"]
    else:
        line += ["", "", "", ""]
    return [*line, "" if row["same_first_token"] is None else f"{100 * row['same_first_token']:.0f} %"]


def _load_line(row: dict[str, Any]) -> list[str]:
    loads = [_number(row["load_ms"].get(kind), "{:.0f}") for kind in ("first", "cold", "warm")]
    memory = [f"{row['peak_rss_mb']:.0f}", f"{row['pss_mb']:.0f}"]
    return [row["engine"], row["version"], f"{row['import_ms']:.0f}", *loads, *memory]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(titles: list[str], lines: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in LEFT else "right")
    for line in lines:
        table.add_row(*line)
    common.print_table(table)


def show_speculation(found: dict[str, dict[str, float]]) -> None:
    """Tokens a second with guesses and without, kind by kind."""
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


def show_encoders(found: dict[str, Any]) -> None:
    """Milliseconds a text, engine by engine."""
    from rich.table import Table

    ours = found["engines"]["millis"]["texts"]
    table = Table(box=None, pad_edge=False)
    for title in ("engine", "words", "p50 ms", "p99 ms", "times Millis", "same labels"):
        table.add_column(title, justify="left" if title == "engine" else "right")
    for name, engine in found["engines"].items():
        for own, text in zip(ours, engine["texts"], strict=True):
            table.add_row(
                f"{name} {engine['version']}",
                f"{text['words']}",
                f"{text['p50_ms']:.3f}",
                f"{text['p99_ms']:.3f}",
                f"{text['p50_ms'] / own['p50_ms']:.2f}",
                f"{100 * engine['same_labels']:.0f} %",
            )
    common.print_table(table)
