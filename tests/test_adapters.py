"""Adapters that peft made, on every ISA, against transformers with them merged; mixed batches; hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adapter_support import save_adapter
from gguf_files import write_tiny
from millis import _native
from millis.bench.adapters import random_adapter
from millis.config import EngineConfig
from millis.engine.native_runner import NativeRunner
from millis.engine.runner import Batch
from millis.models.adapter import MOST_RANK, AdapterWeights, read_adapter
from millis.models.load import Model, load_model, read_checkpoint
from millis.quantize.export import export_gguf
from millis.types import FormatError, ModelError, SamplingParams
from reference import next_logits, real_reference, tiny_model
from test_export import save, tiny_tokenizer

ISAS = _native.supported_isas()
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
PHI3 = {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
LFM2 = {"target_modules": ["q_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"]}


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


def batch(*sequences: list[int], adapters: list[Any] | None = None) -> Batch:
    used = [-(-len(tokens) // 32) for tokens in sequences]
    first = np.cumsum([0, *used])
    tables = np.full((len(sequences), max(used)), -1, np.int32)
    for s, count in enumerate(used):
        tables[s, :count] = range(first[s], first[s] + count)
    lengths = [len(tokens) for tokens in sequences]
    return Batch(ints(sum(sequences, [])), ints([0] * len(sequences)), ints(lengths), tables, adapters=adapters)


def tokens_of(model: Model, count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, model.plan.vocab, count)]


class Made:
    """A tiny model in a folder, and adapters of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.theirs = tiny_model(name)
        self.theirs.save_pretrained(folder / "model")
        self.model = load_model(folder / "model")
        self.folder, self.settings = folder, {"gpt2": GPT2, "phi3": PHI3, "lfm2": LFM2}.get(name, {})

    def adapter(self, name: str, **settings: Any) -> tuple[Any, Any]:
        """(its weights as read, transformers' model with it merged)."""
        merged = save_adapter(self.theirs, self.folder / name, **{**self.settings, **settings})
        return read_adapter(self.folder / name, self.model.checkpoint.config), merged


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    found: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in found:
            found[name] = Made(name, tmp_path_factory.mktemp(name))
        return found[name]

    return make


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "phi3",
        "qwen2",
        "gemma",
        "gemma3",
        "granite",
        "smollm3",
        "ernie4_5",
        "exaone4",
        "hunyuan",
        "phi4_mini",
        "olmo2",
        "lfm2",
        "gpt2",
    ],
)
def test_logits_are_those_of_merged_weights(name: str, isa: str, made: Callable[[str], Made]) -> None:
    tiny = made(name)
    weights, merged = tiny.adapter("one", rank=5)
    for threads in (1, 3):
        runner = NativeRunner(tiny.model, EngineConfig(isa=isa, threads=threads, precision="exact"))
        adapter = runner.adapter(weights)
        for length in (1, 7, 45):
            tokens = tokens_of(tiny.model, length)
            want = next_logits(merged, tokens)
            got = runner.logits(batch(tokens, adapters=[adapter]), every=True)
            np.testing.assert_allclose(got, want, atol=3e-4 * np.abs(want).max())
            plain = next_logits(tiny.theirs, tokens)
            assert np.abs(got - plain).max() > 0.1 * np.abs(want).max(), "an adapter that changes nothing shows nothing"


@pytest.mark.parametrize("rows", [127, 128])
def test_parts_of_phi3_that_do_not_fit(rows: int, made: Callable[[str], Made]) -> None:
    """127 rows for q, k and v together; and q by itself, too."""
    tiny = made("phi3")
    tiny.adapter("bad")
    file, stem = tiny.folder / "bad" / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn."
    tensors = load_file(file)
    tensors[f"{stem}qkv_proj.lora_B.weight"] = np.zeros((rows, 4), np.float32)
    if rows == 128:
        tensors[f"{stem}q_proj.lora_A.weight"] = tensors[f"{stem}qkv_proj.lora_A.weight"]
    save_file(tensors, file)
    settings = json.loads((tiny.folder / "bad" / "adapter_config.json").read_text())
    settings["target_modules"] += ["q_proj"]
    (tiny.folder / "bad" / "adapter_config.json").write_text(json.dumps(settings))
    message = "a matrix of 128 rows, not" if rows == 127 else "changes .*q_proj.weight twice"
    with pytest.raises(FormatError, match=message):
        read_adapter(tiny.folder / "bad", tiny.model.checkpoint.config)


@pytest.mark.parametrize("isa", ISAS)
def test_fast_runs_are_near_them(isa: str, made: Callable[[str], Made]) -> None:
    tiny = made("llama")
    weights, merged = tiny.adapter("rank", rank=24, use_rslora=True, size=0.5)
    runner = NativeRunner(tiny.model, EngineConfig(isa=isa, threads=2))
    adapter = runner.adapter(weights)
    for length in (2, 20, 90):
        tokens = tokens_of(tiny.model, length)
        want = next_logits(merged, tokens)
        assert (
            np.abs(runner.logits(batch(tokens, adapters=[adapter]), every=True) - want).max()
            < 0.02 * np.abs(want).max()
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "lengths", [[1] * 4, [1] * 20, [3, 1, 40, 1, 1, 9, 2], [70, 70]], ids=["few", "many", "mixed", "long"]
)
def test_a_mixed_batch_gives_what_each_gives_alone(lengths: list[int], isa: str, made: Callable[[str], Made]) -> None:
    tiny = made("qwen2")
    runner = NativeRunner(tiny.model, EngineConfig(isa=isa, threads=2, precision="exact", cache_tokens=2048))
    parts = {"target_modules": ["v_proj", "down_proj"], "rank": 2}
    kinds = [runner.adapter(tiny.adapter(f"kind{i}", seed=i, **({} if i else parts))[0]) for i in range(3)]
    adapters = [(*kinds, None)[i % 4] for i in range(len(lengths))]
    sequences = [tokens_of(tiny.model, length, seed) for seed, length in enumerate(lengths)]
    got = runner.logits(batch(*sequences, adapters=adapters))
    for row, tokens, adapter in zip(got, sequences, adapters, strict=True):
        alone = runner.logits(batch(tokens, adapters=None if adapter is None else [adapter]))[0]
        np.testing.assert_allclose(row, alone, atol=2e-5 * np.abs(alone).max())


def test_a_row_without_an_adapter_is_what_it_was(model_path: Callable[[str], Path]) -> None:
    model = load_model(model_path("smollm2"), 64)
    runner = NativeRunner(model, EngineConfig(threads=2, cache_tokens=512))
    weights = random_adapter(model.checkpoint.config, rank=16, seed=1)
    for count in (2, 12):
        sequences = [tokens_of(model, 1, seed) for seed in range(count)]
        before = runner.logits(batch(*sequences))
        adapters = [runner.adapter(weights), *[None] * (count - 1)]
        after = runner.logits(batch(*sequences, adapters=adapters))
        np.testing.assert_array_equal(before[1:], after[1:])
        assert np.abs(before[0] - after[0]).max() > 0.01
        np.testing.assert_array_equal(before, runner.logits(batch(*sequences)))


@pytest.fixture(scope="module")
def smollm2(
    tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]
) -> tuple[Model, AdapterWeights, np.ndarray]:
    """The model, an adapter of its q and k, and the logits of both after each of six tokens, as peft merges them."""
    path, folder = model_path("smollm2"), tmp_path_factory.mktemp("smollm2")
    model = load_model(path, 64)
    merged = save_adapter(real_reference(path), folder, rank=8, size=0.05, target_modules=["q_proj", "k_proj"])
    return model, read_adapter(folder, model.checkpoint.config), next_logits(merged, tokens_of(model, 6))


@pytest.mark.parametrize("isa", ISAS)
def test_an_adapter_of_a_gguf_model_follows_its_order_of_rows(
    isa: str, smollm2: tuple[Model, AdapterWeights, np.ndarray]
) -> None:
    """GGUF stores llama's q and k permuted; peft does not."""
    model, weights, want = smollm2
    runner = NativeRunner(model, EngineConfig(isa=isa, threads=2, precision="exact"))
    adapter, tokens = runner.adapter(weights), tokens_of(model, 6)
    np.testing.assert_allclose(
        runner.logits(batch(tokens, adapters=[adapter]), every=True), want, atol=2e-3 * np.abs(want).max()
    )


@pytest.mark.parametrize("name", ["granite", "smollm3", "ernie4_5", "exaone4", "hunyuan", "olmo3", "lfm2"])
def test_adapters_of_exported_models(name: str, tmp_path: Path, made: Callable[[str], Made]) -> None:
    """GGUF permutes q and k of granite and smollm3, and not those of ernie4_5, exaone4, hunyuan, olmo3 and lfm2."""
    tiny = made(name)
    _, merged = tiny.adapter("exported", target_modules=["q_proj", "k_proj"])
    export_gguf(read_checkpoint(save(tiny.folder / "model", tiny_tokenizer())), tmp_path / "m.gguf")
    model = load_model(tmp_path / "m.gguf")
    runner = NativeRunner(model, EngineConfig(threads=1, precision="exact"))
    adapter = runner.adapter(read_adapter(tiny.folder / "exported", model.checkpoint.config))
    tokens = tokens_of(model, 12)
    want = next_logits(merged, tokens)
    got = runner.logits(batch(tokens, adapters=[adapter]), every=True)
    np.testing.assert_allclose(got, want, atol=3e-4 * np.abs(want).max())


def test_adapters_of_llama_cpp(tmp_path: Path, made: Callable[[str], Made]) -> None:
    """Written by the gguf package as llama.cpp's converter does, q and k permuted as in its models."""
    tiny = made("llama")
    weights, merged = tiny.adapter("cpp")
    heads = {"attn_q": 4, "attn_k": 2}
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for pair in weights.pairs:
        b, part = pair.b, pair.weight.split(".")[2]
        if part in heads:
            b = b.reshape(heads[part], 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        writer.add_tensor(f"{pair.weight}.lora_a", pair.a)
        writer.add_tensor(f"{pair.weight}.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    runner = NativeRunner(tiny.model, EngineConfig(threads=2, precision="exact"))
    adapter = runner.adapter(read_adapter(tmp_path / "lora.gguf", tiny.model.checkpoint.config))
    tokens = tokens_of(tiny.model, 9)
    want = next_logits(merged, tokens)
    np.testing.assert_allclose(
        runner.logits(batch(tokens, adapters=[adapter]), every=True), want, atol=3e-4 * np.abs(want).max()
    )
    write_tiny(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="general.type is"):
        read_adapter(tmp_path / "model.gguf", tiny.model.checkpoint.config)


def test_drafts_are_verified_with_the_adapter(made: Callable[[str], Made]) -> None:
    """Guesses come from elsewhere; what is chosen behind them is what the adapter's model chooses."""
    tiny = made("llama")
    weights, merged = tiny.adapter("draft", seed=7, size=0.6)
    runner = NativeRunner(tiny.model, EngineConfig(threads=2, precision="exact"))
    adapter = runner.adapter(weights)
    tokens = tokens_of(tiny.model, 12)
    want = next_logits(merged, tokens).argmax(-1)
    right = int(want[-1])
    work = batch([*tokens, right, 3], adapters=[adapter])
    work.drafted = ints([2])
    sampled = runner.step(work, [runner.sampler(SamplingParams(), tokens)])
    after = next_logits(merged, [*tokens, right, 3]).argmax(-1)
    expected = [right, int(after[-2])] + ([int(after[-1])] if after[-2] == 3 else [])
    assert sampled.tokens == [expected]


SETTINGS = {
    "dora": ({"use_dora": True}, "use_dora = True is not supported"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "bias": ({"bias": "all"}, "bias = 'all'"),
    "pattern of layers": ({"layers_pattern": "h"}, "layers_pattern"),
    "ranks apart": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    "other kind": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type"),
    "of tomorrow": ({"use_something": 3}, "use_something = 3"),
    "no rank": ({"r": 0}, r"r must lie in \[1, 512\]"),
    "rank of another": ({"r": 9}, "rank 4; adapter_config.json says r = 9"),
    "rank as text": ({"r": "4"}, "r must lie"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha must be a number"),
    "targets": ({"target_modules": []}, "target_modules must list"),
    "not a target": ({"target_modules": ["k_proj"]}, "none of the target_modules"),
}


@pytest.fixture
def lora(tmp_path: Path, made: Callable[[str], Made]) -> tuple[Path, Any]:
    tiny = made("llama")
    tiny.adapter("plain")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((tiny.folder / "plain" / name).read_bytes())
    return tmp_path, tiny.model.checkpoint.config


@pytest.mark.parametrize("case", sorted(SETTINGS))
def test_settings_that_are_not_supported_are_named(case: str, lora: tuple[Path, Any]) -> None:
    folder, config = lora
    changed, message = SETTINGS[case]
    read_adapter(folder, config)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(FormatError, match=message):
        read_adapter(folder, config)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({f"{Q}.lora_A.weight": np.full((4, 64), np.nan, np.float32)}, "no finite number"),
    "wide A": ({f"{Q}.lora_A.weight": np.ones((4, 65), np.float32)}, "do not fit"),
    "short B": ({f"{Q}.lora_B.weight": np.ones((127, 4), np.float32)}, "do not fit"),
    "flat": ({f"{Q}.lora_A.weight": np.ones(256, np.float32)}, "rank must lie"),
    "ranks differ": ({f"{Q}.lora_A.weight": np.ones((3, 64), np.float32)}, "do not fit"),
    "A alone": ({f"{Q}.lora_B.weight": None}, "lora_A alone"),
    "no layer": (
        {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.ones((4, 64), np.float32)},
        "blk.9",
    ),
    "output": ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32)}, "none of the target_modules"),
    "magnitudes": ({f"{Q}.lora_magnitude_vector": np.ones(128, np.float32)}, "not supported"),
    "other prefix": ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 64), np.float32)}, "not supported"),
    "too large": ({f"{Q}.lora_A.weight": np.ones((MOST_RANK + 1, 64), np.float32)}, "rank must lie"),
}


@pytest.mark.parametrize("case", sorted(TENSORS))
def test_tensors_that_do_not_fit_are_named(case: str, lora: tuple[Path, Any]) -> None:
    folder, config = lora
    changed, message = TENSORS[case]
    tensors = load_file(folder / "adapter_model.safetensors") | changed
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=message):
        read_adapter(folder, config)


def test_files_that_are_missing_or_cut(lora: tuple[Path, Any], tmp_path: Path) -> None:
    folder, config = lora
    with pytest.raises(ModelError, match="no adapter at"):
        read_adapter(tmp_path / "nowhere", config)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    for cut in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"safetensors|early"):
            read_adapter(folder, config)
    file.unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="safetensors"):
        read_adapter(folder, config)


def test_the_runtime_checks_for_itself(made: Callable[[str], Made]) -> None:
    tiny = made("llama")
    weights = tiny.adapter("own")[0]
    runner, other = (NativeRunner(tiny.model, EngineConfig(threads=1)) for _ in range(2))
    good = [(pair.weight, pair.a, pair.b, pair.scale) for pair in weights.pairs]
    name, a, b, scale = good[0]
    for bad, message in (
        ([("output.weight", a, b, scale)], "no product of this model reads"),
        ([(name, a[:, 1:].copy(), b, scale)], "must be"),
        ([(name, a[1:].copy(), b, scale)], "differ in rank"),
        ([(name, a, b, np.inf)], "no finite number"),
        ([*good, good[0]], "given twice"),
        ([(name, np.ones((513, 64), np.float32), np.ones((128, 513), np.float32), 1.0)], "rank"),
    ):
        with pytest.raises(ValueError, match=message):
            runner._runtime.adapter(bad)
    adapter = runner.adapter(weights)
    with pytest.raises(ValueError, match="another runtime"):
        other.logits(batch([1, 2], adapters=[adapter]))
    with pytest.raises(ValueError, match="one adapter or None for each"):
        runner.logits(batch([1, 2], adapters=[adapter, None]))
    del runner  # an adapter keeps the runtime that it belongs to
    assert adapter.nbytes > 0
