"""Tensors to and from blocks: which types a matrix may take, what each would cost, and the blocks themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from millis import _native
from millis.models.checkpoint import Checkpoint
from millis.models.tensor import GgmlType, Tensor
from millis.quantize.choose import Option
from millis.quantize.gradients import Floats
from millis.quantize.importance import Importance
from millis.types import ModelError

TYPES = (
    GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_K,
    GgmlType.Q5_1, GgmlType.Q6_K, GgmlType.Q8_0, GgmlType.IQ4_NL, GgmlType.IQ4_XS,
)  # fmt: skip
# What takes a K-quant's place where rows are no whole number of its 256 values: as exact or more so.
_IN_PLACE = {
    GgmlType.Q2_K: GgmlType.Q4_0,
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q4_1,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
    GgmlType.IQ4_XS: GgmlType.IQ4_NL,
}
_SAMPLE_VALUES = 1 << 16  # of a matrix, to estimate what a type would cost
_PIECE_VALUES = 1 << 24  # dequantised at a time


def matrices(checkpoint: Checkpoint) -> list[Tensor]:
    """Those that may be quantised: matrices in whole blocks of 32, but for learned positions, which are few."""
    return [
        tensor
        for tensor in checkpoint.tensors.values()
        if len(tensor.shape) == 2 and tensor.shape[1] % 32 == 0 and tensor.name != "position_embd.weight"
    ]


def others(checkpoint: Checkpoint) -> list[Tensor]:
    """The rest, as a GGUF file has them: vectors in float32, all else as it is."""
    names = {tensor.name for tensor in matrices(checkpoint)}
    rest = [tensor for tensor in checkpoint.tensors.values() if tensor.name not in names]
    vectors = (GgmlType.F16, GgmlType.BF16)
    return [Tensor.from_numpy(t.name, t.numpy()) if len(t.shape) == 1 and t.type in vectors else t for t in rest]


def fitting(tensor: Tensor, type: GgmlType) -> GgmlType:
    """`type`, or what takes its place for rows of this width."""
    return type if tensor.shape[1] % type.block_values == 0 else _IN_PLACE[type]


def possible(tensor: Tensor) -> list[GgmlType]:
    """Every type for rows of this width; and its own, which costs nothing."""
    found = [type for type in TYPES if tensor.shape[1] % type.block_values == 0]
    return found if tensor.type in found or is_float(tensor) else [*found, tensor.type]


def is_float(tensor: Tensor) -> bool:
    return tensor.type in (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


def uniform(tensor: Tensor) -> Importance:
    """Where nothing was measured: every column counts the same."""
    return Importance(np.ones(tensor.shape[1], np.float32), np.ones(tensor.shape[0], np.float32))


def encode(tensor: Tensor, type: GgmlType, importance: Importance, threads: int) -> tuple[Tensor, float]:
    """The tensor in blocks of `type`, and what that costs in nats a token: in its own type nothing, it stays as it is.

    ModelError: weights that are no numbers.
    """
    if type == tensor.type:
        return tensor, 0.0
    pieces, errors, step = [], [], max(1, _PIECE_VALUES // tensor.shape[1])
    for at in range(0, tensor.shape[0], step):
        data, error = _native.quantize(int(type), _rows(tensor, at, at + step), importance.columns, threads)
        pieces.append(data)
        errors.append(error)
    data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return replace(tensor, type=type, data=data), importance.cost(np.concatenate(errors))


def options(tensor: Tensor, importance: Importance, threads: int) -> list[Option]:
    """What every possible type would take in the file, and cost, judged by a sample of rows.

    A row's chance to be in it is its share of the cost (Hansen and Hurwitz, 1943): of a vocabulary few rows matter.
    """
    rows, columns = tensor.shape
    count = min(rows, max(16, _SAMPLE_VALUES // columns))
    picked = importance.sample(count)
    values = np.concatenate([_rows(tensor, row, row + 1) for row in picked.tolist()])
    found = []
    for type in possible(tensor):
        size = rows * columns // type.block_values * type.block_bytes
        loss = 0.0
        if type != tensor.type:
            _, errors = _native.quantize(int(type), values, importance.columns, threads)
            loss = importance.cost_of_sample(errors)
        found.append(Option(type, size, loss))
    return found


def read_bytes(tensor: Tensor, type: GgmlType) -> int:
    """Bytes that the engine reads of this matrix for a token, stored as `type`."""
    return int(_native.packed_bytes(int(type), *tensor.shape))


def relative_error(before: Tensor, after: Tensor) -> float:
    """The root mean square of the error over that of the values."""
    error = energy = 0.0
    step = max(1, _PIECE_VALUES // before.shape[1])
    if before.data is not after.data:
        for at in range(0, before.shape[0], step):
            values, found = _rows(before, at, at + step), _rows(after, at, at + step)
            error += float(np.sum((values - found) ** 2, dtype=np.float64))
            energy += float(np.sum(values**2, dtype=np.float64))
    return (error / energy) ** 0.5 if energy else 0.0


def _rows(tensor: Tensor, first: int, last: int) -> Floats:
    """[last − first, columns], or as many as there are."""
    width = tensor.data.nbytes // tensor.shape[0]
    last = min(last, tensor.shape[0])
    part = replace(tensor, shape=(last - first, tensor.shape[1]), data=tensor.data[first * width : last * width])
    values = part.numpy()
    if not np.isfinite(values).all():
        raise ModelError(f"the tensor {tensor.name!r} holds values that are no numbers; the model is damaged")
    return values
