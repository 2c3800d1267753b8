"""The index of a server: what its documents say to a question whose vector another process makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from millis.server.served import Model
from millis.tasks.answer import Answer, evidence
from millis.tasks.index import Index


class Library:
    """An open index. `embedder`: the served model that it was made with; None: it compares words alone.

    RequestError: no such index. FormatError: it is none.
    """

    def __init__(self, path: Path, embedder: Model | None, name: str | None) -> None:
        self.embedder = embedder
        self.index = Index.open(path, embedder=None if name is None else _Elsewhere(name))
        self.look("warm", None)  # reads the passages; later ones only what has changed

    def needs_vector(self, question: str) -> bool:
        """Whether a question is compared by its meaning, too."""
        return self.embedder is not None and self.index.compares_meanings(question)

    def look(self, question: str, vector: NDArray[np.float32] | None) -> Answer:
        """What the documents say; the first quote is the text."""
        return evidence(question, self.index, vector)

    def close(self) -> None:
        """Closes the file."""
        self.index.close()


class _Elsewhere:
    """An index's embedder, whose vectors come from its own process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def embed(self, texts: Sequence[str]) -> NoReturn:
        raise TypeError(f"vectors of {self.name} are made in its process")
