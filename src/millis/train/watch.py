"""How a run is followed: a bar or plain lines, a TensorBoard log, and the loss curve as a picture."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from millis.train.loop import Point

_LINE_EVERY_S = 10.0  # where nobody watches a bar
_SMOOTHING = 0.9  # of the loss that is shown


class Watch:
    """Told of every update; everything it shows goes to standard error or into `folder`."""

    def __init__(self, folder: Path) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% · {task.fields[text]}"),
            console=console,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("training", total=1.0, text="")
        self._folder = folder
        self._board: Any = None
        self._smooth: float | None = None
        self._speed: float | None = None
        self._begin = (0.0, 0.0)  # share done and seconds when this process began
        self._last_line = time.monotonic()

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def start(self, done: float, step: int, history: list[Point]) -> None:
        """A run begins, or goes on after `step`; what a log holds of later steps is taken back."""
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1 if step else None)
        for point in history:
            self._smooth_in(point)
        self._bar.update(self._task, completed=done)
        self._begin = (done, 0.0)
        self._clock = time.monotonic()

    def step(self, point: Point, done: float, elapsed_s: float) -> None:
        """One update more; `done`: the share of the run, `elapsed_s`: all its seconds so far."""
        self._smooth_in(point)
        for name in ("loss", "lr", "tokens_s"):
            self._board.add_scalar(name, getattr(point, name), point.step)
        loss = math.nan if self._smooth is None else self._smooth
        text = f"step {point.step} · loss {loss:.4f} · {self._speed or 0:,.0f} tokens/s · {self._left(done)}"
        self._bar.update(self._task, completed=done, text=text)
        if not self._terminal and time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"{100 * done:3.0f}% · {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line beside the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def _smooth_in(self, point: Point) -> None:
        self._smooth = _smoothed(self._smooth, point.loss)
        self._speed = _smoothed(self._speed, point.tokens_s)

    def _left(self, done: float) -> str:
        share = done - self._begin[0]
        if share <= 0:
            return "…"
        left = (time.monotonic() - self._clock) / share * (1 - done)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def _smoothed(before: float | None, value: float) -> float | None:
    """The moving average with `value`; one that is not finite updated nothing, and counts for nothing."""
    if not math.isfinite(value):
        return before
    return value if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * value


def averages(losses: Sequence[float]) -> list[float]:
    """The moving average after each; NaN before the first that is finite."""
    found, smooth = list[float](), None
    for loss in losses:
        smooth = _smoothed(smooth, loss)
        found.append(math.nan if smooth is None else smooth)
    return found


def draw_losses(history: Sequence[Point], path: Path) -> None:
    """The loss of every step and its moving average, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [p.step for p in history], [p.loss for p in history]
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="each step")
    axes.plot(steps, averages(losses), color="#1f4e8c", linewidth=1.6, label="moving average")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    part.replace(path)
