"""A checkpoint with its matrices in four bits: less to read for a token, for a model whose errors are caught anyway."""

from __future__ import annotations

from dataclasses import replace

from millis import _native
from millis.models.checkpoint import Checkpoint
from millis.models.tensor import GgmlType, Tensor


def requantize(checkpoint: Checkpoint, threads: int = 1) -> Checkpoint:
    """The same with every matrix that IQ4_NL makes smaller in IQ4_NL; the others stay as they lie in the file.

    So does an embedding that is not the output matrix, too: of it a token reads a single row.
    """
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if name != "token_embd.weight" or "output.weight" not in tensors:
            tensors[name] = _smaller(tensor, threads)
    return replace(checkpoint, tensors=tensors)


def _smaller(tensor: Tensor, threads: int) -> Tensor:
    four, type = GgmlType.IQ4_NL, tensor.type
    larger = type.block_bytes * four.block_values > four.block_bytes * type.block_values
    if len(tensor.shape) != 2 or tensor.shape[1] % four.block_values or not larger:
        return tensor
    return replace(tensor, type=four, data=_native.to_iq4_nl(int(tensor.type), tensor.data, threads))
