"""A checkpoint as a GGUF file: key-values of its own file, or out of its folder, and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from millis.models.checkpoint import Checkpoint
from millis.models.gguf import exact_metadata
from millis.models.gguf_metadata import config_metadata, gguf_checkpoint
from millis.models.gguf_write import TensorOut, write_gguf
from millis.models.tensor import GgmlType
from millis.tokenizer.to_gguf import tokenizer_metadata
from millis.types import FormatError

_QUANTIZATION_VERSION = 2  # of the block layouts; every file since 2023
# general.file_type, which says of a mixed file what most of its weights are stored as.
_FILE_TYPES = {
    GgmlType.F32: 0, GgmlType.F16: 1, GgmlType.Q4_0: 2, GgmlType.Q4_1: 3, GgmlType.Q8_0: 7, GgmlType.Q5_0: 8,
    GgmlType.Q5_1: 9, GgmlType.Q2_K: 10, GgmlType.Q3_K: 12, GgmlType.Q4_K: 15, GgmlType.Q5_K: 17, GgmlType.Q6_K: 18,
    GgmlType.IQ4_NL: 25, GgmlType.IQ4_XS: 30, GgmlType.BF16: 32,
}  # fmt: skip


def export_gguf(checkpoint: Checkpoint, path: Path) -> int:
    """Writes `checkpoint` to `path`, its tensors as they are stored; returns the file's bytes.

    FormatError: something that a GGUF file cannot say. OSError: the file cannot be written.
    """
    checkpoint, metadata = exportable(checkpoint)
    return write_export(path, metadata, [TensorOut.of(tensor) for tensor in checkpoint.tensors.values()])


def exportable(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint with tensors as a GGUF file has them, and the key-values of that file. FormatError as above."""
    if checkpoint.metadata.get("general.architecture") == "phi3":
        raise FormatError(
            f"{checkpoint.path.name} is a GGUF file of phi3, whose matrices Millis reads in parts and does not put "
            "together again; give the model's Hugging Face folder instead"
        )
    if checkpoint.metadata:
        return checkpoint, exact_metadata(checkpoint.path)
    config = checkpoint.config
    if config.encoder is not None or config.reads:
        kind = "an encoder-decoder model" if config.encoder is not None else "a model that reads texts and writes none"
        raise FormatError(
            f"{checkpoint.path.name} is {kind}, which Millis does not write as GGUF, only models that go on with a "
            "text; run it from its folder, where precision fast keeps its matrices in eight bits"
        )
    checkpoint = gguf_checkpoint(checkpoint)
    config = checkpoint.config
    return checkpoint, config_metadata(config) | tokenizer_metadata(checkpoint.path, config.vocab)


def write_export(
    path: Path,
    metadata: dict[str, Any],
    tensors: list[TensorOut],
    advance: Callable[[TensorOut], None] = lambda tensor: None,
) -> int:
    """`write_gguf` with the key-values that say how the tensors are stored."""
    stored = {"general.file_type": _file_type(tensors), "general.quantization_version": _QUANTIZATION_VERSION}
    return write_gguf(path, metadata | stored, tensors, advance)


def _file_type(tensors: Iterable[TensorOut]) -> int:
    count: Counter[GgmlType] = Counter()
    for tensor in tensors:
        count[tensor.type] += tensor.nbytes // tensor.type.block_bytes * tensor.type.block_values
    return _FILE_TYPES[count.most_common(1)[0][0]]
