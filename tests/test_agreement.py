"""Millis against transformers in float32 on the same weights: real models and tiny ones of every architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import millis
from agreement import all_logits, compare, divergence, token_prompts
from reference import TINY, folder_model, greedy, next_logits, real_reference, tiny_model

RNG = np.random.default_rng(11)


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-0.5b", "gemma3-270m"])
def test_real_models(name: str, model_path: Callable[[str], Path]) -> None:
    path = model_path(name)
    bounds = {"fast": (0.2, 0.001), "int8": (0.5, 0.005), "exact": (0.01, 1e-6)}
    if name == "qwen2.5-0.5b":
        del bounds["exact"]  # two gigabytes of weights in float32
    reference = cache(lambda ids: next_logits(real_reference(path), list(ids)))
    for precision, (margin, kl) in bounds.items():
        lm = millis.load(path, precision=precision, max_batch_tokens=1024, context=1024)
        report = compare(lm, reference, token_prompts(lm, 3), 24 if name == "smollm2" else 12)
        assert report.same + len(report.margins) == 3
        assert max(report.margins, default=0) < margin, report
        assert np.mean(report.kl) < kl, report


@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_checkpoints_of_every_architecture(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    reference = folder_model(tmp_path)
    lm = load_folder(tmp_path)
    for length in (1, 16, 40):
        ids = RNG.integers(0, reference.config.vocab_size, length).tolist()
        assert divergence(next_logits(reference, ids), all_logits(lm, ids)).max() < 1e-6
        want, margins = greedy(reference, ids, 20)
        got = lm.generate(ids, max_tokens=20, ignore_eos=True).tokens
        split = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), None)
        assert split is None or margins[split] < 0.01


def load_folder(path: Path) -> millis.LanguageModel:
    """A checkpoint with a tokenizer, which transformers' tiny models lack; its words are t0, t1 …"""
    import json

    from tokenizers import Tokenizer, decoders, models

    vocab = {f"t{i}": i for i in range(json.loads((path / "config.json").read_text())["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")
    return millis.load(path, precision="exact")


def test_chunked_prefill_and_batches_change_nothing(model_path: Callable[[str], Path]) -> None:
    whole = millis.load(model_path("smollm2"), precision="exact", context=512)
    cut = millis.load(model_path("smollm2"), precision="exact", context=512, max_batch_tokens=7)
    ids = token_prompts(whole, 1)[0][:60]
    want = whole.generate(ids, max_tokens=12, ignore_eos=True).tokens
    assert cut.generate(ids, max_tokens=12, ignore_eos=True).tokens == want
    requests = [cut.engine.submit(ids[:n], millis.SamplingParams(max_tokens=6, ignore_eos=True)) for n in (60, 9, 23)]
    while any(r.finish_reason is None for r in requests):
        cut.engine.step()
    for request, n in zip(requests, (60, 9, 23), strict=True):
        assert request.output == whole.generate(ids[:n], max_tokens=6, ignore_eos=True).tokens
