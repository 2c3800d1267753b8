"""Rotary tables against transformers' own rotary embeddings and the closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from millis.models.config import RopeScaling
from millis.models.huggingface_config import huggingface_config
from millis.models.rope import rope_table
from millis.types import FormatError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def reference(head_dim: int, rope: dict) -> LlamaRotaryEmbedding:
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 131072}
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, head_dim=head_dim, rope_parameters=rope))


def reference_table(head_dim: int, context: int, rope: dict) -> np.ndarray:
    """[2, context, head_dim / 2]: the first halves of transformers' repeated cosines and sines."""
    tables = reference(head_dim, rope)(torch.zeros(1), torch.arange(context)[None])
    return np.stack([table[0, :, : head_dim // 2].numpy() for table in tables])


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_plain_table_matches_transformers(theta: float, head_dim: int) -> None:
    expected = reference_table(head_dim, 300, {"rope_type": "default", "rope_theta": theta})
    table = rope_table(300, head_dim, theta)
    assert table.shape == (2, 300, head_dim // 2) and table.dtype == np.float32
    np.testing.assert_allclose(table, expected, atol=5e-5)


def test_linear_scaling_matches_transformers() -> None:
    expected = reference_table(64, 300, {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0})
    table = rope_table(300, 64, 1e6, RopeScaling(kind="linear", factor=8.0))
    np.testing.assert_allclose(table, expected, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 8.0)])
def test_llama3_scaling_matches_transformers(head_dim: int, factor: float) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **LLAMA3}
    scaling = RopeScaling(kind="llama3", factor=factor)
    np.testing.assert_allclose(
        rope_table(300, head_dim, 500000.0, scaling), reference_table(head_dim, 300, rope), atol=5e-5
    )


def test_llama3_scaling_far_out_matches_transformers_frequencies_in_double() -> None:
    """Positions where float32 angles are too coarse to compare: their frequencies, multiplied in float64."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3}
    frequencies = reference(128, rope).inv_freq.double().numpy()
    table = rope_table(20000, 128, 500000.0, RopeScaling(kind="llama3", factor=8.0))
    angles = 19999 * frequencies
    np.testing.assert_allclose(table[0, 19999], np.cos(angles), atol=2e-2)  # 20000 · 2^-24 relative in a frequency
    slow = frequencies < 1e-2
    np.testing.assert_allclose(table[0, 19999, slow], np.cos(angles[slow]), atol=1e-4)


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "more",
    [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 0.7}, {"mscale": 0.7, "mscale_all_dim": 2.0}],
)
def test_yarn_matches_transformers(head_dim: int, more: dict[str, float]) -> None:
    values = {"model_type": "llama", "hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_hidden_layers": 1}
    values |= {"intermediate_size": 8, "vocab_size": 8, "max_position_embeddings": 131072}
    config, _ = huggingface_config(values | {"rope_parameters": YARN | more}, "yarn")
    assert config.rope_scaling is not None and config.rope_scaling.original_context == 32768
    table = rope_table(300, head_dim, 1e6, config.rope_scaling)
    np.testing.assert_allclose(table, reference_table(head_dim, 300, YARN | more), atol=5e-5)
    assert not np.allclose(table, rope_table(300, head_dim, 1e6), atol=0.05)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0)
    plain, scaled = rope_table(2, 128, 500000.0)[1, 1], rope_table(2, 128, 500000.0, scaling)[1, 1]
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-6)  # sin x = x for the slowest


def test_explicit_factors_divide_frequencies() -> None:
    """GGUF lists Llama 3.1's scaling as factors; transformers' ratio of frequencies gives the same table."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3}
    plain = reference(64, {"rope_type": "default", "rope_theta": 500000.0}).inv_freq
    factors = (plain / reference(64, rope).inv_freq).numpy()
    table = rope_table(300, 64, 500000.0, factors=factors)
    np.testing.assert_allclose(table, reference_table(64, 300, rope), atol=5e-5)


def test_closed_form() -> None:
    table = rope_table(5000, 32, 10000.0)
    for position, pair in [(0, 0), (1, 0), (7, 3), (4999, 0), (4999, 15)]:
        angle = position * 10000.0 ** (-2 * pair / 32)
        assert table[0, position, pair] == pytest.approx(math.cos(angle), abs=1e-7)
        assert table[1, position, pair] == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("factors", [[1.0] * 7, [1.0] * 7 + [0.0], [1.0] * 7 + [-1.0], [1.0] * 7 + [math.nan]])
def test_malformed_factors_are_refused(factors: list[float]) -> None:
    with pytest.raises(FormatError, match=r"rope_freqs\.weight must hold 8 positive numbers"):
        rope_table(4, 16, 10000.0, factors=np.array(factors, np.float32))
