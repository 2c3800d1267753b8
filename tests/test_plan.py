"""What every plan promises the native runtime, checked by walking its ops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millis.models.checkpoint import Checkpoint
from millis.models.load import build_plan, read_checkpoint
from millis.models.plan import Attention, Convolve, Embed, GatedMatMul, MatMul, Norm, Op, Plan, Select
from reference import TINY, tiny_model


@pytest.fixture(scope="module", params=TINY)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def plan(checkpoint: Checkpoint) -> Plan:
    return build_plan(checkpoint, 64)


def reads(op: Op) -> Iterator[str]:
    """The buffers that an op reads."""
    if isinstance(op, Attention):
        yield op.qkv
    elif isinstance(op, Convolve):
        yield op.bcx
    elif not isinstance(op, Embed):
        yield op.x
    if isinstance(op, Norm | MatMul) and op.residual:
        yield op.residual


def of_kind(plan: Plan, kind: Any) -> list:
    return [op for op in plan.ops if isinstance(op, kind)]


def test_buffers_are_written_before_they_are_read_and_all_are_declared(plan: Plan) -> None:
    written: set[str] = set()
    for op in plan.ops:
        assert set(reads(op)) <= written, op
        written.add(op.out)
    assert written == set(plan.widths)


def test_ends_in_logits(plan: Plan) -> None:
    assert plan.ops[-1].out == "logits" and plan.widths["logits"] == plan.vocab == 96
    assert all(op.out != "logits" for op in plan.ops[:-1])


def test_one_select_after_the_last_layer(plan: Plan) -> None:
    """Ops behind it run on other rows, so they neither attend nor touch what it read."""
    (at,) = [index for index, op in enumerate(plan.ops) if isinstance(op, Select)]
    tail = plan.ops[at + 1 :]
    assert not any(isinstance(op, Attention | Convolve | Embed) for op in tail)
    fresh = {plan.ops[at].out}
    for op in tail:
        assert set(reads(op)) <= fresh and op.out not in reads(plan.ops[at])
        fresh.add(op.out)


def test_no_op_overwrites_its_input(plan: Plan) -> None:
    for op in plan.ops:
        if isinstance(op, Attention):
            assert op.out != op.qkv
        elif isinstance(op, Convolve):
            assert op.out != op.bcx
        elif not isinstance(op, Embed):
            assert (op.out == op.x) == (isinstance(op, Norm) and op.columns is not None)


def test_layers_attend_once_each_in_order(plan: Plan, checkpoint: Checkpoint) -> None:
    kept = 2 * plan.kv_heads * plan.head_dim  # of a token in a layer of the cache
    layers: list[int] = []
    for op in of_kind(plan, Attention | Convolve):
        count = 1 if isinstance(op, Attention) else -(-plan.widths[op.out] // kept)
        layers += range(op.layer, op.layer + count)
    assert layers == list(range(plan.layers))
    assert len(of_kind(plan, Attention | Convolve)) == checkpoint.config.layers
    for op in of_kind(plan, Attention):
        assert (op.kv_heads, op.head_dim) == (plan.kv_heads, plan.head_dim)
        assert plan.widths[op.out] == op.heads * op.head_dim
        assert plan.widths[op.qkv] == (op.heads + 2 * op.kv_heads) * op.head_dim


def test_every_tensor_of_the_checkpoint_is_used_once_named(plan: Plan, checkpoint: Checkpoint) -> None:
    names = plan.weights()
    assert len(names) == len(set(names))
    assert set(names) == set(checkpoint.tensors)


def test_weights_fit_the_buffers(plan: Plan, checkpoint: Checkpoint) -> None:
    shape = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for op in plan.ops:
        match op:
            case Embed():
                assert shape[op.weight] == (plan.vocab, plan.widths[op.out])
            case Norm():
                begin, end = op.columns or (0, plan.widths[op.out])
                assert shape[op.weight] == (end - begin,) and end <= plan.widths[op.x] == plan.widths[op.out]
            case MatMul():
                assert sum(shape[name][0] for name in op.weights) == plan.widths[op.out]
                assert {shape[name][1] for name in op.weights} == {plan.widths[op.x]}
                if op.biases:
                    assert [shape[name] for name in op.biases] == [shape[name][:1] for name in op.weights]
            case GatedMatMul():
                assert shape[op.gate] == shape[op.up] == (plan.widths[op.out], plan.widths[op.x])
            case Convolve():
                assert shape[op.weight] == (plan.widths[op.out], op.taps)
                assert plan.widths[op.bcx] == 3 * plan.widths[op.out]
            case Attention():
                assert {shape[name] for name in (op.q_norm, op.k_norm) if name} <= {(plan.head_dim,)}


def test_rope_tables_cover_the_context(plan: Plan, checkpoint: Checkpoint) -> None:
    assert {op.rope for op in of_kind(plan, Attention) if op.rope} == set(plan.ropes)
    for table in plan.ropes.values():
        assert table.shape == (2, 64, checkpoint.config.rotated_dim // 2) and table.dtype == np.float32


def tiny_plan(name: str, folder: Path) -> Plan:
    tiny_model(name).save_pretrained(folder)
    return build_plan(read_checkpoint(folder), 64)


def test_gemma3_rotates_and_windows_by_layer(tmp_path: Path) -> None:
    attentions = of_kind(tiny_plan("gemma3", tmp_path), Attention)
    assert [op.window for op in attentions] == [5, 5, 5, 5, 5, 0, 5]
    assert [op.rope for op in attentions] == ["local"] * 5 + ["global", "local"]
    assert {op.scale for op in attentions} == {48**-0.5}


def test_gpt2_has_positions_and_no_rope(tmp_path: Path) -> None:
    plan = tiny_plan("gpt2", tmp_path)
    assert plan.ops[0] == Embed(out="x", weight="token_embd.weight", positions="position_embd.weight")
    assert not plan.ropes and {op.rope for op in of_kind(plan, Attention)} == {None}


@pytest.mark.parametrize(("name", "output"), [("llama", "output.weight"), ("qwen3", "token_embd.weight")])
def test_tied_models_end_in_their_embedding(name: str, output: str, tmp_path: Path) -> None:
    assert tiny_plan(name, tmp_path).ops[-1] == MatMul(out="logits", x="n", weights=(output,))
