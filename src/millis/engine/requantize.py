"""A checkpoint with its matrices in four bits: less to read for a token, for a model whose errors are caught anyway."""

from __future__ import annotations

from dataclasses import replace

from millis import _native
from millis.models.checkpoint import Checkpoint
from millis.models.tensor import GgmlType, Tensor


def requantize(checkpoint: Checkpoint, threads: int = 1) -> Checkpoint:
    """The same with every matrix that Q4_0 makes smaller in Q4_0; the others stay as they lie in the file.

    So does an embedding that is not the output matrix, too: of it a token reads a single row.
    """
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if name != "token_embd.weight" or "output.weight" not in tensors:
            tensors[name] = _smaller(tensor, threads)
    return replace(checkpoint, tensors=tensors)


def _smaller(tensor: Tensor, threads: int) -> Tensor:
    q4 = GgmlType.Q4_0
    bits = 8 * tensor.type.block_bytes / tensor.type.block_values
    if len(tensor.shape) != 2 or tensor.shape[1] % q4.block_values or bits <= 8 * q4.block_bytes / q4.block_values:
        return tensor
    return replace(tensor, type=q4, data=_native.to_q4_0(int(tensor.type), tensor.data, threads))
