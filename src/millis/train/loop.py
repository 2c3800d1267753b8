"""The training loop every task shares: update, report, keep a checkpoint, go on where a killed run ended.

A task is a `Job`: a model, the samples of each step, and a loss. All that the next update depends on (weights,
optimiser, averaged weights, random state, place in the data, time used) is in a checkpoint, so that a run that was
killed and resumed makes the updates it would have made.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from millis.train.batches import Micro, Step
from millis.train.checkpoints import Checkpoints, State
from millis.train.schedule import progress, rate
from millis.types import ModelError

_MAX_BAD_STEPS = 10  # in a row, without a finite loss: the run has diverged
_CHECKPOINT_SHARE = 0.03  # of the time may go into checkpoints
_MIN_CHECKPOINT_S = 60.0
_AVERAGE_EVERY = 4  # updates: walking through all weights each time would cost a few percent


class Job(Protocol):
    """What one task trains."""

    model: nn.Module

    def epoch(self, number: int) -> list[Step]:
        """The steps of an epoch; the same for the same number, whenever it is asked."""

    def loss(self, micro: Micro) -> Tensor:
        """The mean loss of these samples, with its gradient."""

    def weight(self, micro: Micro) -> float:
        """How many targets that mean is taken over."""

    def tokens(self, micro: Micro) -> int:
        """Tokens of these samples, without padding."""

    def rate_of(self, name: str) -> float:
        """The factor of the learning rate for the parameter `name`."""


class Watcher(Protocol):
    """Who is told how a run goes."""

    def start(self, done: float, step: int, history: list[Point]) -> None: ...
    def step(self, point: Point, done: float, elapsed_s: float) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to optimise. `epochs`, `steps`, `time_limit_s`: the first to be reached ends the run; one must be given.

    With `rounds`, each begins where the first did and goes through the data in another order, for as many epochs or
    steps and its share of the time; the mean of what they end with is kept: nearly what all of them would say together,
    at the cost of one (model soups; Wortsman et al., 2022).
    """

    lr: float
    epochs: float | None = None
    steps: int | None = None
    time_limit_s: float | None = None
    warmup: float = 0.06  # share of the run
    floor: float = 0.0  # the last learning rate, as a share of `lr`
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float = 1.0  # of the gradient's norm
    ema: float = 0.0  # decay of the averaged weights, 0 for none; they are what is kept in the end
    bf16: bool = False
    rounds: int = 1
    seed: int = 0
    checkpoint_steps: int | None = None  # None: by time, so that checkpoints take a few percent of it


@dataclass(frozen=True, slots=True)
class Point:
    """One update. `tokens_s`: tokens a second, without padding."""

    step: int
    loss: float
    lr: float
    tokens: int
    tokens_s: float


@dataclass(slots=True)
class Outcome:
    """A run that ended: `history` has every update, those before a resumption too."""

    steps: int
    epochs: float
    tokens: int
    elapsed_s: float
    history: list[Point]
    resumed_at: int | None = None


@dataclass(slots=True)
class _Place:
    """Where a run is; all of it goes into a checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # the next step of the epoch
    elapsed_s: float = 0.0
    tokens: int = 0
    bad: int = 0  # updates in a row that were left out
    round: int = 0
    round_step: int = 0  # with which that round began
    round_s: float = 0.0
    history: list[list[float]] = field(default_factory=list)

    def points(self) -> list[Point]:
        return [Point(int(s), loss, lr, int(n), speed) for s, loss, lr, n, speed in self.history]


class Loop:
    """One run of a job, from its last checkpoint if there is one."""

    def __init__(self, job: Job, options: Options, checkpoints: Checkpoints, watcher: Watcher) -> None:
        self._job, self._options, self._checkpoints, self._watcher = job, options, checkpoints, watcher
        self._place = _Place()
        self._trained = {n: p for n, p in job.model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            _groups(job, self._trained, options), lr=options.lr, betas=options.betas, eps=options.eps, fused=True
        )
        self._average = self._copied() if options.ema else {}
        self._first = self._copied() if options.rounds > 1 else {}
        self._mean = {n: torch.zeros_like(p) for n, p in self._first.items()}  # of all rounds, those that ended in it
        self._stop = False
        self._last_save = time.monotonic()
        self._save_s = 0.0

    def run(self) -> Outcome:
        """Trains to the end. KeyboardInterrupt after Ctrl-C or SIGTERM, with a checkpoint of the last update.

        ModelError: weights that are not finite, or a loss that is not, time and again.
        """
        for name, parameter in self._job.model.named_parameters():
            if not bool(torch.stack(parameter.detach().aminmax()).isfinite().all()):
                raise ModelError(
                    f"the model's weights hold NaN or infinity ({name}); its file is damaged, use another -m"
                )
        torch.manual_seed(self._options.seed)
        resumed_at = self._resume()
        options, place = self._options, self._place
        first = self._job.epoch(place.epoch)
        steps = _total_steps(options, len(first))
        self._watcher.start(self._all_done(steps), place.step, place.points())
        self._job.model.train()
        with _stop_at_signals(self):
            self._round(first, steps)
            while place.round + 1 < options.rounds:
                self._begin_round()
                self._round(self._job.epoch(place.epoch), steps)
        if place.bad == place.step > 0:
            raise ModelError(f"the loss was not finite at any of {place.step} steps; train with a lower --lr")
        if place.elapsed_s > _MIN_CHECKPOINT_S:
            self._save()  # what follows, evaluation and export, may take long and be killed too
        self._end_round()
        if self._mean:
            self._set(self._mean)
        per_epoch = max(1, len(first))
        return Outcome(
            steps=place.step,
            epochs=place.epoch + place.position / per_epoch,
            tokens=place.tokens,
            elapsed_s=place.elapsed_s,
            history=place.points(),
            resumed_at=resumed_at,
        )

    def stop_soon(self) -> None:
        """The run ends after the update under way; a second call ends it at once."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    def _done(self, steps: int | None, more: float = 0.0) -> float:
        """How much of the round is done, and `more` steps."""
        place, limit_s = self._place, self._options.time_limit_s
        limit_s = None if limit_s is None else limit_s / self._options.rounds
        return progress(place.step + more - place.round_step, steps, place.elapsed_s - place.round_s, limit_s)

    def _all_done(self, steps: int | None) -> float:
        return (self._place.round + self._done(steps)) / self._options.rounds

    def _round(self, current: list[Step], steps: int | None) -> None:
        """What is left of a round."""
        for step in self._steps(current, steps):
            begin = time.monotonic()
            self._update(step, steps)
            self._place.elapsed_s += time.monotonic() - begin
            self._save_where_due()

    def _begin_round(self) -> None:
        """Ends a round, and goes back to where it began."""
        self._end_round()
        self._set(self._first)
        self._average = self._copied() if self._average else {}
        self._optimizer.state.clear()
        place = self._place
        place.round, place.round_step, place.round_s = place.round + 1, place.step, place.elapsed_s
        place.epoch, place.position = place.epoch + 1, 0

    def _end_round(self) -> None:
        if self._average:
            self._set(self._average)
        for name, value in self._mean.items():
            value.add_(self._trained[name].detach(), alpha=1 / self._options.rounds)

    def _copied(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(values[name])

    def _steps(self, current: list[Step], steps: int | None) -> Iterator[Step]:
        place = self._place
        while self._done(steps) < 1:
            if place.position >= len(current):
                place.epoch, place.position = place.epoch + 1, 0
                current = self._job.epoch(place.epoch)
            place.position += 1
            yield current[place.position - 1]
            if self._stop:
                self._save()
                self._watcher.say(f"stopped after step {place.step}; the same command goes on from there")
                raise KeyboardInterrupt

    def _update(self, step: Step, steps: int | None) -> None:
        """One optimiser step over all micro-batches, each weighted by its share of the targets."""
        options, place, begin = self._options, self._place, time.monotonic()
        factor = rate(self._done(steps, 0.5), options.warmup, options.floor)  # in the middle of this update
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * group["scale"] * factor
        total = sum(self._job.weight(micro) for micro in step)
        loss = 0.0
        for micro in step:
            with autocast(options.bf16):
                part = self._job.loss(micro) * (self._job.weight(micro) / total)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(self._trained.values(), options.clip)
        if math.isfinite(loss) and bool(norm.isfinite()):
            self._optimizer.step()
            self._update_average()
            place.bad = 0
        else:
            self._count_bad_step(loss)
        self._optimizer.zero_grad(set_to_none=True)
        tokens = sum(self._job.tokens(micro) for micro in step)
        place.step, place.tokens = place.step + 1, place.tokens + tokens
        speed = tokens / max(1e-9, time.monotonic() - begin)
        point = Point(place.step, loss, options.lr * factor, tokens, speed)
        place.history.append([point.step, point.loss, point.lr, point.tokens, point.tokens_s])
        self._watcher.step(point, self._all_done(steps), place.elapsed_s + time.monotonic() - begin)

    def _count_bad_step(self, loss: float) -> None:
        self._place.bad += 1
        self._watcher.say(f"step {self._place.step + 1}: the loss is {loss}; its update was left out")
        if self._place.bad >= _MAX_BAD_STEPS:
            raise ModelError(f"the loss was not finite {_MAX_BAD_STEPS} times in a row; train with a lower --lr")

    def _update_average(self) -> None:
        """Exponential moving average, with less memory in the beginning (Polyak and Juditsky, 1992)."""
        step = self._place.step - self._place.round_step
        if self._average and step % _AVERAGE_EVERY == 0:
            done = step // _AVERAGE_EVERY
            decay = min(self._options.ema**_AVERAGE_EVERY, (1 + done) / (10 + done))
            averages, values = list(self._average.values()), [p.detach() for p in self._trained.values()]
            torch._foreach_lerp_(averages, values, 1 - decay)

    def _save_where_due(self) -> None:
        every = self._options.checkpoint_steps
        since = time.monotonic() - self._last_save
        due_s = max(_MIN_CHECKPOINT_S, self._save_s / _CHECKPOINT_SHARE)
        if self._place.step % every == 0 if every else since > due_s:
            self._save()

    def _save(self) -> None:
        begin = time.monotonic()
        self._checkpoints.save(self._place.step, self._state())
        self._last_save = time.monotonic()
        self._save_s = self._last_save - begin

    def _state(self) -> State:
        place = self._place
        return {
            "place": {f.name: getattr(place, f.name) for f in fields(place) if f.name != "history"},
            "history": torch.tensor(place.history, dtype=torch.float64),
            "model": {name: p.detach() for name, p in self._trained.items()},
            "average": self._average,
            "mean": self._mean,
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def _resume(self) -> int | None:
        state, damaged = self._checkpoints.load()
        for path in damaged:
            where = "from the beginning, at step 0" if state is None else f"after step {state['place']['step']}"
            self._watcher.say(f"{path.name} cannot be read and is removed; going on {where}")
        if state is None:
            return None
        self._set(state["model"])
        for values, kept in ((self._average, state["average"]), (self._mean, state["mean"])):
            for name, value in values.items():
                value.copy_(kept[name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._place = _Place(**state["place"], history=state["history"].reshape(-1, 5).tolist())
        torch.set_rng_state(state["random"])
        return self._place.step


def autocast(bf16: bool) -> AbstractContextManager[Any]:
    """bfloat16 matrix products over float32 weights, or nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


def _total_steps(options: Options, per_epoch: int) -> int | None:
    """The steps after which a run ends, None where only time ends it."""
    ends = [] if options.steps is None else [options.steps]
    if options.epochs is not None:
        ends.append(max(1, round(options.epochs * per_epoch)))
    assert ends or options.time_limit_s, "a run needs an end"
    return min(ends) if ends else None


def _groups(job: Job, trained: dict[str, nn.Parameter], options: Options) -> list[dict[str, Any]]:
    """Only matrices decay: norms and biases have no reason to, and an embedding's rows that no text uses stay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decays = parameter.dim() >= 2 and "embed" not in name
        groups.setdefault((options.weight_decay if decays else 0.0, job.rate_of(name)), []).append(parameter)
    return [{"params": ps, "weight_decay": decay, "scale": scale} for (decay, scale), ps in groups.items()]


@contextmanager
def _stop_at_signals(loop: Loop) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run between two updates. Only the main thread may set handlers; others go without."""

    def stop(number: int, frame: FrameType | None) -> None:
        loop.stop_soon()

    previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, stop)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
