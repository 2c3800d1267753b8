"""Float matrices in eight bits, of models that read: a quarter of what a float32 file has to be read for each text.

Blocks of 32 weights share a scale (GGML's Q8_0): each weight is off by at most 1/254 of the largest of its block, and
by the rounding of the scale to f16, 1/2048 of itself. What is only looked up, a row at a time, stays as it lies in the
file, and so does the matrix that gives the logits unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from millis.models.plan import GatedMatMul, MatMul, Plan
from millis.models.tensor import GgmlType, Tensor

_FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
_BLOCK = GgmlType.Q8_0.block_values


def eight_bits(plan: Plan, tensors: Mapping[str, Tensor], *, logits: bool = False) -> dict[str, Tensor]:
    """The same tensors, those that the plan multiplies by in Q8_0 where they are floats; `logits`: that matrix too."""
    products = [op for op in (*plan.source, *plan.ops) if isinstance(op, MatMul) and (logits or op.out != "logits")]
    gated = [op for op in (*plan.source, *plan.ops) if isinstance(op, GatedMatMul)]
    found = dict(tensors)
    for name in {name: None for op in products for name in op.weights} | {
        n: None for op in gated for n in (op.gate, op.up)
    }:
        tensor = tensors[name]
        if tensor.type in _FLOATS and tensor.shape[1] % _BLOCK == 0:
            found[name] = replace(tensor, type=GgmlType.Q8_0, data=_blocks(tensor.numpy()))
    return found


def _blocks(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The bytes of Q8_0: for each block an f16 scale d, then whole numbers q in [-127, 127] with value = d · q."""
    blocks = values.reshape(-1, _BLOCK)
    scale = (np.abs(blocks).max(axis=1) / np.float32(127)).astype(np.float16)
    known = scale.astype(np.float32)[:, None]
    whole = np.divide(blocks, known, out=np.zeros_like(blocks), where=known > 0)
    out = np.empty((len(blocks), GgmlType.Q8_0.block_bytes), np.uint8)
    out[:, :2] = scale[:, None].view(np.uint8)
    out[:, 2:] = np.clip(np.rint(whole), -127, 127).astype(np.int8).view(np.uint8)
    return out.reshape(-1)
