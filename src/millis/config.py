"""EngineConfig: everything that is chosen once, when a model is loaded. Flags of the command line derive from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from millis.types import RequestError

Precision = Literal["fast", "exact"]
Speculation = Literal["auto", "ngram", "off"]


def usable_cores() -> int:
    """Physical cores this process may use: its affinity, hyper-threads counted once, and its cgroup's CPU quota."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota() or len(cores)))


def _environment_isa() -> str:
    return os.environ.get("MILLIS_ISA") or "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run on this machine. Raises RequestError for a value outside its range."""

    threads: int = field(default_factory=usable_cores)
    """Compute threads, the caller's included; unless given, the physical cores this process may use."""
    isa: str = field(default_factory=_environment_isa)
    """Instruction set of the kernels; unless given, the environment's MILLIS_ISA, otherwise "auto": the best here."""
    precision: Precision = "fast"
    """fast: int8 activations and an f16 cache; exact: float32 throughout, for checks."""
    screen: bool = True
    """Read of a large output matrix only what may decide. Greedy choices stay the same, to six standard deviations of
    what is left out; draws too, but for tokens of less than 6e-6 of the best one's probability."""
    context: int | None = None
    """Longest sequence in tokens; None: what the model was made for, at most 8,192."""
    max_sequences: int = 8
    """Sequences computed in one step."""
    max_batch_tokens: int = 512
    """Tokens computed in one step: the size of a prefill chunk."""
    cache_tokens: int | None = None
    """Positions the KV cache holds for all sequences together; None: one full context."""
    max_waiting: int = 1024
    """Requests that may wait; more are refused."""
    max_gap_ms: float = 50.0
    """Milliseconds between two tokens of an interactive answer that prompts computed beside it had better not exceed;
    four times as many for a standard one, any number for batch."""
    max_step_ms: float | None = None
    """Milliseconds a step should take at most, so that a request that comes meanwhile waits no longer; a long prompt is
    cut accordingly. None: any number, which is fastest for a single request."""
    delivery_ms: float = 0.0
    """Milliseconds from an answer's last token to its reader: deadlines are kept so much earlier."""
    speculation: Speculation = "auto"
    """auto: guess tokens from the text so far, and with a draft model where one is given; ngram: from the text; off."""
    draft: str | None = None
    """A smaller model of the same vocabulary that guesses tokens, named as a model is; answers stay the same."""

    def __post_init__(self) -> None:
        for name, high in (
            ("threads", 1024),
            ("context", 1 << 24),
            ("max_sequences", 4096),
            ("max_batch_tokens", 65536),
            ("cache_tokens", 1 << 30),
            ("max_waiting", 1 << 20),
        ):
            value = getattr(self, name)
            if value is None and name in ("context", "cache_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise RequestError(f"{name} must be a whole number in [1, {high}], not {value!r}")
        for name, low in (("max_gap_ms", 1.0), ("max_step_ms", 1.0), ("delivery_ms", 0.0)):
            value = getattr(self, name)
            if value is None and name == "max_step_ms":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= 1e6:
                raise RequestError(f"{name} must be milliseconds in [{low:g}, 1000000], not {value!r}")
        if self.precision not in get_args(Precision):
            raise RequestError(f"precision must be 'fast' or 'exact', not {self.precision!r}")
        if self.speculation not in get_args(Speculation):
            raise RequestError(f"speculation must be 'auto', 'ngram' or 'off', not {self.speculation!r}")
        if self.draft is not None and (not isinstance(self.draft, str) or not self.draft):
            raise RequestError(f"draft must be a model's name, not {self.draft!r}")
        if self.draft is not None and self.speculation != "auto":
            raise RequestError(
                f"a draft model needs speculation='auto', not {self.speculation!r}; leave one of them out"
            )
        if not isinstance(self.screen, bool):
            raise RequestError(f"screen must be true or false, not {self.screen!r}")
        if not isinstance(self.isa, str):
            raise RequestError(f"isa must be a name such as 'auto' or 'scalar', not {self.isa!r}")


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """Whole CPUs of the cgroup's quota, rounded up; None: unlimited or unknown."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
