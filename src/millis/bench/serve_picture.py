"""Pictures of a load: goodput and the admitted in time over the load offered, first tokens as distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from millis.bench.picture import COLOURS, LIMIT_COLOUR, OUR_COLOUR, STYLE, pyplot, save

GRID = "#e5e7eb"
DASH = (0, (4, 2))
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85}  # behind numbers


def load_picture(result: dict[str, Any], path: Path) -> None:
    """Of a detailed result of `millis bench serve`. Needs the extra `bench` (matplotlib)."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        for i, name in enumerate(result["servers"]):
            runs = [run for run in result["runs"] if run["server"] == name]
            colour = OUR_COLOUR if i == 0 else COLOURS[(i - 1) % len(COLOURS)]
            _over_load(left, runs, _served, name, colour)
            _over_load(middle, runs, _in_time, name, colour)
            _first_tokens(right, runs, colour)
        _dress_goodput(left, result)
        _dress_shares(middle, result)
        _dress_first_tokens(right)
        if len(result["servers"]) > 1:
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=8)
        figure.suptitle(_title(result), fontsize=9)
        save(figure, path, plt)


def _load(run: dict[str, Any]) -> float:
    return float(run["max_concurrency"] or run["offered_rate"] or run["request_throughput"])


def _served(run: dict[str, Any]) -> float:
    """Good answers a second where something says what good is, otherwise whole ones."""
    return float(run["goodput"] if run["goodput"] is not None else run["completed"] / run["offered_s"])


def _in_time(run: dict[str, Any]) -> float | None:
    """The percentage of the admitted that came in time; without deadlines, of the requests that came whole."""
    if run["admitted_in_time"] is not None:
        return 100 * float(run["admitted_in_time"])
    return None if run["admitted"] == 0 and run["refused"] else 100 * float(run["completed"] / run["num_prompts"])


def _over_load(axes: Any, runs: list[dict[str, Any]], value: Any, name: str, colour: str) -> None:
    points = sorted((_load(run), found) for run in runs if (found := value(run)) is not None)
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
        for x, y in points if value is _in_time else []:
            if y < 99.995:
                axes.annotate(
                    f"{y:.3g}", (x, y), (0, 5), textcoords="offset points", ha="center", color=colour, bbox=BOX
                )


def _first_tokens(axes: Any, runs: list[dict[str, Any]], colour: str) -> None:
    """A line for each load, the heavier the darker, named at its median."""
    runs = sorted(runs, key=_load)
    for i, run in enumerate(runs):
        ttfts = 1e3 * np.sort([ttft for ttft in run["ttfts"] if ttft > 0])
        if not len(ttfts):
            continue
        share = np.arange(1, len(ttfts) + 1) / len(ttfts)
        strength = 0.35 + 0.65 * (i + 1) / len(runs)
        axes.step(ttfts, 100 * share, where="post", color=colour, alpha=strength, linewidth=1.4)
        if len(runs) > 1:
            height = 30 + 50 * i / (len(runs) - 1)
            at = ttfts[min(int(height / 100 * len(ttfts)), len(ttfts) - 1)]
            axes.annotate(
                f"{run['request_rate'] or _load(run):.3g}",
                (at, height),
                color=colour,
                fontsize=7,
                ha="center",
                va="center",
                bbox=BOX,
            )


def _dress_goodput(axes: Any, result: dict[str, Any]) -> None:
    runs = result["runs"]
    judged = any(run["goodput"] is not None for run in runs)
    axes.set(title="Good answers a second" if judged else "Answers a second", xlabel=_load_words(result))
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.1 * max([_served(run) for run in runs] + [1e-9]))
    if not any(run["max_concurrency"] for run in runs):
        top = max(_load(run) for run in runs)
        axes.plot((0, top), (0, top), color=LIMIT_COLOUR, linewidth=0.9, linestyle=DASH, zorder=1)
        axes.annotate(
            "as many as asked", (0.02, 0.97), xycoords="axes fraction", color=LIMIT_COLOUR, va="top", fontsize=8
        )
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def _dress_shares(axes: Any, result: dict[str, Any]) -> None:
    due = result["deadline_ms"] is not None
    axes.set(title="Of the admitted, in time (%)" if due else "Answered (%)", xlabel=_load_words(result))
    axes.set_xlim(left=0)
    axes.set_ylim(0, 109)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def _dress_first_tokens(axes: Any) -> None:
    axes.set(title="First token within (% of answers)", xlabel="milliseconds", xscale="log")
    axes.set_ylim(0, 103)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=GRID, linewidth=0.6)


def _load_words(result: dict[str, Any]) -> str:
    return "requests at once" if result["trace"] == "closed" else "requests offered a second"


def _title(result: dict[str, Any]) -> str:
    parts = [f"{result['trace']} arrivals"]
    if result["output_tokens"]:
        size = f"{result['prompt_tokens']} tokens" if result["prompt_tokens"] else f"{result['prompt_words']} words"
        parts.append(f"{size} in, {result['output_tokens']} tokens out")
    if result["deadline_ms"]:
        parts.append(f"deadline {result['deadline_ms'].replace('-', ' to ')} ms")
    parts += [f"{name.upper()} within {limit:g} ms" for name, limit in result["slo_ms"].items()]
    names = list(dict.fromkeys(run["model_id"] for run in result["runs"]))
    return f"{', '.join(names)}: {', '.join(parts)}"
