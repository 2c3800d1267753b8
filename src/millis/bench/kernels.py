"""Each kernel alone: a model's matrices and attention, by rows and ISA, beside what memory and arithmetic allow."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from millis import _native
from millis.bench import attention
from millis.models.checkpoint import Checkpoint
from millis.models.load import read_checkpoint
from millis.models.tensor import CONVOLUTION, Tensor

SET_MIB = 256  # working set: several times the caches, so that a product reads its weights from memory
MOST_REPEATS = MOST_COPIES = 4096


def matrices(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """One matrix of every type and shape that the model multiplies by."""
    seen = set()
    for tensor in checkpoint.tensors.values():
        key = (tensor.type, tensor.shape)
        if len(tensor.shape) == 2 and key not in seen and not tensor.name.endswith(CONVOLUTION):
            seen.add(key)
            yield tensor


def measure(
    path: Path, *, counts: Sequence[int], isas: Sequence[str], threads: int, seconds: float, int8: bool = False
) -> Iterator[dict[str, Any]]:
    """A line for every matrix, count of activation rows and ISA, each measured for about `seconds`; then attention's.

    share_of_roofline: the time that reading the weights at the measured bandwidth, or the byte products at the measured
    peak of a plain dot loop, would take at least (whichever is longer), over the time taken. int8: activations of one
    byte where the matrix has such a product.
    """
    checkpoint = read_checkpoint(path)
    bandwidth = _native.read_bandwidth(SET_MIB, threads)
    peaks = {isa: _native.dot_peak(isa, threads) for isa in isas}
    for tensor in matrices(checkpoint):
        for count in counts:
            for isa in isas:
                times, packed = _times(tensor, count, isa, threads, seconds, int8)
                yield line(tensor, count, isa, statistics.median(times), packed, bandwidth, peaks[isa])
    config = checkpoint.config
    if not config.reads and config.encoder is None:
        yield from attention.measure(
            config, counts=counts, isas=isas, threads=threads, seconds=seconds, bandwidth=bandwidth
        )


def _times(tensor: Tensor, count: int, isa: str, threads: int, seconds: float, int8: bool) -> tuple[list[float], int]:
    rows, cols = tensor.shape
    copies = min(MOST_COPIES, -(-(SET_MIB << 20) // tensor.nbytes))

    def run(repeats: int, copies: int) -> tuple[list[float], int]:
        return _native.time_matmul(
            int(tensor.type), rows, cols, tensor.data, count, isa, threads, repeats, copies, int8
        )

    probe, _ = run(3, min(copies, 3))
    repeats = max(3, min(MOST_REPEATS, int(seconds / min(probe))))
    return run(repeats, min(copies, repeats))


def line(
    tensor: Tensor, count: int, isa: str, seconds: float, packed: int, bandwidth: float, peak: float
) -> dict[str, Any]:
    """bandwidth: GB/s; peak: 10^9 byte operations a second, 0 where not known."""
    rows, cols = tensor.shape
    operations = 2.0 * rows * cols * count
    least = max(packed / (bandwidth * 1e9), operations / (peak * 1e9) if peak else 0.0)
    return {
        "format": tensor.type.name,
        "rows": rows,
        "cols": cols,
        "activations": count,
        "isa": isa,
        "us": 1e6 * seconds,
        "gb_per_s": packed / seconds / 1e9,
        "gflop_per_s": operations / seconds / 1e9,
        "read_gb_per_s": bandwidth,
        "peak_gop_per_s": peak,
        "share_of_roofline": least / seconds if peak else None,
    }
