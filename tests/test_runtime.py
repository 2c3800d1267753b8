"""The native runtime on tiny models: every ISA and thread count against the NumPy oracle, and bad input refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millis import _native
from millis.config import EngineConfig
from millis.engine.native_runner import NativeRunner
from millis.engine.runner import Batch
from millis.models.load import Model, load_model
from millis.models.oracle import Oracle
from millis.types import ModelError, SamplingParams
from reference import TINY, tiny_model

ISAS = _native.supported_isas()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(folder)
            made[name] = load_model(folder)
        return made[name]

    return load


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


def batch(tokens: list[int], start: int = 0, pages: list[int] | None = None) -> Batch:
    pages = pages or list(range(-(-(start + len(tokens)) // 32)))
    return Batch(ints(tokens), ints([start]), ints([len(tokens)]), ints([pages]))


def tokens_of(model: Model, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(count).integers(0, model.plan.vocab, count)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", sorted(TINY))
def test_logits_equal_the_oracles(name: str, isa: str, threads: int, tiny: Callable[[str], Model]) -> None:
    model = tiny(name)
    runner = NativeRunner(model, EngineConfig(isa=isa, threads=threads, precision="exact"))
    tokens = tokens_of(model, 45)
    want = Oracle(model.plan, model.checkpoint.tensors).logits(tokens)
    np.testing.assert_allclose(runner.logits(batch(tokens), every=True), want, atol=2e-4)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", sorted(TINY))
def test_selected_rows_alone_are_as_among_all(
    name: str, threads: int, precision: str, tiny: Callable[[str], Model]
) -> None:
    """Behind the last attention only the selected rows are computed: here more of them than logits are held at once."""
    model = tiny(name)
    config = EngineConfig(threads=threads, precision=precision, max_sequences=24, cache_tokens=2048)
    runner = NativeRunner(model, config)
    lengths = [1, 40, 17, 2, 33, 1, 9, *[3] * 15]
    tokens = ints(tokens_of(model, sum(lengths)))
    tables = np.arange(2 * len(lengths), dtype=np.int32).reshape(-1, 2)
    several = Batch(tokens, ints([0] * len(lengths)), ints(lengths), tables)
    every = runner.logits(several, every=True)
    want = every[np.cumsum(lengths) - 1]
    got = runner.logits(several)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < (1e-5 if precision == "exact" else 0.02) * np.abs(want).max()
    np.testing.assert_array_equal(runner.logits(several, every=True), every)  # what was remembered is the same


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", sorted(TINY))
def test_fast_precision_is_near(name: str, isa: str, tiny: Callable[[str], Model]) -> None:
    """Float weights keep float activations; only the f16 cache differs."""
    model = tiny(name)
    tokens = tokens_of(model, 40)
    want = Oracle(model.plan, model.checkpoint.tensors).logits(tokens)
    got = NativeRunner(model, EngineConfig(isa=isa, threads=2)).logits(batch(tokens), every=True)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_follows_scalar_on_quantised_weights(isa: str, model_path: Callable[[str], Path]) -> None:
    model = load_model(model_path("smollm2"), 64)
    tokens = tokens_of(model, 20)
    scalar = NativeRunner(model, EngineConfig(isa="scalar", threads=2)).logits(batch(tokens))
    got = NativeRunner(model, EngineConfig(isa=isa, threads=2)).logits(batch(tokens))
    # The order of float sums differs; a rounded activation may fall to the other side.
    assert np.abs(got - scalar).max() < 0.15 * np.abs(scalar).max()
    assert np.corrcoef(got[0], scalar[0])[0, 1] > 0.999


@pytest.mark.parametrize("cut", [1, 7, 31, 32, 33, 64])
@pytest.mark.parametrize("name", ["gemma3", "hunyuan", "phi4_mini", "olmo3", "lfm2", "lfm2_wide"])
def test_chunks_scattered_pages_and_neighbours_change_nothing(
    name: str, cut: int, tiny: Callable[[str], Model]
) -> None:
    model = tiny(name)
    runner = NativeRunner(model, EngineConfig(precision="exact", threads=2, cache_tokens=512))
    tokens, other = tokens_of(model, 70), tokens_of(model, 50)
    want = runner.logits(batch(tokens))
    pages = [7, 2, 11]
    for at in range(0, 70, cut):
        part = tokens[at : at + cut]
        mixed = Batch(
            ints(part + other[: at % 20 + 1]), ints([at, 0]), ints([len(part), at % 20 + 1]), ints([pages, [4, -1, -1]])
        )
        got = runner.logits(mixed)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)


@pytest.mark.parametrize(("name", "own"), [("llama", True), ("qwen3", False)])
def test_a_token_reads_no_embedding_of_its_own(name: str, own: bool, tiny: Callable[[str], Model]) -> None:
    model = tiny(name)
    runner = NativeRunner(model, EngineConfig(precision="exact"))
    embedding = 4 * math.prod(model.checkpoint.tensors["token_embd.weight"].shape)
    assert runner.weight_bytes - runner.token_bytes == (embedding if own else 0)


def test_step_samples_only_where_there_is_a_sampler(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    runner = NativeRunner(model, EngineConfig(precision="exact", threads=2))
    tokens = tokens_of(model, 10)
    two = Batch(ints(tokens + tokens), ints([0, 0]), ints([10, 10]), ints([[0], [1]]))
    sampler = runner.sampler(SamplingParams(logprobs=2), tokens)
    out = runner.step(two, [None, sampler])
    logits = runner.logits(batch(tokens))[0].astype(np.float64)
    assert out.tokens == [[], [int(logits.argmax())]]
    assert out.logprobs[0] == [] and out.logprobs[1][0] is not None
    want = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert out.logprobs[1][0].logprob == pytest.approx(want.max(), abs=1e-4)
    with pytest.raises(ValueError, match="one sampler serves one sequence"):
        runner.step(two, [sampler, sampler])


def test_score_is_the_log_softmax_of_the_targets(tiny: Callable[[str], Model]) -> None:
    model = tiny("qwen2")
    runner = NativeRunner(model, EngineConfig(precision="exact", threads=2, max_batch_tokens=64))
    tokens = tokens_of(model, 40)
    targets = ints([*tokens[1:], -1])
    targets[3] = -1
    logits = Oracle(model.plan, model.checkpoint.tensors).logits(tokens).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = [0 if t < 0 else logs[i, t] for i, t in enumerate(targets)]
    np.testing.assert_allclose(runner.score(batch(tokens), targets), want, atol=2e-4)


def test_the_likeliest_tokens_of_every_place_and_the_ranks_of_the_targets(tiny: Callable[[str], Model]) -> None:
    model = tiny("qwen2")
    runner = NativeRunner(model, EngineConfig(precision="exact", threads=3, max_batch_tokens=64))
    tokens = tokens_of(model, 40)
    targets = ints([*tokens[1:], -1])
    logits = runner.logits(batch(tokens), every=True)
    order = np.argsort(-logits, axis=-1, kind="stable")
    for count in (0, 1, 5, 10**6):
        found = runner.score_best(batch(tokens), targets, count)
        np.testing.assert_array_equal(found.logprobs, runner.score(batch(tokens), targets))
        np.testing.assert_array_equal(found.best[:-1], order[:-1, :count])
        assert found.best.shape == found.best_logprobs.shape == (40, min(count, model.plan.vocab))
        assert (found.best[-1] == -1).all() and np.isneginf(found.best_logprobs[-1]).all()  # nothing was asked
        for i, target in enumerate(targets[:-1]):
            assert found.ranks[i] == order[i].tolist().index(target) + 1
            if found.ranks[i] <= count:  # the same number to the last bit, by which clients tell a greedy choice
                assert found.best_logprobs[i, found.ranks[i] - 1] == found.logprobs[i]
    with pytest.raises(ValueError, match="count"):
        runner.score_best(batch(tokens), targets, -1)
    with pytest.raises(ValueError, match="one target for each token"):
        runner.score_best(batch(tokens), targets[1:], 1)


BAD = {
    "unknown token": batch([10**6]),
    "negative token": batch([-1]),
    "no tokens": Batch(ints([]), ints([]), ints([]), ints(np.zeros((0, 1)))),
    "zero length": Batch(ints([1]), ints([0, 0]), ints([1, 0]), ints([[0], [1]])),
    "negative start": Batch(ints([1]), ints([-1]), ints([1]), ints([[0]])),
    "past the context": Batch(ints([1]), ints([10**6]), ints([1]), ints([[0]])),
    "huge start": Batch(ints([1]), ints([2**31 - 1]), ints([1]), ints([[0]])),
    "lengths beyond tokens": Batch(ints([1]), ints([0]), ints([2]), ints([[0]])),
    "page out of range": Batch(ints([1]), ints([0]), ints([1]), ints([[10**6]])),
    "missing page": Batch(ints([1]), ints([0]), ints([1]), ints([[-1]])),
    "table too short": Batch(ints([1]), ints([32]), ints([1]), ints([[0]])),
    "tables of another count": Batch(ints([1]), ints([0]), ints([1]), ints([[0], [1]])),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_batches_are_refused_and_leave_the_runtime_usable(case: str, tiny: Callable[[str], Model]) -> None:
    runner = NativeRunner(tiny("llama"), EngineConfig(precision="exact", threads=2))
    before = runner.logits(batch([1, 2, 3]))
    with pytest.raises(ValueError, match="batch"):
        runner.step(BAD[case], [None] * len(BAD[case].lengths))
    with pytest.raises(ValueError, match="batch"):
        runner.step(batch([1]), [])
    np.testing.assert_array_equal(runner.logits(batch([1, 2, 3])), before)


def test_a_plan_that_does_not_fit_is_a_model_error(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    narrow = replace(model.plan, widths={**model.plan.widths, "h": 16})
    with pytest.raises(ModelError, match="does not fit|buffers"):
        NativeRunner(replace(model, plan=narrow), EngineConfig())
    without = {k: v for k, v in model.plan.widths.items() if k != "qkv"}
    with pytest.raises(ModelError, match="qkv"):
        NativeRunner(replace(model, plan=replace(model.plan, widths=without)), EngineConfig())
    with pytest.raises(ModelError, match="logits"):
        NativeRunner(replace(model, plan=replace(model.plan, ops=model.plan.ops[:-1])), EngineConfig())


def test_too_little_memory_is_said(tiny: Callable[[str], Model]) -> None:
    with pytest.raises(ModelError, match="memory"):
        NativeRunner(tiny("llama"), EngineConfig(cache_tokens=2**30, max_batch_tokens=65536))


def test_unfinished_runtime_refuses_to_run() -> None:
    sizes = {"max_tokens": 4, "max_outputs": 1, "pages": 1, "layers": 1, "kv_heads": 1, "head_dim": 16}
    runtime = _native.Runtime(threads=1, isa="auto", vocab=4, context=8, exact=False, **sizes)
    with pytest.raises(ValueError, match="finished"):
        runtime.logits(ints([1]), ints([0]), ints([1]), ints([[0]]))
    with pytest.raises(ValueError, match="finished"):
        _ = runtime.token_bytes
    with pytest.raises(ValueError, match="select"):
        runtime.finish()
    runtime.add_buffer("x", 32)
    with pytest.raises(ValueError, match="twice"):
        runtime.add_buffer("x", 32)
    with pytest.raises(ValueError, match="no matrix"):
        runtime.embed("x", "w", 1.0, "")
    for bad in ({"threads": 0}, {"isa": "sse9"}, {"head_dim": 24}, {"max_outputs": 5}, {"pages": 0}):
        with pytest.raises(ValueError):
            _native.Runtime(**{**sizes, "threads": 1, "isa": "auto", "vocab": 4, "context": 8, "exact": False, **bad})


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_a_copied_page_serves_as_the_original(precision: Any, tiny: Callable[[str], Model]) -> None:
    model = tiny("gemma3")  # some of its layers see a window only
    runner = NativeRunner(model, EngineConfig(threads=2, precision=precision))
    tokens = tokens_of(model, 80)
    runner.logits(batch(tokens[:79]))
    want = runner.logits(batch(tokens[79:], 79))
    for source, target in ((1, 5), (2, 1), (1, 1)):
        runner.copy_page(source, target)
    runner.logits(batch(tokens[:60], pages=[2, 6]))  # the original goes its own way
    np.testing.assert_array_equal(runner.logits(batch(tokens[79:], 79, pages=[0, 5, 1])), want)


def test_pages_that_are_none_are_not_copied(tiny: Callable[[str], Model]) -> None:
    runner = NativeRunner(tiny("llama"), EngineConfig(threads=1))
    for source, target in ((-1, 0), (0, -1), (runner.pages, 0), (0, runner.pages)):
        with pytest.raises(ValueError, match="copy_page: page out of range"):
            runner.copy_page(source, target)
    with pytest.raises(ValueError, match="not finished"):
        _native.Runtime(
            threads=1, isa="auto", max_tokens=1, max_outputs=1, pages=1, layers=1, kv_heads=1, head_dim=16, vocab=1,
            context=1, exact=True,
        ).copy_page(0, 0)  # fmt: skip


@pytest.mark.parametrize("name", sorted(TINY))
def test_hidden_states_equal_those_of_transformers(name: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(name)
    tokens = tokens_of(model, 45)
    with torch.inference_mode():
        peer = tiny_model(name)
        want = peer.base_model(torch.tensor([tokens])).last_hidden_state[0].numpy()
    want = want / getattr(peer.config, "logits_scaling", 1.0)  # granite's, which belongs to the final norm here
    runner = NativeRunner(model, EngineConfig(threads=2, precision="exact"))
    got = runner.hidden(batch(tokens))
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-4)
    part = runner.hidden(batch(tokens[:20])), runner.hidden(batch(tokens[20:], 20, [0, 1]))
    np.testing.assert_allclose(np.concatenate(part), want, atol=2e-4)


def test_drafts_behind_a_mask_are_refused(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    runner = NativeRunner(model, EngineConfig(threads=2))
    sampler = runner.sampler(SamplingParams(), [1])
    sampler.set_mask(np.full(3, 0xFFFFFFFF, np.uint32))
    drafted = replace(batch([1, 2]), drafted=ints([1]))
    with pytest.raises(ValueError, match="drafts behind a mask"):
        runner.step(drafted, [sampler])


def test_a_mask_decides_what_a_step_chooses(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    runner = NativeRunner(model, EngineConfig(threads=2))
    logits = runner.logits(batch([1, 2, 3]))[0]
    allowed = np.argsort(logits)[:5]
    mask = np.zeros(model.plan.vocab, np.uint8)
    mask[allowed] = 1
    sampler = runner.sampler(SamplingParams(), [1, 2, 3])
    sampler.set_mask(np.packbits(mask, bitorder="little").view(np.uint32))
    assert runner.step(batch([1, 2, 3]), [sampler]).tokens == [[int(allowed[-1])]]
