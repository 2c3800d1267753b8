"""Whether a model that was fetched can be read at all: its configuration, its tensors, its tokenizer."""

from __future__ import annotations

from pathlib import Path

from millis.models.load import read_checkpoint
from millis.tokenizer import load_tokenizer


def check_readable(path: Path) -> None:
    """Raises ModelError where Millis cannot read the model at `path`; no weight is loaded."""
    load_tokenizer(read_checkpoint(path))
