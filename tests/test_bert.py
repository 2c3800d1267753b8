"""Encoders of BERT's family against transformers: folders, plans, the oracle and every ISA; hostile folders."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from encoders import CONTEXT, FAMILIES, LABELS, hidden, logits, random_ids, save, tiny
from millis import _native
from millis.config import EngineConfig
from millis.engine.eight_bits import eight_bits
from millis.engine.encoder_runner import EncoderRunner, groups
from millis.models.config import Head
from millis.models.load import Model, load_model
from millis.models.oracle import Oracle
from millis.models.tensor import Tensor
from millis.types import FormatError, ModelError, RequestError

ISAS = _native.supported_isas()
LENGTHS = (1, 2, 15, 16, 17, 40, CONTEXT)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """What transformers runs, and the same as we read it."""
    model = tiny(request.param)
    return model, load_model(save(model, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(tiny("bert"), tmp_path_factory.mktemp("bert")))


def runner(model: Model, isa: str = "auto", **options: Any) -> EncoderRunner:
    return EncoderRunner(model, EngineConfig(isa=isa, **{"threads": 2, "precision": "exact", **options}))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_oracle_is_transformers(length: int, saved: tuple[Any, Model]) -> None:
    model, ours = saved
    ids = random_ids(length)
    embedding, found = Oracle(ours.plan, ours.checkpoint.tensors).encode(ids)
    np.testing.assert_allclose(embedding, hidden(model, ids).mean(0), atol=2e-5)
    assert found is not None
    np.testing.assert_allclose(found, logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_is_the_oracle_alone_and_together(isa: str, threads: int, saved: tuple[Any, Model]) -> None:
    _, ours = saved
    oracle = Oracle(ours.plan, ours.checkpoint.tensors)
    texts = [random_ids(length) for length in LENGTHS]
    wanted = [oracle.encode(ids) for ids in texts]
    native = runner(ours, isa, threads=threads, max_batch_tokens=96)  # several steps
    np.testing.assert_allclose(native.embeddings(texts), [embedding for embedding, _ in wanted], atol=2e-5)
    np.testing.assert_allclose(native.logits(texts), [row for _, row in wanted], atol=5e-5)  # of up to 11
    for ids, (embedding, row) in zip(texts, wanted, strict=True):
        np.testing.assert_allclose(native.embeddings([ids])[0], embedding, atol=2e-5)
        np.testing.assert_allclose(native.logits([ids])[0], row, atol=5e-5)


def test_token_types_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny("bert")
    ours = load_model(save(model, tmp_path))
    ids, types = random_ids(20), [0] * 12 + [1] * 8
    plain, typed = runner(ours).logits([ids]), runner(ours).logits([ids, ids[:5]], [types, types[:5]])
    np.testing.assert_allclose(typed[0], logits(model, ids, types), atol=2e-5)
    assert np.abs(typed[0] - plain[0]).max() > 0.01
    np.testing.assert_allclose(Oracle(ours.plan, ours.checkpoint.tensors).encode(ids, types)[1], typed[0], atol=2e-5)


def test_no_neighbour_changes_a_text(bert: Model) -> None:
    native = runner(bert)
    alone = native.embeddings([random_ids(9)])[0]
    for others in (1, 3, 70):  # 70: more texts than are pooled at once
        batch = [random_ids(1 + i % 30, seed=i) for i in range(others)]
        np.testing.assert_allclose(native.embeddings([*batch, random_ids(9)])[-1], alone, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_activations(activation: str, tmp_path: Path) -> None:
    model = tiny("bert", hidden_act=activation)
    ids = random_ids(12)
    found = runner(load_model(save(model, tmp_path))).logits([ids])[0]
    np.testing.assert_allclose(found, logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_and_tanh_are_exact_wherever_they_are_asked(isa: str) -> None:
    """A table of values as the embedding, an identity with the activation behind it."""
    values = np.concatenate([np.linspace(-12, 12, 6001), [0.0, 1e-8, -1e-8, 100, -100, 1e20, -1e20]]).astype(np.float32)
    table = np.zeros((len(values), 16), np.float32)
    table[:, 0] = values
    for name, exact in (("gelu", torch.nn.functional.gelu), ("tanh", torch.tanh), ("relu", torch.relu)):
        native = _native.Runtime(
            threads=1, isa=isa, max_tokens=8192, max_outputs=8192, pages=1, layers=1, kv_heads=1, head_dim=16,
            vocab=len(values), context=1, exact=True,
        )  # fmt: skip
        for buffer in ("x", "y", "p"):
            native.add_buffer(buffer, 16)
        native.add_matrix("table", 0, *table.shape, table.reshape(-1).view(np.uint8))
        native.add_matrix("identity", 0, 16, 16, np.eye(16, dtype=np.float32).reshape(-1).view(np.uint8))
        native.embed("x", "table", 1.0, "")
        native.matmul("y", "x", ["identity"], [], name, "", "")
        native.pool("p", "y", True)
        native.finish()
        found = native.texts(np.arange(len(values), dtype=np.int32), np.ones(len(values), np.int32))[:, 0]
        wanted = exact(torch.from_numpy(values).double()).numpy()
        np.testing.assert_allclose(found, wanted, atol=5e-7, rtol=2e-7)


def test_the_body_alone_has_no_head_and_pools_as_its_files_say(tmp_path: Path) -> None:
    model = tiny("bert", head=False)
    ids = random_ids(11)
    folder = save(model, tmp_path)
    found = runner(load_model(folder)).embeddings([ids])[0]
    np.testing.assert_allclose(found, hidden(model, ids).mean(0), atol=2e-5)
    with pytest.raises(ValueError, match="no head"):
        runner(load_model(folder)).logits([ids])
    modules = [{"type": "sentence_transformers.models.Transformer"}, pooling("1_Pooling")]
    write(folder, modules, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    model_of_folder = load_model(folder)
    np.testing.assert_allclose(runner(model_of_folder).embeddings([ids])[0], hidden(model, ids)[0], atol=2e-5)
    assert model_of_folder.plan.context == 32 and load_model(folder, CONTEXT).plan.context == CONTEXT


def pooling(path: str) -> dict[str, str]:
    return {"type": "sentence_transformers.models.Pooling", "path": path}


def write(folder: Path, modules: Any, mode: dict[str, bool]) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **mode}))


@pytest.mark.parametrize(
    ("modules", "mode", "fault"),
    [
        ([{"type": "sentence_transformers.models.Dense"}], {}, "does not run the module 'Dense'"),
        ([pooling("1_Pooling")], {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens is not one of"),
        ([pooling("1_Pooling")], {}, "the pooling none is not one of"),
        ([pooling("../1_Pooling")], {"pooling_mode_mean_tokens": True}, "must name a folder beside it"),
        ({}, {}, "must be a list of objects"),
    ],
)
def test_poolings_that_are_not_computed(modules: Any, mode: dict[str, bool], fault: str, tmp_path: Path) -> None:
    folder = save(tiny("bert", head=False), tmp_path)
    write(folder, modules, mode)
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hidden_act": "swish"}, "the activation 'swish' is not gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type to 'relative_key'"),
        ({"is_decoder": True}, "is_decoder to True"),
        ({"architectures": ["BertForTokenClassification"]}, "has a head that Millis does not run"),
        ({"architectures": ["BertModel", "BertModel"]}, "architectures must list one name"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0 to 1"),
        ({"id2label": {"0": "a", "1": "a"}}, "each label a name of its own"),
        ({"id2label": {"0": "a", "1": "b"}}, "'cls.output.bias' is 4; its configuration asks 2"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is not one of"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"type_vocab_size": 3}, "'token_types.weight' is 2 × 64"),
        ({"num_hidden_layers": 3}, "'blk.2.attn_q.weight' is missing"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


def test_the_head_of_a_folder(bert: Model, tmp_path: Path) -> None:
    assert bert.checkpoint.config.head == Head(labels=tuple(LABELS.values()), problem="single_label")
    several = tiny("bert", problem_type="multi_label_classification")
    head = load_model(save(several, tmp_path)).checkpoint.config.head
    assert head is not None and head.problem == "multi_label"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"embedding_size": 32}, "embedding_size must be hidden_size, 64"),
        ({"rotary_value": True}, "rotary_value to True"),
        ({"max_position_embeddings": 32}, "not the table of sines and cosines"),
    ],
)
def test_roformers_that_are_not_computed(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = save(tiny("roformer"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


def test_other_angles_of_a_roformer_are_refused(tmp_path: Path) -> None:
    model = tiny("roformer")
    with torch.no_grad():
        model.roformer.encoder.embed_positions.weight[5, 1] += 0.1
    with pytest.raises(FormatError, match="not the table of sines and cosines"):
        load_model(save(model, tmp_path))


@pytest.mark.parametrize("head_dim", [8, 24])
def test_a_head_dim_that_the_kernels_cannot_take(head_dim: int, tmp_path: Path) -> None:
    model = load_model(save(tiny("bert", hidden_size=4 * head_dim), tmp_path))
    with pytest.raises(ModelError, match="multiple of 16"):
        runner(model)


def test_batches_that_cannot_run(bert: Model) -> None:
    native = runner(bert)._runtime

    def ints(*values: int) -> np.ndarray:
        return np.asarray(values, np.int32)

    for tokens, lengths, types, fault in (
        (ints(1, 2), ints(3), None, "do not add up"),
        (ints(1, 120), ints(2), None, "out of the vocabulary"),
        (ints(), ints(), None, "or none"),
        (ints(1, 2), ints(2, 0), None, "or empty"),
        (ints(*[1] * (CONTEXT + 1)), ints(CONTEXT + 1), None, "longer than the context"),
        (ints(1, 2), ints(2), ints(0), "one type for each token"),
        (ints(1, 2), ints(2), ints(0, 2), "no such token type"),
    ):
        with pytest.raises(ValueError, match=fault):
            native.texts(tokens, lengths, False, types)
    with pytest.raises(ValueError, match="runs an encoder"):
        native.logits(ints(1), ints(0), ints(1), ints(0).reshape(1, 1))


def test_a_longer_context_than_there_are_positions(bert: Model) -> None:
    with pytest.raises(RequestError, match=rf"context must lie in \[1, {CONTEXT}\]"):
        load_model(bert.checkpoint.path, CONTEXT + 1)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_value_that_is_none(value: float, precision: Any, bert: Model) -> None:
    name = "blk.1.ffn_up.weight"
    values = bert.checkpoint.tensors[name].numpy()
    values[3, 5] = value
    tensors = {**bert.checkpoint.tensors, name: Tensor.from_numpy(name, values)}
    damaged = replace(bert, checkpoint=replace(bert.checkpoint, tensors=tensors))
    with pytest.raises(FormatError, match=f"{name} holds NaN"):
        EncoderRunner(damaged, EngineConfig(threads=1, precision=precision))


def test_groups_hold_every_text_once() -> None:
    lengths = [60, 40, 40, 30, 30, 30, 10, 1]
    found = groups(lengths, 100)
    assert [i for group in found for i in group] == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 100 for group in found) and len(found) == 3


@pytest.mark.parametrize("isa", ISAS)
def test_fast_is_near_and_the_same_on_every_isa(isa: str, saved: tuple[Any, Model]) -> None:
    """Weights and activations in eight bits; random weights forgive their rounding less than trained ones do."""
    _, ours = saved
    texts = [random_ids(length) for length in (1, 13, 14, 15, 29, 40, CONTEXT)]
    exact, fast = runner(ours), runner(ours, isa, precision="fast")
    scalar = runner(ours, "scalar", precision="fast")
    for found, near, wanted, most in (
        (fast.embeddings(texts), scalar.embeddings(texts), exact.embeddings(texts), 0.08),
        (fast.logits(texts), scalar.logits(texts), exact.logits(texts), 0.3),
    ):
        error = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert 1e-5 < error.max() < most, "eight bits, and no more than their rounding"
        apart = np.linalg.norm(found - near, axis=1) / np.linalg.norm(wanted, axis=1)
        assert apart.max() < 0.03, "a value on the edge may be rounded to the other side, and no more"
        assert np.median(apart) < 1e-4


@pytest.mark.parametrize("rows", [1, 3, 13, 14, 15, 28, 29, 61])
@pytest.mark.parametrize("isa", ISAS)
def test_byte_products_are_those_of_the_rounded_values(isa: str, rows: int) -> None:
    """x and w rounded in NumPy, by 16 and 32 columns, then multiplied in float64; no whole number of panels."""
    rng = np.random.default_rng(rows)
    x, w = rng.normal(0, 3, (rows, 96)), rng.normal(0, 1, (40, 96))
    x[0] = 0
    x, bias = x.astype(np.float32), rng.normal(size=40).astype(np.float32)
    blocks = gguf.quants.quantize(w.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    native = _native.Runtime(
        threads=2, isa=isa, max_tokens=64, max_outputs=64, pages=1, layers=1, kv_heads=1, head_dim=16, vocab=rows,
        context=1, exact=False, bytes=True,
    )  # fmt: skip
    for buffer, width in (("x", 96), ("y", 40), ("p", 40)):
        native.add_buffer(buffer, width)
    native.add_matrix("table", 0, *x.shape, x.reshape(-1).view(np.uint8))
    native.add_matrix("w", 8, 40, 96, np.ascontiguousarray(blocks).reshape(-1).view(np.uint8))
    native.add_vector("b", bias)
    native.embed("x", "table", 1.0, "")
    native.matmul("y", "x", ["w"], ["b"], "", "", "")
    native.pool("p", "y", True)
    native.finish()
    found = native.texts(np.arange(rows, dtype=np.int32), np.ones(rows, np.int32))
    step = np.abs(x.reshape(rows, 6, 16)).max(2, keepdims=True) / np.float32(127)
    whole = np.rint(np.divide(x.reshape(rows, 6, 16), step, out=np.zeros((rows, 6, 16), np.float32), where=step > 0))
    rounded = (whole.astype(np.float64) * step).reshape(rows, 96)
    known = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0).astype(np.float64)
    if isa == "amx" and rows > 8:  # tiles of bfloat16 are faster still
        np.testing.assert_allclose(found, x @ known.T + bias, atol=0.5)
    else:
        np.testing.assert_allclose(found, rounded @ known.T + bias, atol=2e-4)


def test_eight_bits_are_those_of_the_gguf_package(bert: Model) -> None:
    made = eight_bits(bert.plan, bert.checkpoint.tensors)
    kind = gguf.GGMLQuantizationType.Q8_0
    changed = {name for name, tensor in made.items() if tensor is not bert.checkpoint.tensors[name]}
    products = re.compile(r"blk\.\d\.(attn_(q|k|v|output)|ffn_(up|down))\.weight|cls\.weight")
    assert changed == {name for name in made if products.fullmatch(name)}
    for name in changed:
        values = bert.checkpoint.tensors[name].numpy()
        back = gguf.quants.dequantize(made[name].data, kind).reshape(values.shape)
        step = np.abs(values.reshape(-1, 32)).max(1, keepdims=True) / 127
        assert (np.abs(back - values).reshape(-1, 32) <= 0.56 * step).all()
        np.testing.assert_array_equal(back, made[name].numpy())
