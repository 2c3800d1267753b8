"""Pictures of measurements, written as .png or .svg. Needs the extra `bench` (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from millis.bench.engine import OURS
from millis.types import ModelError

OUR_COLOUR, LIMIT_COLOUR = "#c2410c", "#111827"
COLOURS = ("#2563eb", "#0d9488", "#7c3aed", "#a16207", "#64748b", "#be185d", "#4d7c0f", "#0891b2")
LABEL_STEP = 0.06  # of a panel's height: the least distance of two labels
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "millis"}


def pyplot() -> Any:
    """matplotlib.pyplot without a display, or a ModelError that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ModelError("a picture needs matplotlib; install it with: pip install 'millis[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def engines_picture(result: dict[str, Any], path: Path) -> None:
    """First and next token of every engine over the length before it; the limit of reading the weights beside them."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
        _lines(left, [row for row in result["rows"] if row["tokens"] in result["prompts"]], "first", [])
        limit = {row["tokens"]: row["next_limit_ms"] for row in result["rows"] if row["next"]}
        _lines(right, result["rows"], "next", sorted(limit.items()))
        left.set(title="Time to the first token", xlabel="prompt tokens", ylabel="milliseconds")
        right.set(title="Time of the next token", xlabel="tokens before it")
        figure.suptitle(
            f"{result['model']} on {result['threads']} threads ({result['isa']}), one request at a time; "
            "medians, bars from minimum to maximum",
            fontsize=9,
        )
        save(figure, path, plt)


def _lines(axes: Any, rows: Sequence[dict[str, Any]], what: str, limit: list[tuple[int, float]]) -> None:
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    others = [name for name in engines if name != OURS]
    axes.set(xscale="log", yscale="log")
    ends: list[tuple[float, str, str]] = []
    for name in engines:
        mine = [row for row in rows if row["engine"] == name and row[what]]
        if not mine:
            continue
        colour = OUR_COLOUR if name == OURS else COLOURS[others.index(name) % len(COLOURS)]
        x = [row["tokens"] for row in mine]
        y = [row[what]["median_ms"] for row in mine]
        low = [row[what]["median_ms"] - row[what]["min_ms"] for row in mine]
        high = [row[what]["max_ms"] - row[what]["median_ms"] for row in mine]
        weight = 2.4 if name == OURS else 1.2
        axes.errorbar(x, y, (low, high), color=colour, linewidth=weight, marker="o", markersize=3, elinewidth=0.8)
        ends.append((y[-1], name, colour))
    if limit:
        axes.plot(*zip(*limit, strict=True), color=LIMIT_COLOUR, linewidth=1.2, linestyle=(0, (4, 2)))
        ends.append((limit[-1][1], "memory limit", LIMIT_COLOUR))
    lengths = sorted({row["tokens"] for row in rows if row[what]})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(_nice_ticks(axes))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    _label(axes, ends)


def _nice_ticks(axes: Any) -> Any:
    """1, 2, 5 of each decade, or fewer over many decades."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    return LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,))


def _label(axes: Any, ends: Iterable[tuple[float, str, str]]) -> None:
    """Names at the lines' right ends, moved apart where they would touch."""
    low, high = (math.log(y) for y in axes.get_ylim())
    lines = sorted(((math.log(y) - low) / (high - low), name, colour) for y, name, colour in ends)
    heights = apart([height for height, _, _ in lines], LABEL_STEP)
    for height, (_, name, colour) in zip(heights, lines, strict=True):
        bold = "bold" if name == OURS else "normal"
        where: dict[str, Any] = {"xy": (1.01, height), "xycoords": "axes fraction", "va": "center"}
        axes.annotate(name, color=colour, fontweight=bold, annotation_clip=False, **where)


def apart(heights: Sequence[float], step: float) -> list[float]:
    """Rising heights, moved to lie `step` apart and at most 1: up from the lowest, then down from the top."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + step) if found else height)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], 1.0 if i == len(found) - 1 else found[i + 1] - step)
    return found


def jitter_picture(result: dict[str, Any], path: Path) -> None:
    """How many steps took how long, on a logarithmic axis so that a single slow one is seen."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
        edges, counts = result["histogram"]["edges_ms"], result["histogram"]["counts"]
        axes.stairs(counts, edges, fill=True, color=OUR_COLOUR, alpha=0.85)
        axes.set(xscale="log", yscale="log", xlabel="milliseconds a token", ylabel="steps")
        axes.set_ylim(0.7, 30 * max(counts))  # room for the marks' names
        marks = (("p50", "p50_ms"), ("p99", "p99_ms"), ("p99.9", "p99_9_ms"), ("max", "max_ms"))
        for height, (name, key) in enumerate(marks):
            axes.axvline(result[key], color=LIMIT_COLOUR, linewidth=0.9, linestyle=(0, (4, 2)))
            text = f" {name} {result[key]:.2f} ms"
            axes.annotate(text, (result[key], 0.97 - 0.09 * height), xycoords=("data", "axes fraction"), va="top")
        axes.minorticks_off()
        low, high = edges[0], edges[-1]
        ticks = [v for v in _marks() if low <= v <= high] or [low, high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        title = f"{result['model']}: {result['steps']} decode steps on {result['threads']} threads ({result['isa']})"
        axes.set_title(title, fontsize=9)
        save(figure, path, plt)


def _marks() -> list[float]:
    return [digit * 10.0**power for power in range(-3, 6) for digit in (1, 1.5, 2, 3, 5, 7)]


def save(figure: Any, path: Path, plt: Any) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)
