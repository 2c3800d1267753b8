"""BM25 (Robertson and Zaragoza, 2009), with every posting's weight worked out when an index is loaded.

That a posting's weight needs nothing of the question is the idea of BM25S (Lù, 2024): a question is then a sum over
few arrays. SQLite's FTS5, which computes as it searches, takes a hundred times as long over 100,000 passages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

K1, B = 1.2, 0.4  # passages are of like length: little is to be made of it


class Postings:
    """Which passages hold a term, and how much that says.

    term, passage, count: [postings] int64, how often a term (a number below `vocabulary`) stands in a passage.
    """

    def __init__(
        self, term: NDArray[np.int64], passage: NDArray[np.int64], count: NDArray[np.int64], vocabulary: int, size: int
    ) -> None:
        self.size = size  # passages
        order = np.argsort(term, kind="stable")
        self._passage = passage[order].astype(np.int32)
        df = np.bincount(term, minlength=vocabulary)
        self._begin = np.concatenate(([0], np.cumsum(df)))
        self.idf: NDArray[np.float32] = np.log1p((size - df + 0.5) / (df + 0.5)).astype(np.float32)  # [vocabulary]
        length = np.bincount(passage, weights=count, minlength=size)
        norm = K1 * (1 - B + B * length / max(length.mean() if size else 1.0, 1e-9))
        tf = count[order].astype(np.float32)
        weight = tf * (K1 + 1) / (tf + norm[self._passage].astype(np.float32))
        self._weight = weight * self.idf[term[order]]

    def scores(self, terms: Sequence[int]) -> NDArray[np.float32]:
        """[size] float32: the BM25 score of every passage for distinct terms, 0 for one with none of them."""
        total = np.zeros(self.size, np.float32)
        for term in terms:
            span = slice(self._begin[term], self._begin[term + 1])
            total[self._passage[span]] += self._weight[span]
        return total


def top(scores: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where the highest of [N] scores above 0 stand, best first, ties in order, and what they are."""
    some = np.flatnonzero(scores > 0)
    values = scores[some]
    if len(some) > count:  # sixteen bits find the threshold: selecting among floats is slow where many are the same
        coarse = (values * (65535 / values.max())).astype(np.uint16)
        keep = coarse >= np.partition(coarse, -count)[-count]
        some, values = some[keep], values[keep]
    order = np.argsort(-values, kind="stable")[:count]
    return some[order], values[order]
