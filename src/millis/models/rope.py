"""Rotary position embedding (Su et al., 2021): the cosines and sines of every position, computed once.

Angles are computed in float64 and rounded once, so that far positions keep their precision.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from millis.models.config import RopeScaling
from millis.types import FormatError


def rope_table(
    context: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    factors: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """[2, context, head_dim / 2] float32: cosine and sine of position · frequency, in radians.

    Of a head, the first head_dim coordinates are rotated. Frequency i is theta^(−2i / head_dim), then stretched by
    `scaling`, then divided by factors[i] where a file lists them (GGUF's `rope_freqs.weight`). yarn and longrope
    multiply cosines and sines by their attention factor, and so the scores by its square. FormatError: factors that are
    not head_dim / 2 positive numbers.
    """
    turned = frequencies(head_dim, theta, scaling, context)
    if factors is not None:
        if factors.shape != turned.shape or not np.all(np.isfinite(factors) & (factors > 0)):
            raise FormatError(f"rope_freqs.weight must hold {head_dim // 2} positive numbers; convert the model again")
        turned = turned / factors
    angles = np.outer(np.arange(context, dtype=np.float64), turned)
    table = np.empty((2, *angles.shape), np.float32)
    np.cos(angles, out=table[0], casting="same_kind")  # computed in float64: the casting is that of the result
    np.sin(angles, out=table[1], casting="same_kind")
    if scaling is not None:
        table *= np.float32(scaling.attention_factor)
    return table


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, context: int = 0
) -> NDArray[np.float64]:
    """[head_dim / 2]: by how much each pair of coordinates turns from one position to the next, in radians."""
    plain: NDArray[np.float64] = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return plain if scaling is None else _scaled(plain, theta, scaling, context)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """What YaRN recommends for a context that is `factor` times the original one."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """What LongRoPE recommends for a context that is `factor` times the original one."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 and original_context > 1 else 1.0


def _scaled(frequencies: NDArray[np.float64], theta: float, scaling: RopeScaling, context: int) -> NDArray[np.float64]:
    """linear: all divided by the factor (Chen et al., 2023). llama3: only the slow ones, as Llama 3.1 defines it.

    Llama 3.1 counts the turns a frequency makes within the original context: above `high_freq_factor` turns it is
    kept, below `low_freq_factor` it is divided by the factor, and between the two it is interpolated. yarn (Peng
    et al., 2023) bounds the same three parts by turns as well, then interpolates by the frequencies' numbers. longrope
    (Ding et al., 2024) divides each by a factor of its own. transformers chooses for every text between the factors for
    short ones and those for long ones; here the context that the plan is for decides, as in llama.cpp and vLLM.
    """
    if scaling.kind == "longrope":
        long = context > scaling.original_context
        return frequencies / np.array(scaling.long_factors if long else scaling.short_factors, np.float64)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = _yarn_kept(len(frequencies), theta, scaling)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    turns = scaling.original_context * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_kept(count: int, theta: float, scaling: RopeScaling) -> NDArray[np.float64]:
    """[count]: 1 for the fast frequencies, 0 for the slow ones, a ramp between the two."""

    def number(turns: float) -> float:
        """Of the frequency that makes so many turns within the original context."""
        return count * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(number(scaling.beta_fast)), 0)
    high = min(math.ceil(number(scaling.beta_slow)), 2 * count - 1)
    return 1 - np.clip((np.arange(count) - low) / max(high - low, 0.001), 0, 1)
