"""Encoder-decoder models against transformers: folders, plans, the oracle, every ISA; hostile folders and batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from millis import _native
from millis.config import EngineConfig
from millis.engine.eight_bits import eight_bits
from millis.engine.seq2seq_runner import Seq2SeqRunner
from millis.models.load import Model, is_seq2seq, load_model
from millis.models.marian import sinusoids
from millis.models.oracle import Oracle
from millis.models.t5 import buckets
from millis.types import FormatError, ModelError, RequestError
from seq2seqs import CONTEXT, FAMILIES, VOCAB, logits, random_ids, save, tiny

ISAS = _native.supported_isas()
LENGTHS = ((1, 1), (7, 5), (32, 33), (60, 40))  # of source and target


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """What transformers runs, and the same as we read it."""
    model = tiny(request.param)
    return model, load_model(save(model, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(tiny("t5"), tmp_path_factory.mktemp("t5")))


def runner(model: Model, isa: str = "auto", **options: Any) -> Seq2SeqRunner:
    return Seq2SeqRunner(model, EngineConfig(isa=isa, **{"threads": 2, "precision": "exact", **options}))


def target(model: Any, length: int) -> list[int]:
    return [model.config.decoder_start_token_id, *random_ids(length, 5)]


def scored(native: Seq2SeqRunner, source: list[int], tokens: list[int], beside: list[int] | None = None) -> np.ndarray:
    """[T, vocab] all of a target in one step, its source read beside another text."""
    sources = native.read([source] if beside is None else [beside, source])
    row = native.begin(sources[-1], tokens[0])
    row.tokens = list(tokens)
    found = native.logits(row)
    native.free([row, *sources])
    native.pages.check_integrity([])
    return found


@pytest.mark.parametrize(("read", "written"), LENGTHS)
def test_the_oracle_is_transformers(read: int, written: int, saved: tuple[Any, Model]) -> None:
    model, ours = saved
    source, tokens = random_ids(read), target(model, written)
    wanted = logits(model, source, tokens)
    found = Oracle(ours.plan, ours.checkpoint.tensors).logits(tokens, source)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_is_the_oracle(isa: str, saved: tuple[Any, Model]) -> None:
    model, ours = saved
    oracle = Oracle(ours.plan, ours.checkpoint.tensors)
    native = runner(ours, isa, threads=3, max_batch_tokens=64)
    for read, written in LENGTHS:
        source, tokens = random_ids(read), target(model, written)
        wanted = oracle.logits(tokens, source)
        for beside in (None, random_ids(CONTEXT), random_ids(3)):
            found = scored(native, source, tokens, beside)
            np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_a_step_is_all_at_once(isa: str, saved: tuple[Any, Model]) -> None:
    """Several rows beside each other, of different sources and lengths: what each chooses is what the oracle would."""
    model, ours = saved
    oracle, native = Oracle(ours.plan, ours.checkpoint.tensors), runner(ours, isa)
    texts = [random_ids(length) for length in (2, 33, 70)]
    sources = native.read(texts)
    rows = [native.begin(source, model.config.decoder_start_token_id) for source in sources]
    samplers = [native.sampler(_greedy(), best=3) for _ in rows]
    for _ in range(36):  # over the end of a page
        for row, (token, _, best) in zip(rows, native.step(rows, samplers), strict=True):
            assert token == best[0][0]
            row.tokens.append(token)
    for text, row in zip(texts, rows, strict=True):
        wanted = oracle.logits(row.tokens[:-1], text)
        assert row.tokens[1:] == wanted.argmax(1).tolist()


def _greedy() -> Any:
    from millis.types import SamplingParams

    return SamplingParams()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["t5", "marian"])
def test_long_texts_whose_keys_threads_share(family: str, isa: str, tmp_path: Path) -> None:
    changes = {"n_positions": 600} if family == "t5" else {"max_position_embeddings": 600}
    model = tiny(family, **changes)
    ours = load_model(save(model, tmp_path))
    assert ours.plan.context == 600
    source, tokens = random_ids(500), target(model, 420)
    wanted = logits(model, source, tokens)
    for threads in (1, 3):
        found = scored(runner(ours, isa, threads=threads), source, tokens)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
        native = runner(ours, isa, threads=threads)
        [read] = native.read([source])
        row = native.begin(read, tokens[0])
        row.tokens = tokens[:400]
        native.logits(row)  # fills the cache
        for token in tokens[400:]:
            row.tokens.append(token)
            assert native.step([row], [native.sampler(_greedy())])[0][0] == wanted[len(row.tokens) - 1].argmax()


def test_a_t5_reads_further_than_it_was_trained_to(t5: Model) -> None:
    assert t5.plan.context == CONTEXT
    with pytest.raises(RequestError, match=r"context must lie in \[1, 16384\]"):
        load_model(t5.checkpoint.path, 1 << 15)
    longer = load_model(t5.checkpoint.path, 200)
    source, tokens = random_ids(200), target(tiny("t5"), 150)
    np.testing.assert_allclose(scored(runner(longer), source, tokens), logits(tiny("t5"), source, tokens), atol=5e-5)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (32, 256), (16, 100), (8, 1000), (64, 77)])
def test_distances_fall_into_transformers_buckets(count: int, farthest: int, both: bool) -> None:
    ahead = np.arange(-3000, 3001)
    wanted = T5Attention._relative_position_bucket(torch.from_numpy(ahead), both, count, farthest).numpy()
    np.testing.assert_array_equal(buckets(ahead, both, count, farthest), wanted)


@pytest.mark.parametrize("width", [64, 512, 6])
def test_positions_are_transformers(width: int) -> None:
    wanted = MarianSinusoidalPositionalEmbedding(512, width).create_weight().numpy()
    np.testing.assert_allclose(sinusoids(512, width), wanted, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_fast_is_near_and_the_same_on_every_isa(isa: str, saved: tuple[Any, Model]) -> None:
    """Eight bits a weight; random weights forgive their rounding less than trained ones do."""
    model, ours = saved
    exact, fast, scalar = runner(ours), runner(ours, isa, precision="fast"), runner(ours, "scalar", precision="fast")
    assert fast.weight_bytes < 0.4 * exact.weight_bytes
    for read, written in LENGTHS[1::2]:
        source, tokens = random_ids(read), target(model, written)
        wanted, found, near = (scored(native, source, tokens) for native in (exact, fast, scalar))
        size = np.linalg.norm(wanted)
        assert 1e-5 < np.linalg.norm(found - wanted) / size < 0.12, "eight bits, and no more than their rounding"
        assert np.linalg.norm(found - near) / size < 0.06, "bfloat16 where products are wide, two bytes elsewhere"


def test_weights_in_eight_bits_are_off_by_so_much_and_no_more(saved: tuple[Any, Model]) -> None:
    _, ours = saved
    tensors = ours.checkpoint.tensors
    made = eight_bits(ours.plan, tensors, logits=True)
    changed = [name for name in tensors if made[name].type != tensors[name].type]
    assert (
        sum(tensors[name].nbytes for name in changed)
        > 0.9 * sum(t.nbytes for t in tensors.values() if len(t.shape) == 2) - 4 * CONTEXT * 64
    )
    for name in changed:
        wanted, found = (one[name].numpy().reshape(-1, 32) for one in (tensors, made))
        most = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(found - wanted) <= most * (1 / 254 + 1 / 2048) + 1e-7).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_of_two_bytes(kind: torch.dtype, tmp_path: Path) -> None:
    model = tiny("t5").to(kind)
    ours = load_model(save(model, tmp_path))
    source, tokens = random_ids(20), target(model, 12)
    np.testing.assert_allclose(scored(runner(ours), source, tokens), logits(model.float(), source, tokens), atol=2e-5)


def test_embeddings_may_be_stored_more_than_once_and_positions_at_all(tmp_path: Path) -> None:
    for family, prefix in (("t5", ""), ("marian", "model.")):
        model = tiny(family)
        folder = save(model, tmp_path / family)
        tensors = load_file(folder / "model.safetensors")
        shared = tensors[f"{prefix}shared.weight"]
        again = {name: shared.clone() for name in (f"{prefix}encoder.embed_tokens.weight", "lm_head.weight")}
        if family == "marian":
            table = model.model.encoder.embed_positions.weight.detach()
            again |= {f"model.{half}.embed_positions.weight": table.clone() for half in ("encoder", "decoder")}
        save_file({**tensors, **again}, folder / "model.safetensors")
        wanted = logits(model, random_ids(9), target(model, 4))
        assert "output.weight" not in load_model(folder).checkpoint.tensors
        np.testing.assert_allclose(
            scored(runner(load_model(folder)), random_ids(9), target(model, 4)), wanted, atol=3e-5
        )
        save_file(
            {**tensors, **again, f"{prefix}encoder.embed_tokens.weight": shared + 1}, folder / "model.safetensors"
        )
        with pytest.raises(FormatError, match="embeddings of their own"):
            load_model(folder)


@pytest.mark.parametrize(
    ("family", "changes", "fault"),
    [
        ("t5", {"feed_forward_proj": "gated-swish"}, "feed_forward_proj 'gated-swish' is not one of relu"),
        ("t5", {"feed_forward_proj": "gated-gelu"}, "'enc.blk.0.ffn_gate.weight' is missing"),
        ("t5", {"d_kv": 8}, "is 64 × 64; its configuration asks 32 × 64"),
        ("t5", {"num_layers": 4}, "'enc.blk.3.attn_q.weight' is missing|'enc.blk.3.ffn_up.weight' is missing"),
        ("t5", {"num_layers": 10**9}, "layers must lie in"),
        ("t5", {"num_decoder_layers": 0}, "layers must lie in"),
        ("t5", {"num_heads": 10**12}, "heads must lie in"),
        ("t5", {"vocab_size": 2**62}, "vocab must lie in"),
        ("t5", {"d_model": -4}, "hidden must lie in"),
        ("t5", {"d_model": "64"}, "d_model must be a whole number"),
        ("t5", {"d_ff": 2**40}, "ffn must lie in"),
        ("t5", {"relative_attention_num_buckets": 2**30}, "buckets"),
        ("t5", {"relative_attention_num_buckets": 30}, "buckets, a multiple of 4"),
        ("t5", {"relative_attention_max_distance": 16}, "the farthest distance of 32 buckets cannot be 16"),
        ("t5", {"layer_norm_epsilon": 0}, "norm_eps must be a positive number"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder to False"),
        ("t5", {"architectures": ["T5EncoderModel"]}, "is not one model that writes text"),
        ("t5", {"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
        ("marian", {"decoder_attention_heads": 5}, "does not divide into 5 heads"),
        ("marian", {"encoder_attention_heads": 0}, "does not divide into 0 heads"),
        ("marian", {"encoder_layers": -1}, "the encoder's layers must lie in"),
        ("marian", {"encoder_ffn_dim": 2**50}, "the encoder's ffn must lie in"),
        ("marian", {"max_position_embeddings": 2**40}, "context must lie in"),
        ("marian", {"activation_function": "mish"}, "activation 'mish' is not one of"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings to False"),
        ("marian", {"decoder_vocab_size": 99}, "a vocabulary of its own"),
        ("marian", {"normalize_before": True}, "normalize_before to True"),
        ("marian", {"vocab_size": VOCAB - 1, "decoder_vocab_size": VOCAB - 1}, "asks 127"),
    ],
)
def test_settings_that_cannot_be(family: str, changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert is_seq2seq(folder)
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("family", "change", "fault"),
    [
        ("t5", lambda t: t.pop("decoder.block.1.layer.1.EncDecAttention.k.weight"), "cross_attn_k.weight' is missing"),
        ("t5", lambda t: t.pop("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"), "attn_rel_b"),
        ("t5", lambda t: t.pop("shared.weight"), "'shared.weight' is missing"),
        ("t5", lambda t: t.pop("decoder.final_layer_norm.weight"), "'dec.output_norm.weight' is missing"),
        ("t5", lambda t: t.update({"encoder.block.0.layer.7.wi.weight": torch.ones(2)}), "has no place in a t5 model"),
        ("t5", lambda t: t.update({"shared.weight": torch.ones(VOCAB, 65)}), "is 128 × 65; its configuration asks"),
        ("marian", lambda t: t.update({"final_logits_bias": torch.ones(2, VOCAB)}), "'output.bias' is 2 × 128"),
        ("marian", lambda t: t.pop("model.decoder.layers.0.encoder_attn.out_proj.bias"), "is missing"),
        ("marian", lambda t: t.update({"model.encoder.embed_positions.weight": torch.ones(CONTEXT, 3)}), "is 96 × 3"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(family: str, change: Change, fault: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=fault):
        load_model(folder)


def test_a_value_that_is_none(tmp_path: Path) -> None:
    model = tiny("marian")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[2, 3] = float("inf")
    with pytest.raises(FormatError, match="holds NaN or infinite"):
        runner(load_model(save(model, tmp_path)))


def test_a_bias_may_be_left_out(tmp_path: Path) -> None:
    model = tiny("marian")
    folder = save(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_logits_bias"]
    save_file(tensors, folder / "model.safetensors")
    model.final_logits_bias.zero_()
    found = scored(runner(load_model(folder)), random_ids(8), target(model, 3))
    np.testing.assert_allclose(found, logits(model, random_ids(8), target(model, 3)), atol=2e-5)


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def table(*values: int) -> np.ndarray:
    return np.asarray([values], np.int32)


def test_sources_that_cannot_be_read(t5: Model) -> None:
    native = runner(t5)._runtime
    for tokens, lengths, tables, fault in (
        (ints(1, 2), ints(3), table(0), "do not add up"),
        (ints(1, VOCAB), ints(2), table(0), "out of the vocabulary"),
        (ints(1, -1), ints(2), table(0), "out of the vocabulary"),
        (ints(), ints(), table(0), "or none"),
        (ints(1, 2), ints(2, 0), np.zeros((2, 1), np.int32), "or empty"),
        (ints(*[1] * (CONTEXT + 1)), ints(CONTEXT + 1), table(0, 1, 2, 3), "longer than the context"),
        (ints(*[1] * 40), ints(40), table(0), "too short"),
        (ints(1, 2), ints(2), table(-1), "page out of range"),
        (ints(1, 2), ints(2), table(1 << 30), "page out of range"),
        (ints(1, 2), ints(2), np.zeros((2, 1), np.int32), "one page table for each text"),
    ):
        with pytest.raises(ValueError, match=fault):
            native.read(tokens, lengths, tables)


def test_steps_that_cannot_run(t5: Model) -> None:
    native = runner(t5)._runtime
    native.read(ints(3, 4), ints(2), table(5))
    step = (ints(0), ints(0), ints(1), table(0), False, None)
    assert native.logits(*step, ints(2), table(5)).shape == (1, VOCAB)
    for sources, tables, fault in (
        (None, None, "needs sources"),
        (ints(2), None, "page table is too short"),
        (ints(0), table(5), "longer than the context, or empty"),
        (ints(CONTEXT + 1), table(5, 6, 7, 8), "longer than the context, or empty"),
        (ints(33), table(5), "too short"),
        (ints(2), table(-1), "page out of range"),
        (ints(2), table(1 << 20), "page out of range"),
        (ints(2, 2), np.zeros((2, 1), np.int32), "one source for each"),
    ):
        with pytest.raises(ValueError, match=fault):
            native.logits(*step, sources, tables)
    with pytest.raises(ValueError, match="scores no trees|needs sources"):
        native.score_tree(ints(0), ints(0), ints(1), table(0), ints(-1), ints(0), ints(1))
    with pytest.raises(ValueError, match="runs no encoder"):
        native.texts(ints(1), ints(1))


def test_plans_whose_halves_are_mixed_up() -> None:
    def made(*calls: tuple[str, tuple[Any, ...]]) -> Any:
        native = _native.Runtime(
            threads=1, isa="auto", max_tokens=8, max_outputs=8, pages=4, layers=1, kv_heads=1, head_dim=16, vocab=48,
            context=8, exact=True,
        )  # fmt: skip
        for name, width in (("x", 16), ("q", 16), ("kv", 32), ("qkv", 48), ("logits", 48)):
            native.add_buffer(name, width)
        native.add_matrix("e", 0, 48, 16, np.zeros(48 * 16 * 4, np.uint8))
        native.add_vector("b", np.zeros(2 * 8 + _native.BIAS_SLACK, np.float32))
        for name, arguments in calls:
            getattr(native, name)(*arguments)
        native.finish()

    embed, end = ("embed", ("x", "e", 1.0, "")), ("end_source", ())
    cross = ("cross_attention", ("q", "x", 0, 1, 1.0))
    last = (("select", ("q", "x")), ("matmul", ("logits", "q", ["e"], [], "", "", "")))
    made(embed, end, embed, *last)
    for calls, fault in (
        ((embed, cross, *last), "only a source is remembered"),
        ((embed, ("remember", ("kv", 0)), *last), "only a source is remembered"),
        ((embed, end, embed, ("remember", ("kv", 0)), *last), "only a source is remembered"),
        ((embed, cross, end, embed, *last), "attention over the cache in a source"),
        ((embed, end, cross, *last), "a target begins with an embedding"),
        ((embed, end, end), "a source ends once"),
        ((embed, ("remember", ("kv", 1))), "no such layer"),
        ((embed, ("remember", ("x", 0))), "does not fit"),
        ((embed, ("cross_attention", ("q", "x", 7, 1, 1.0))), "no such layer"),
        ((embed, ("cross_attention", ("q", "x", 0, 2, 1.0))), "do not fit"),
        ((embed, ("cross_attention", ("q", "x", 0, 1 << 30, 1.0))), "out of range"),
        ((embed, ("attend_all", ("q", "qkv", 1, 1, 16, 1.0, "c"))), "no vector c"),
        (
            (embed, end, embed, ("attend_all", ("q", "qkv", 1, 1, 16, 1.0, "b")), *last),
            "both directions where text is written",
        ),
        ((embed, ("attention", ("kv", "qkv", 0, 2, 1.0, "", False, 0, "", "", 1e-6, "b"))), "b must hold 96 values"),
    ):
        with pytest.raises(ValueError, match=fault):
            made(*calls)


def test_a_head_dim_that_the_kernels_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiple of 16"):
        runner(load_model(save(tiny("t5", d_kv=24), tmp_path)))
