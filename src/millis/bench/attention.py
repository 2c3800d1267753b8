"""Attention over the KV cache alone: a model's heads, by new tokens, tokens before them and ISA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from millis import _native
from millis.models.config import ModelConfig

DEPTHS = (512, 2048)
LAYERS = 16  # of a step, each with a cache of its own; one layer's time is the difference to a step of one, shared
LEAST_STEPS = 5


def measure(
    config: ModelConfig, *, counts: Sequence[int], isas: Sequence[str], threads: int, seconds: float, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """A line for every depth, count of new tokens and ISA; `bandwidth` in GB/s, as it was measured.

    share_of_roofline: the time that reading the keys and values in f16 takes at least, over the time taken; of several
    new tokens, which compute more than they read, None.
    """
    for depth in DEPTHS:
        for count in counts:
            for isa in isas:
                one, all_layers = (
                    _seconds(config, layers, depth, count, isa, threads, seconds) for layers in (1, LAYERS)
                )
                taken = max(1e-9, (all_layers - one) / (LAYERS - 1))
                yield line(config, depth, count, isa, taken, bandwidth)


def line(config: ModelConfig, depth: int, count: int, isa: str, seconds: float, bandwidth: float) -> dict[str, Any]:
    """One layer's attention of `count` tokens behind `depth` others, which took so long."""
    read = 2.0 * (depth + count) * config.kv_heads * config.head_dim * 2
    operations = 4.0 * count * (depth + (count + 1) / 2) * config.heads * config.head_dim
    return {
        "format": "attention",
        "rows": config.heads,
        "cols": config.head_dim,
        "depth": depth,
        "activations": count,
        "isa": isa,
        "us": 1e6 * seconds,
        "gb_per_s": read / seconds / 1e9,
        "gflop_per_s": operations / seconds / 1e9,
        "read_gb_per_s": bandwidth,
        "share_of_roofline": read / (bandwidth * 1e9) / seconds if count == 1 else None,
    }


def _seconds(config: ModelConfig, layers: int, depth: int, count: int, isa: str, threads: int, seconds: float) -> float:
    """The median of steps through so many layers of attention."""
    runtime = _runtime(config, layers, depth + count, count, isa, threads)
    pages = -(-(depth + count) // _native.PAGE_TOKENS)
    tokens, length = np.zeros(count, np.int32), np.asarray([count], np.int32)
    for at in range(0, depth, count):  # fills the cache; the last part overlaps the one before it
        start = np.asarray([min(at, depth - count)], np.int32)
        runtime.hidden(tokens, np.maximum(start, 0), length, np.arange(pages, dtype=np.int32)[None])
    took: list[float] = []
    while len(took) < LEAST_STEPS or sum(took) < seconds / 2:
        begin = time.perf_counter()
        runtime.hidden(tokens, np.asarray([depth], np.int32), length, np.arange(pages, dtype=np.int32)[None])
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def _runtime(config: ModelConfig, layers: int, context: int, count: int, isa: str, threads: int) -> _native.Runtime:
    """Tokens embed to queries, keys and values at once, which every layer reads."""
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
    width = (heads + 2 * kv_heads) * head_dim
    runtime = _native.Runtime(
        threads=threads, isa=isa, max_tokens=count, max_outputs=1, pages=-(-context // _native.PAGE_TOKENS),
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, vocab=1, context=context, exact=False,
    )  # fmt: skip
    table = np.random.default_rng(0).standard_normal((1, width), np.float32)
    runtime.add_matrix("table", 0, 1, width, table.reshape(-1).view(np.uint8))
    for name, size in (("qkv", width), ("out", heads * head_dim), ("selected", heads * head_dim), ("logits", 1)):
        runtime.add_buffer(name, size)
    runtime.embed("qkv", "table", 1.0, "")
    for layer in range(layers):
        runtime.attention("out", "qkv", layer, heads, head_dim**-0.5, "", False, 0, "", "", 1e-6)
    runtime.select("selected", "out")
    runtime.add_matrix("last", 0, 1, heads * head_dim, np.ones(heads * head_dim, np.float32).view(np.uint8))
    runtime.matmul("logits", "selected", ["last"], [], "", "", "")
    runtime.finish()
    return runtime
