"""One run in its folder: begin, resume or refuse; train; evaluate; export whole or not at all; report.

The folder OUT holds the model; OUT/train what belongs to the run: settings.json, checkpoints/, tensorboard/, loss.png,
skipped.jsonl, exported.json (the names of what was put into OUT) and report.json, written last, which says that the
run is done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from millis.samples.read import Skipped
from millis.train.checkpoints import Checkpoints
from millis.train.loop import Job, Loop, Options, Outcome
from millis.train.settings import Settings
from millis.train.watch import Watch, draw_losses
from millis.types import RequestError

Report = dict[str, Any]

GGUF = "model.gguf"  # made of the model when that is there; the same command makes it again
_EXPORTED = "exported.json"
_OURS = (  # what a run makes in OUT/train
    "settings.json", "exported.json", "report.json", "settings.part", "exported.part", "report.part", "skipped.jsonl",
    "checkpoints", "tensorboard", "tokenizer", "export", "loss.png", "loss.part.png",
)  # fmt: skip
_LAST = ("config.json", "adapter_config.json")  # files that make a folder a model: moved into place last


class Task(Job, Protocol):
    """A job that can also say how good it is, and leave its model."""

    def evaluate(self) -> dict[str, float]: ...
    def export(self, folder: Path) -> list[str]:
        """Writes the model into `folder`; returns what was written, in words."""


class Run:
    """The folder of one run, locked for as long as this object is used as a context."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.folder, self.settings = out, out / "train", settings
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self._unused = False  # made ready, and nothing trained: unusable data leaves nothing behind

    def begin(self, resume: bool | None) -> dict[str, Any] | None:
        """Makes the folder ready. The report of a run that is done already, None where there is something to train.

        `resume`: True demands a run to go on with, False starts over, None goes on where the settings are the same. A
        run of other settings that failed before its first checkpoint has nothing to lose, and is replaced.
        RequestError: another run, or something else, is in the way.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        before = _read(self.folder / "settings.json")
        if before is None:
            others = self._others()
            if others and resume is not False:
                raise RequestError(
                    f"{self.out} is not empty (it holds {others[0]}); give another --out, or --no-resume"
                )
            if resume:
                raise RequestError(f"{self.out} holds no run to resume")
            self._clear()  # checkpoints that no settings belong to are no run's
        elif resume is False:
            self._clear()
        elif (different := self.settings.differences(before)) and not resume and not self._has_something():
            self._clear()
        elif different == ["base"]:
            raise RequestError(
                f"the files of {self.settings.model} have changed since the run in {self.out} began; "
                "bring them back, give another --out, or --no-resume to start over"
            )
        elif different:
            raise RequestError(
                f"{self.out} holds a run with other settings ({', '.join(different)}); "
                "give the same again, another --out, or --no-resume to start over"
            )
        elif (report := _read(self.folder / "report.json")) is not None:
            if gone := [name for name in exported(self.out) - {GGUF} if not (self.out / name).exists()]:
                raise RequestError(
                    f"the run in {self.out} was done, but {gone[0]} of its model has gone; --no-resume trains it again"
                )
            return report
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "settings.json", asdict(self.settings))
        self._unused = not self._has_something()
        return None

    def train(
        self, task: Task, options: Options, skipped: Skipped, extra: Callable[[Outcome], dict[str, Any]]
    ) -> Report:
        """Trains, evaluates and exports; returns the report, which also lies in report.json."""
        self._unused = False
        if skipped.count:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped.rows)
            (self.folder / "skipped.jsonl").write_text(lines, encoding="utf-8")
        with Watch(self.folder) as watch:
            for line in skipped.said():
                watch.say(line)
            if skipped.count:
                watch.say(f"the rows that were skipped: {self.folder / 'skipped.jsonl'}")
            loop = Loop(task, options, self.checkpoints, watch)
            outcome = loop.run()
            watch.say("evaluating and writing the model")
            begin = time.monotonic()
            quality = task.evaluate()
        draw_losses(outcome.history, self.folder / "loss.png")
        written = self._export(task)
        report = {
            "out": str(self.out),
            "written": written,
            "steps": outcome.steps,
            "epochs": round(outcome.epochs, 3),
            "tokens": outcome.tokens,
            "seconds": round(outcome.elapsed_s, 2),
            "evaluation_seconds": round(time.monotonic() - begin, 2),
            "tokens_s": round(outcome.tokens / max(1e-9, outcome.elapsed_s), 1),
            "loss": _last_loss(outcome),
            "resumed_at": outcome.resumed_at,
            "skipped_rows": skipped.count,
            "quality": quality,
            **extra(outcome),
        }
        write_json(self.folder / "report.json", report)
        self.checkpoints.clear()
        return report

    def _export(self, task: Task) -> list[str]:
        """Into a folder beside, then file by file into place; what an earlier run had put there goes."""
        staged = self.folder / "export"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            written = task.export(staged)
            mode = staged.stat().st_mode & 0o666
            for path in staged.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # the library of safetensors lets nobody else read its files
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise RequestError(
                f"cannot write the model to {self.out}: {reason}; free some space there, "
                "then give the same command again"
            ) from None
        new = {path.name for path in staged.iterdir()}
        old = exported(self.out) - new
        note_exported(self.out, old | new)
        for name in old:
            _remove(self.out / name)
        for path in sorted(staged.iterdir(), key=lambda p: (p.name in _LAST, p.name)):
            _remove(self.out / path.name, only_folders=True)
            os.replace(path, self.out / path.name)
        note_exported(self.out, new)
        staged.rmdir()
        return written

    def _has_something(self) -> bool:
        """Whether the earlier run left a checkpoint, or its report."""
        return any(self.checkpoints.paths()) or (self.folder / "report.json").exists()

    def _others(self) -> list[str]:
        """What the folder holds that is of no run: a user's own `train` is told from ours by what it holds."""
        found = [path.name for path in self.out.iterdir() if path.name not in ("train", ".lock")]
        if self.folder.is_dir():
            return found + [f"train/{path.name}" for path in self.folder.iterdir() if path.name not in _OURS]
        return found + ["train"] * self.folder.exists()

    def _clear(self) -> None:
        """Takes away what the earlier run left of itself; its model is replaced when this one is done."""
        if not self.folder.is_dir():
            return
        names = exported(self.out)
        for name in _OURS:
            _remove(self.folder / name)
        if names:
            note_exported(self.out, names)
        with suppress(OSError):  # one that holds something stays
            self.folder.rmdir()

    def __enter__(self) -> Run:
        self._made = [path for path in (self.out, *self.out.parents) if not path.exists()]
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.out / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(f"another process trains into {self.out}; wait for it, or give another --out") from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._unused:
            self._clear()
        self._lock.release()
        (self.out / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # one that holds something stays
            for path in self._made:
                path.rmdir()


def exported(out: Path) -> set[str]:
    """The names of files and folders in `out` that a run has put there."""
    names = (_read(out / "train" / _EXPORTED) or {}).get("names", [])
    plain = (name for name in names if isinstance(name, str) and Path(name).name == name)
    return {name for name in plain if name not in ("", "..", "train", ".lock")}


def note_exported(out: Path, names: Iterable[str]) -> None:
    """Says which names those are."""
    write_json(out / "train" / _EXPORTED, {"names": sorted(names)})


def _remove(path: Path, only_folders: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not only_folders:
        path.unlink(missing_ok=True)


def _last_loss(outcome: Outcome) -> float | None:
    """The mean over the last twentieth of the run."""
    tail = [p.loss for p in outcome.history[-max(1, len(outcome.history) // 20) :] if math.isfinite(p.loss)]
    return sum(tail) / len(tail) if tail else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
