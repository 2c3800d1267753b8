"""From a path to a model ready to run: which reader reads it, which architecture plans it, for how long a context.

The readers refuse a checkpoint whose tensors are not exactly those of its configuration; plans rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millis.models import (
    bert,
    bert_folder,
    exaone4,
    gemma3,
    gpt2,
    lfm2,
    llama,
    marian,
    modernbert,
    modernbert_folder,
    olmo2,
    reader_folder,
    seq2seq_folder,
    t5,
)
from millis.models.checkpoint import Checkpoint
from millis.models.config import Architecture, ModelConfig
from millis.models.gguf import read_gguf
from millis.models.huggingface import read_folder
from millis.models.mapped import read_json
from millis.models.plan import Plan
from millis.models.tensor import Tensor
from millis.types import ModelError, RequestError

DEFAULT_CONTEXT = 8192  # tokens; a longer one is reserved only when asked for

Builder = Callable[[ModelConfig, Mapping[str, Tensor], int], Plan]

BUILDERS: Mapping[Architecture, Builder] = {
    "llama": llama.build,
    "qwen2": llama.build,
    "qwen3": llama.build,
    "gemma": llama.build,
    "gemma3": gemma3.build,
    "granite": llama.build,
    "smollm3": llama.build,
    "ernie4_5": llama.build,
    "exaone4": exaone4.build,
    "hunyuan-dense": llama.build,
    "olmo2": olmo2.build,
    "lfm2": lfm2.build,
    "gpt2": gpt2.build,
    "bert": bert.build,
    "modernbert": modernbert.build,
    "t5": t5.build,
    "marian": marian.build,
}

ENCODERS = (*bert_folder.TYPES, modernbert_folder.TYPE)  # as config.json names them


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and the plan that runs it."""

    checkpoint: Checkpoint
    plan: Plan


def load_model(path: Path, context: int | None = None) -> Model:
    """Reads `path` and plans for sequences of `context` tokens (default: the model's own, up to DEFAULT_CONTEXT).
    That of a model that reads, or of a t5, is what it was trained on where it says so. That of longrope is the original
    one, for in a longer one all texts are rotated otherwise.

    ModelError: nothing there, or an architecture we do not run. FormatError: a malformed file, or tensors that do not
    fit. RequestError: a context the model was not made for.
    """
    checkpoint = read_checkpoint(path)
    if context is None:
        config = checkpoint.config
        scaling = config.rope_scaling
        near = scaling.original_context if scaling is not None and scaling.kind == "longrope" else DEFAULT_CONTEXT
        context = min(config.text_tokens or config.context, config.context, near, DEFAULT_CONTEXT)
    return Model(checkpoint, build_plan(checkpoint, context))


def is_encoder(path: Path) -> bool:
    """Whether a folder's config.json says that its model reads texts and writes none. FormatError if it is no JSON."""
    values = _settings(path)
    return values.get("model_type") in ENCODERS or reader_folder.is_decoder(values)


def is_seq2seq(path: Path) -> bool:
    """Whether it says that its model reads a text, then writes one: an encoder and a decoder. FormatError as above."""
    return seq2seq_folder.is_kin(_settings(path))


def _settings(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    return read_json(file, 1 << 20) if path.is_dir() and file.is_file() else {}


def read_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder, by what lies at `path`."""
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_gguf(path)
    raise ModelError(f"there is no model at {path}; give a .gguf file or a Hugging Face folder")


def build_plan(checkpoint: Checkpoint, context: int) -> Plan:
    """The plan of a checkpoint, for sequences of up to `context` tokens. RequestError: more than it was made for."""
    config = checkpoint.config
    if not 1 <= context <= config.context:
        raise RequestError(f"context must lie in [1, {config.context}] for this model, not {context}")
    return BUILDERS[config.architecture](config, checkpoint.tensors, context)
