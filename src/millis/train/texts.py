"""Texts as token ids, cut to a length, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millis.tokenizer import Tokenizer


def encode_cut(tokenizer: Tokenizer, text: str, limit: int) -> tuple[list[int], bool]:
    """The ids of `text` with what belongs around it, at most `limit`; and whether its end was cut off for that."""
    ids = tokenizer.encode(text)
    if len(ids) <= limit:
        return ids, False
    tail = _tail(tokenizer)
    return ids[: limit - tail] + ids[len(ids) - tail :], True


def _tail(tokenizer: Tokenizer) -> int:
    """How many tokens the tokenizer puts behind a text."""
    bare, whole = tokenizer.encode("a", add_special=False), tokenizer.encode("a")
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return len(whole) - len(bare) - starts[0] if starts else 0


def padded(samples: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids [samples, longest] filled up with `pad`, and mask of the same shape: 1 where a token is."""
    longest = max(map(len, samples))
    ids = torch.full((len(samples), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(samples), longest), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample, dtype=torch.long)
        mask[row, : len(sample)] = 1
    return ids, mask
