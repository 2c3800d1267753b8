"""A trained folder as a GGUF file, in F16 or Q8_0; one that began as a GGUF file keeps that file's tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millis.models.gguf import exact_metadata
from millis.models.gguf_metadata import config_metadata, gguf_checkpoint
from millis.models.gguf_write import TensorOut
from millis.models.gguf_write import write_gguf as write_file
from millis.models.huggingface import read_folder
from millis.models.tensor import CONVOLUTION, GgmlType, Tensor
from millis.tokenizer.to_gguf import tokenizer_metadata
from millis.train.run import GGUF, exported, note_exported

_FILE_TYPES = {GgmlType.F16: 1, GgmlType.Q8_0: 7}  # general.file_type


def add_gguf(out: Path, type: str, source: Path | None = None) -> int:
    """Writes model.gguf beside the model of the run in `out`, as part of it. Raises as `write_gguf`."""
    size = write_gguf(out, out / GGUF, type, source)
    note_exported(out, exported(out) | {GGUF})
    return size


def write_gguf(folder: Path, path: Path, type: str, source: Path | None = None) -> int:
    """Writes the model in `folder` to `path`; returns its bytes. `source`: what it was trained from, None for nothing.

    FormatError: a model or a tokenizer that a GGUF file cannot hold. OSError: the file cannot be written.
    """
    wanted = GgmlType[type]
    checkpoint = gguf_checkpoint(read_folder(folder))
    if source is not None and source.is_file():
        metadata = {key: value for key, value in exact_metadata(source).items() if key.startswith("tokenizer.")}
    else:
        metadata = tokenizer_metadata(folder, checkpoint.config.vocab)
    metadata |= config_metadata(checkpoint.config)
    metadata |= {"general.file_type": _FILE_TYPES[wanted], "general.quantization_version": 2}
    return write_file(path, metadata, [_out(tensor, wanted) for tensor in checkpoint.tensors.values()])


def _out(tensor: Tensor, wanted: GgmlType) -> TensorOut:
    """Matrices in the wanted type; vectors, convolutions, and rows that do not divide into blocks, as float32."""
    if len(tensor.shape) < 2 or tensor.shape[-1] % wanted.block_values or tensor.name.endswith(CONVOLUTION):
        wanted = GgmlType.F32
    kinds = {GgmlType.F32: _f32, GgmlType.F16: _f16, GgmlType.Q8_0: _q8_0}
    return TensorOut(tensor.name, wanted, tensor.shape, lambda: kinds[wanted](tensor.numpy()))


def _f32(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def _f16(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return values.astype(np.float16).reshape(-1).view(np.uint8)


def _q8_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blocks of 32: a float16 scale, then the values in steps of it (ggml-common.h, block_q8_0)."""
    blocks = values.reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    out = np.empty((len(blocks), 34), dtype=np.uint8)
    out[:, :2] = scales.astype(np.float16).view(np.uint8)
    out[:, 2:] = np.round(steps).astype(np.int8).view(np.uint8)
    return out.reshape(-1)
