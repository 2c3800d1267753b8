"""What a run is told, in one frozen record: it is compared when a run is resumed, and written beside the result."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from millis.samples.read import files_of
from millis.types import RequestError

Task = Literal["classify", "embed", "lm", "chat", "distil"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that decides what a run computes; `micro_tokens` only how it is cut, which rounding alone can tell."""

    task: Task
    model: str | None  # None: from scratch
    base: str | None = None  # what tells the state of the files of `model`, and of a student that is one
    data: dict[str, str]  # file → SHA-256
    held: dict[str, str]
    epochs: float | None
    steps: int | None
    time_limit_s: float | None
    lr: float
    batch: int  # samples a step; sequences of `max_tokens` for lm
    max_tokens: int  # of a sample; what is longer is cut (classify, embed, lm) or skipped (chat)
    warmup: float = 0.06
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    dropout: float | None = None  # None: the model's own
    token_dropout: float = 0.0  # share of a text's tokens that a mask stands for, where the tokenizer has one
    ngrams: bool | None = None  # beside the head, what tokens and pairs say; None: where Millis runs the model
    elsewhere: float = 0.0  # how often a text that is too long is learned from a random place instead of its beginning
    ema: float = 0.0
    rounds: int = 1
    head_lr: float = 1.0
    layer_decay: float = 1.0
    layers: int | None = None
    freeze_layers: int = 0  # the embedding and so many of the first layers stay as they are
    finetune: Literal["full", "lora"] = "full"
    rank: int = 16
    alpha: float = 32.0
    shape: Literal["llama", "gpt2"] | None = None
    parameters: int | None = None
    vocab: int | None = None
    temperature: float = 0.05  # of the contrastive loss
    student: str | None = None  # distil: a model, layers=N or llama:15M; `model` is the teacher
    top_k: int = 64  # distil: tokens of the teacher's that are told apart
    soft_temperature: float = 1.0  # distil
    hard: float = 0.0  # distil: weight of the text itself
    eval_split: float = 0.0
    bf16: bool = False
    seed: int = 0
    micro_tokens: int = 4096
    text_column: str | None = None
    label_column: str | None = None

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of the settings in which a kept run, `other`, was told something else."""
        mine = asdict(self)
        return [name for name in mine if name not in other or mine[name] != other[name]]


def fingerprints(paths: Sequence[Path]) -> dict[str, str]:
    """File → SHA-256 of its bytes. RequestError where a file is not there."""
    found = {}
    for path in files_of(paths):
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            found[str(path.resolve())] = digest.hexdigest()
    return found


def seconds(text: str) -> float:
    """`90`, `90s`, `30m`, `2h`, `1h30m` → seconds. RequestError for anything else."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower())
    parts = [float(part or 0) for part in match.groups()] if match else [0.0]
    total = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if total <= 0:
        raise RequestError(f"{text!r:.40} is no length of time; write 90s, 30m or 1h30m")
    return total


def amount(text: str) -> int:
    """`15M`, `1.5B`, `800k`, `15000000` → a number. RequestError for anything else."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    digits, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        value = round(float(digits) * unit)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise RequestError(f"{text!r:.40} is no number of parameters; write 15M or 15000000")
    return value
