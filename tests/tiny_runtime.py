"""A tiny native runtime around the op under test: token t embeds to row t of a table, an identity gives the logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from millis import _native

PAGE = _native.PAGE_TOKENS
SIZES = {"threads": 2, "isa": "auto", "exact": True, "max_tokens": 256, "max_outputs": 16, "pages": 32, "layers": 1}
SHAPE = {"kv_heads": 1, "head_dim": 16, "context": 512}


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


NONE = ints([0, 0])  # drafts of two sequences


def stored(values: np.ndarray) -> np.ndarray:
    """A matrix's bytes as a file of type F32 holds them."""
    return np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)


class Tiny:
    """Embeds into buffer "x"; after the ops of the test, `finish(out)` makes `out` [tokens, width] the logits."""

    def __init__(self, table: np.ndarray, width: int, **config: Any) -> None:
        self.width, self.vocab = width, max(width, len(table))
        self.native = _native.Runtime(vocab=self.vocab, **{**SIZES, **SHAPE, **config})
        rows = np.zeros((self.vocab, table.shape[1]), np.float32)
        rows[: len(table)] = table
        self.matrix("table", rows)
        self.native.add_buffer("x", table.shape[1])
        self.native.embed("x", "table", 1.0, "")

    def matrix(self, name: str, values: np.ndarray) -> None:
        self.native.add_matrix(name, 0, *values.shape, stored(values))

    def vector(self, name: str, values: np.ndarray) -> None:
        self.native.add_vector(name, np.ascontiguousarray(values, np.float32))

    def finish(self, out: str) -> Tiny:
        self.native.add_buffer("selected", self.width)
        self.native.add_buffer("logits", self.vocab)
        self.matrix("identity", np.eye(self.vocab, self.width))
        self.native.select("selected", out)
        self.native.matmul("logits", "selected", ["identity"], [], "", "", "")
        self.native.finish()
        return self

    def run(self, *sequences: Any, starts: Any = None, pages: Any = None) -> np.ndarray:
        """[tokens of all sequences, width]; a sequence has pages of its own, in order, unless they are given."""
        arrays = self.arrays(*sequences, starts=starts, pages=pages)
        return self.native.logits(*arrays, all=True)[:, : self.width]

    @staticmethod
    def arrays(*sequences: Any, starts: Any = None, pages: Any = None) -> tuple[np.ndarray, ...]:
        starts = starts or [0] * len(sequences)
        used = [-(-(start + len(tokens)) // PAGE) for start, tokens in zip(starts, sequences, strict=True)]
        first = np.cumsum([0, *used])
        tables = np.full((len(sequences), max(used)), -1, np.int32)
        for s, count in enumerate(used):
            tables[s, :count] = pages[s][:count] if pages else range(first[s], first[s] + count)
        return ints(np.concatenate(sequences)), ints(starts), ints([len(tokens) for tokens in sequences]), tables
