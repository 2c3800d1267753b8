"""Fits the n-grams beside a classifier's head (millis.models.ngrams): logistic regression, by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from millis.models.ngrams import FILE, Ngrams, as_tensors, known, ngrams_of

LEAST_TEXTS = 2  # that have an n-gram; what stands in one only says nothing of others
MOST_TEXTS = 1 << 18  # of more, so many are taken at even distances
MOST_NGRAMS = 1 << 18
MOST_WEIGHTS = 1 << 22  # with many labels fewer n-grams are kept
INVERSE_PENALTY = 10.0  # C, as libraries of support vector machines name it
ITERATIONS = 60


def fit(texts: Sequence[Sequence[int]], labels: Sequence[int], classes: int) -> Ngrams:
    """texts: as ids; labels: the number of each text's, below `classes`. The most frequent n-grams are kept."""
    step = -(-len(texts) // MOST_TEXTS)
    texts, labels = texts[::step], labels[::step]
    rows = [ngrams_of(ids) for ids in texts]
    keys, counts = np.unique(np.concatenate(rows), return_counts=True)
    most = min(MOST_NGRAMS, max(1, MOST_WEIGHTS // classes))
    order = np.argsort(-counts, kind="stable")[:most]
    order = order[counts[order] >= min(LEAST_TEXTS, counts.max())]
    kept = np.sort(order)
    keys, counts = keys[kept], counts[kept]
    idf = (np.log((1 + len(texts)) / (1 + counts)) + 1).astype(np.float32)

    index, share, starts = [], [], [0]
    for row in rows:
        at, shares = known(keys, idf, row)
        index.append(at)
        share.append(shares)
        starts.append(starts[-1] + len(at))
    weights, bias = _regression(
        torch.from_numpy(np.concatenate(index)),
        torch.from_numpy(np.concatenate(share)),
        torch.tensor(starts[:-1]),
        torch.tensor(labels),
        (len(keys), classes),
    )
    return Ngrams(keys, idf, weights.numpy(), bias.numpy())


def _regression(
    index: torch.Tensor, share: torch.Tensor, starts: torch.Tensor, targets: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, bias = torch.zeros(shape, requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weights, bias], max_iter=ITERATIONS, history_size=6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = nn.functional.embedding_bag(index, weights, starts, mode="sum", per_sample_weights=share) + bias
        penalty = weights.square().sum() / (2 * INVERSE_PENALTY * len(targets))
        value = nn.functional.cross_entropy(logits, targets) + penalty
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def write(ngrams: Ngrams, folder: Path) -> None:
    """Into a model's folder."""
    save_file(as_tensors(ngrams), folder / FILE)
