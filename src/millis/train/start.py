"""From what a user asked to a finished run: defaults of each task, the job, the run in its folder, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from millis.models.fingerprint import fingerprint
from millis.samples.read import Skipped
from millis.train import chat, classify, distil, embed, lm, scratch
from millis.train.base import Base
from millis.train.loop import Options, Outcome
from millis.train.run import Run, Task
from millis.train.settings import Settings, fingerprints
from millis.train.speed import speeds
from millis.types import ModelError, PullError, RequestError

# What suits each task where nothing else is said.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "classify": {
        "model": "minilm", "lr": 1.5e-4, "epochs": 12.0, "batch": 32, "max_tokens": 128, "head_lr": 6.7,
        "layer_decay": 0.9, "label_smoothing": 0.1, "ema": 0.995, "dropout": 0.1, "token_dropout": 0.05,
    },
    "embed": {"model": "minilm", "lr": 5e-5, "epochs": 3.0, "batch": 64, "max_tokens": 128, "layer_decay": 0.9},
    "lm": {"model": "smollm2", "lr": 3e-5, "epochs": 1.0, "batch": 8, "max_tokens": 512},
    "chat": {"model": "smollm2", "lr": 3e-5, "epochs": 3.0, "batch": 16, "max_tokens": 1024},
    "distil": {"lr": 3e-4, "epochs": 1.0, "batch": 16, "max_tokens": 256},
}  # fmt: skip
_SCRATCH = {
    "lr": 2e-3, "epochs": 1.0, "batch": 32, "max_tokens": 256, "weight_decay": 0.1, "warmup": 0.04,
    "micro_tokens": 4096,
}  # fmt: skip
_LORA_LR = 3e-4
# Options that mean something for some tasks only; for another they are refused, not ignored.
_ONLY = {
    "layers": ("classify",), "freeze_layers": ("classify",), "token_dropout": ("classify",),
    "label_smoothing": ("classify",), "dropout": ("classify",), "label_column": ("classify",),
    "elsewhere": ("classify",), "ngrams": ("classify",), "rounds": ("classify", "embed"), "alpha": ("lm", "chat"),
    "temperature": ("embed",), "text_column": ("classify", "lm", "distil"), "rank": ("lm", "chat"), "shape": ("lm",),
    "parameters": ("lm",), "vocab": ("lm",),
}  # fmt: skip

Prepare = Callable[[Base, Settings, Skipped, Sequence[Path], Sequence[Path]], Task]
_TASKS: Mapping[str, Prepare] = {
    "classify": classify.prepare,
    "embed": embed.prepare,
    "lm": lm.prepare,
    "chat": chat.prepare,
}


def settings_of(task: str, data: Sequence[Path], held: Sequence[Path], given: Mapping[str, Any]) -> Settings:
    """`given`: settings as the user chose them, None where nothing was said. RequestError for what does not fit."""
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if task not in _ONLY.get(name, (task,)):
            flag = {"parameters": "params"}.get(name, name).replace("_", "-")
            raise RequestError(f"--{flag} has no meaning for --task {task}, only for {' and '.join(_ONLY[name])}")
    new = chosen.get("shape") is not None
    if new and (chosen.get("model") or chosen.get("finetune") == "lora"):
        raise RequestError("--shape starts from nothing; it goes with neither -m nor --finetune lora")
    if not new and {"parameters", "vocab"} & chosen.keys():
        raise RequestError("--params and --vocab shape a new model; give --shape llama too")
    values: dict[str, Any] = dict(_SCRATCH) | {"model": None, "parameters": 15_000_000, "vocab": 8000} if new else {}
    values = values or dict(DEFAULTS[task])
    if chosen.get("finetune") == "lora":
        if task not in ("lm", "chat"):
            raise RequestError(f"--finetune lora is for lm and chat, not for {task}")
        values["lr"] = _LORA_LR
    elif "rank" in chosen:
        raise RequestError("--rank is an adapter's; give --finetune lora too")
    if held and chosen.get("eval_split"):
        raise RequestError("--eval names what to evaluate on, --eval-split holds out a share of the data; give one")
    if task == "embed" and chosen.get("batch") == 1:
        raise RequestError("--batch 1 leaves a pair no other to be told from; give --batch 2 or more")
    if chosen.get("time_limit_s") and "epochs" not in chosen:
        values["epochs"] = None  # the time is to be used
    elif chosen.get("steps") and "epochs" not in chosen:
        values["epochs"] = None
    if "micro_tokens" not in values.keys() | chosen.keys() and task in ("lm", "chat", "distil"):
        values["micro_tokens"] = 2048
    return Settings(task=task, data=fingerprints(data), held=fingerprints(held), **_NO_END | values | chosen)  # type: ignore[arg-type]


_NO_END: dict[str, Any] = {"epochs": None, "steps": None, "time_limit_s": None}


def bf16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: AVX512-BF16 and AMX do, by 2.4 and more."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def train(
    settings: Settings,
    out: Path,
    resolve: Callable[[str], Path],
    *,
    resume: bool | None = None,
    checkpoint_steps: int | None = None,
) -> dict[str, Any]:
    """Runs it to its end; returns the report. Raises as the readers do, and RequestError for a folder that is taken."""
    data, held = ([Path(file) for file in part] for part in (settings.data, settings.held))
    settings = replace(settings, base=_state_of(settings, resolve))
    with Run(out, settings) as run:
        done = run.begin(resume)
        if done is not None:
            return done | {"already_done": True}
        torch.manual_seed(settings.seed)
        skipped = Skipped()
        if settings.model is None:
            task: Task = scratch.prepare(settings, skipped, data, held, run.folder / "tokenizer")
        elif settings.task == "distil":
            task = distil.prepare(settings, skipped, data, held, lambda name: Base.open(name, resolve(name)))
        else:
            base = Base.open(settings.model, resolve(settings.model))
            task = _TASKS[settings.task](base, settings, skipped, data, held)
        return run.train(task, _options(settings, checkpoint_steps), skipped, lambda done: _extra(task, done))


def shares_vocabulary(teacher: str, student: str, resolve: Callable[[str], Path]) -> bool:
    """Whether a student of this name (see `distil.student_of`) can learn the teacher's view of each token.

    ModelError: there is no such teacher or student.
    """
    if distil.derived(student):
        return True
    try:
        resolve(student)
    except PullError:
        raise
    except ModelError as error:
        raise ModelError(f"--student: {error}; and layers=10 of the teacher's, or llama:15M for a new one") from None
    return distil.same_vocabulary(*(Base.open(name, resolve(name)) for name in (teacher, student)))


def _state_of(settings: Settings, resolve: Callable[[str], Path]) -> str | None:
    """A digest of the files that a run starts from; None without any, or where the reader will say what is wrong."""
    student = None if settings.student is None or distil.derived(settings.student) else settings.student
    names = [name for name in (settings.model, student) if name is not None]
    try:
        return "".join(fingerprint(resolve(name)).hex() for name in names) or None
    except OSError:
        return None


def _extra(task: Task, outcome: Outcome) -> dict[str, Any]:
    return speeds(task, outcome) if isinstance(task, lm.LanguageModelling) else {}


def _options(settings: Settings, checkpoint_steps: int | None) -> Options:
    same = ("lr", "epochs", "steps", "time_limit_s", "warmup", "weight_decay", "ema", "bf16", "rounds", "seed")
    betas = (0.9, 0.95 if settings.task in ("lm", "chat", "distil") else 0.999)
    return Options(checkpoint_steps=checkpoint_steps, betas=betas, **{name: getattr(settings, name) for name in same})
