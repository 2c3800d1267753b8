"""How fast a run is beside what the processor can: training FLOPs over the speed of a large matrix product."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from millis.train.lm import LanguageModelling
    from millis.train.loop import Outcome

_SIZE = 2048
_TRIES, _TRY_S = 3, 0.15


def matmul_flops(bf16: bool) -> float:
    """Operations a second of a large matrix product in the numbers that training uses; the best of a few."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    torch.mm(left, right)
    best = 0.0
    for _ in range(_TRIES):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < _TRY_S or not count:
            torch.mm(left, right)
            count += 1
        best = max(best, 2 * _SIZE**3 * count / (time.perf_counter() - begin))
    return best


def speeds(job: LanguageModelling, outcome: Outcome) -> dict[str, Any]:
    """GFLOP/s of the run and of the processor, and their ratio."""
    reached = job.flops_a_token() * outcome.tokens / max(1e-9, outcome.elapsed_s)
    return {
        "gflops": round(reached / 1e9, 1),
        "matmul_gflops": round(job.peak_flops / 1e9, 1),
        "utilisation": round(reached / job.peak_flops, 4),
    }
