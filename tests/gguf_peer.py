"""GGUF files as the gguf package reads them: the independent view that tests hold ours against."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np


class _Reader(gguf.GGUFReader):
    """The package's reader on a plain array: np.memmap's bookkeeping would double its time."""

    def _get(self, *arguments: Any, **keywords: Any) -> Any:
        self.data = self.data.view(np.ndarray)
        return super()._get(*arguments, **keywords)


@functools.cache
def peer(path: Path) -> gguf.GGUFReader:
    """A file that stays as it is; a large vocabulary takes seconds, once."""
    return _Reader(path)
