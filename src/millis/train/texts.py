"""Texts as token ids, cut to a length, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millis.tokenizer import Tokenizer, shortened


def encode_cut(tokenizer: Tokenizer, text: str, limit: int) -> list[int]:
    """The ids of `text` with what belongs around it, at most `limit`."""
    return shortened(tokenizer.encode(text), limit, tokenizer.around[1])


def padded(samples: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids [samples, longest] filled up with `pad`, and mask of the same shape: 1 where a token is."""
    longest = max(map(len, samples))
    ids = torch.full((len(samples), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(samples), longest), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample, dtype=torch.long)
        mask[row, : len(sample)] = 1
    return ids, mask
