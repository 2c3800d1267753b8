"""A screened output matrix chooses what the whole one chooses: greedy, drawn, on every ISA, on real models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest

import millis
from millis import _native
from prompts import CHINESE, CODE, ENGLISH
from tiny_runtime import SHAPE, SIZES, Tiny, ints, stored

ISAS = _native.supported_isas()
Q8_0 = gguf.GGMLQuantizationType.Q8_0
VOCAB, WIDTH = 16392, 96  # kept in two planes; the last panel is half empty
RNG = np.random.default_rng(11)
TEXTS = [*ENGLISH[:3], CHINESE[0], *CODE[:2]]


def q8_0(values: np.ndarray) -> np.ndarray:
    return gguf.quants.quantize(values.astype(np.float32), Q8_0).reshape(-1).view(np.uint8)


def _weights() -> np.ndarray:
    values = RNG.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    values[-3:] *= 2  # the largest logits are often in the panel that is not full
    return values


PACKED = q8_0(_weights())
OUTPUT = gguf.quants.dequantize(PACKED.reshape(VOCAB, -1), Q8_0)  # [VOCAB, WIDTH]


def runtime(table: np.ndarray, **config: Any) -> _native.Runtime:
    """Token t makes row t of `table` the activations of the output matrix."""
    native = _native.Runtime(vocab=VOCAB, **{**SIZES, **SHAPE, "exact": False, **config})
    rows = np.zeros((VOCAB, WIDTH), np.float32)
    rows[: len(table)] = table
    native.add_matrix("table", 0, VOCAB, WIDTH, stored(rows))
    native.add_matrix("output", int(Q8_0), VOCAB, WIDTH, PACKED)
    for name, width in (("x", WIDTH), ("s", WIDTH), ("logits", VOCAB)):
        native.add_buffer(name, width)
    native.embed("x", "table", 1.0, "")
    native.select("s", "x")
    native.matmul("logits", "s", ["output"], [], "", "", "")
    native.finish()
    return native


def chosen(native: _native.Runtime, count: int, together: int, **params: Any) -> list[int]:
    """What a fresh sampler chooses behind each of the tokens 0 to count, so many sequences a step."""
    out = []
    for first in range(0, count, together):
        tokens = range(first, min(count, first + together))
        arrays = Tiny.arrays(*([token] for token in tokens))
        samplers = [_native.Sampler(VOCAB, **{"temperature": 0.0, "seed": token, **params}) for token in tokens]
        out += [choices[0][0] for choices in native.step(*arrays, samplers, ints([0] * len(tokens)))]
    return out


def test_both_planes_hold_the_values_of_the_file() -> None:
    np.testing.assert_array_equal(_native.unpack(int(Q8_0), VOCAB, WIDTH, PACKED), OUTPUT)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_whole_product_of_two_planes(isa: str, count: int) -> None:
    x = RNG.standard_normal((count, WIDTH)).astype(np.float32)
    want = x.astype(np.float64) @ OUTPUT.T.astype(np.float64)
    np.testing.assert_allclose(_native.matmul(x, int(Q8_0), VOCAB, PACKED, isa), want, atol=2e-3)


@pytest.mark.parametrize("together", [1, 2, 7])
@pytest.mark.parametrize("isa", ISAS)
def test_greedy_choices_are_those_of_the_whole_matrix(isa: str, together: int) -> None:
    table = RNG.standard_normal((200, WIDTH)).astype(np.float32)
    table[::7] *= 50  # and rows of other sizes
    table[3] = 0
    native = runtime(table, isa=isa)
    logits = table.astype(np.float64) @ OUTPUT.T
    got = chosen(native, 200, together)
    best = logits.max(-1)
    assert (best - logits[np.arange(200), got] <= 1e-3 * np.abs(best) + 1e-6).all()
    assert got == chosen(runtime(table, isa=isa, screen=False), 200, together)


DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.4},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.5},
    {"temperature": 40.0, "top_p": 0.7},  # of many that are nearly alike
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1e-7},
    {"temperature": 0.9, "top_k": 64, "top_p": 0.95},
    {"temperature": 3.0, "top_k": 3000, "top_p": 0.3, "min_p": 0.01},
    {"temperature": 1.0, "top_k": VOCAB},
    {"logprobs": 3},
    {"temperature": 0.8, "repetition": 1.3},
]


@pytest.mark.parametrize("params", DRAWS)
@pytest.mark.parametrize(("isa", "together"), [*((isa, 2) for isa in ISAS), (ISAS[-1], 1), (ISAS[-1], 5)])
def test_draws_are_those_of_the_whole_matrix(isa: str, params: dict[str, Any], together: int) -> None:
    table = RNG.standard_normal((60, WIDTH)).astype(np.float32) * 0.7
    table[::9] *= 2
    table[4] = 0
    screened, whole = (chosen(runtime(table, isa=isa, screen=s), 60, together, **params) for s in (True, False))
    assert screened == whole


def test_rows_that_draw_in_other_ways_share_a_step() -> None:
    table = RNG.standard_normal((120, WIDTH)).astype(np.float32) * 0.7
    ways: list[dict[str, Any]] = [{}, *(way for way in DRAWS if "logprobs" not in way and "repetition" not in way)]
    found = []
    for screen in (True, False):
        native, out = runtime(table, screen=screen), list[int]()
        for first in range(0, 120, 4):
            tokens = range(first, first + 4)
            samplers = [_native.Sampler(VOCAB, seed=t, **{"temperature": 0.0, **ways[t % len(ways)]}) for t in tokens]
            out += [one[0][0] for one in native.step(*Tiny.arrays(*([t] for t in tokens)), samplers, ints([0] * 4))]
        found.append(out)
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0, 40.0])
@pytest.mark.parametrize("isa", ISAS)
def test_a_race_is_won_by_whom_the_whole_matrix_lets_win(isa: str, temperature: float) -> None:
    """From peaked distributions to nearly even ones; several rows a step, of which one is greedy."""
    table = RNG.standard_normal((120, WIDTH)).astype(np.float32) * 0.7
    table[5] = 0
    won = []
    for screen in (True, False):
        native, out = runtime(table, isa=isa, screen=screen), list[int]()
        for first in range(0, 120, 6):
            arrays = Tiny.arrays(*([token] for token in range(first, first + 6)))
            heats = [temperature, temperature, 0.0, temperature, temperature, temperature]
            samplers = [_native.Sampler(VOCAB, temperature=heat, seed=first + i) for i, heat in enumerate(heats)]
            out += [choices[0][0] for choices in native.step(*arrays, samplers, ints([0] * 6))]
        won.append(out)
    assert won[0] == won[1]
    assert len(set(won[0])) > 30


CHANGES: list[dict[str, Any]] = [
    {"repetition": 1.6},
    {"presence": 3.0, "frequency": 0.5},
    {"presence": -2.0, "temperature": 0.7},
    {"bias": [(7, 100.0), (9000, -100.0), (VOCAB - 1, 9.0)]},
    {"bias": [(7, 3.0), (8, float("-inf"))], "repetition": 1.3, "temperature": 1.0},
    {"repetition": 1.1, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"frequency": 1.0, "temperature": 1.5, "top_p": 0.8},
    {"bias": [(11, float("inf"))], "temperature": 1.0, "top_p": 0.8},
    {"repetition": 0.8, "temperature": 1.0, "min_p": 0.05},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("params", CHANGES)
@pytest.mark.parametrize("isa", ISAS)
def test_changed_logits_are_chosen_from_as_in_the_whole_matrix(isa: str, params: dict[str, Any], masked: bool) -> None:
    """Behind tokens that were used before, the likeliest among them; two rows a step, of which one is as it is."""
    table = RNG.standard_normal((24, WIDTH)).astype(np.float32)
    whole, screened = (runtime(table, isa=isa, screen=screen) for screen in (False, True))
    likely = chosen(whole, 24, 1)
    mask = masks()[2]
    used = [ints([*RNG.integers(0, VOCAB, 60), VOCAB - 2, token, likely[(token + 1) % 24]]) for token in range(24)]
    found = []
    for native in (whole, screened):
        out = list[int]()
        for token in range(23):
            changed = _native.Sampler(VOCAB, **{"temperature": 0.0, "seed": token, **params})
            changed.seen(used[token])
            changed.commit(ints([likely[token], likely[token], 3]))
            if masked:
                changed.set_mask(mask)
            samplers = [changed, _native.Sampler(VOCAB)]
            out += [one[0][0] for one in native.step(*Tiny.arrays([token], [token + 1]), samplers, ints([0, 0]))]
        found.append(out)
    assert found[0] == found[1]


@pytest.mark.parametrize("params", [{"presence": 40.0}, {"repetition": 2.0, "temperature": 0.5, "top_p": 0.9}])
def test_guesses_count_as_used(params: dict[str, Any]) -> None:
    """Each row behind guesses is chosen from with the penalties that they bring."""
    table = np.repeat(
        RNG.standard_normal((1, WIDTH)).astype(np.float32), VOCAB, 0
    )  # of itself it says one token for ever
    told = []
    for screen in (True, False):
        native, right = runtime(table, screen=screen), list[int]()
        for _ in range(5):
            sampler = _native.Sampler(VOCAB, **{"temperature": 0.0, "seed": 3, **params})
            found = native.step(*Tiny.arrays([0, *right]), [sampler], ints([len(right)]))[0]
            assert [token for token, *_ in found[:-1]] == right
            right.append(found[-1][0])
        told.append(right)
    assert told[0] == told[1]
    assert len(set(told[0])) > 2


def masks() -> list[np.ndarray]:
    """Of tokens that may be chosen: one, few, some, nearly all, and only such as the last panel has."""
    allowed = [RNG.random(VOCAB) < share for share in (0.0003, 0.01, 0.5, 0.999)]
    allowed[0][77] = True  # chance may leave none
    allowed += [np.arange(VOCAB) == 16000, np.arange(VOCAB) >= VOCAB - 4, np.arange(VOCAB) % 16 == 3]
    bits = [np.packbits(np.pad(one, (0, -VOCAB % 32)), bitorder="little").view(np.uint32) for one in allowed]
    return [np.ascontiguousarray(one) for one in bits]


BEHIND_A_MASK = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
]


@pytest.mark.parametrize("params", BEHIND_A_MASK)
@pytest.mark.parametrize("isa", ISAS)
def test_choices_behind_a_mask_are_those_of_the_whole_matrix(isa: str, params: dict[str, Any]) -> None:
    """A mask that is there already, and one that comes while the model computes; beside a row without."""
    table = RNG.standard_normal((21, WIDTH)).astype(np.float32)
    given = masks()
    found = []
    for screen in (True, False):
        native, out = runtime(table, isa=isa, screen=screen), list[int]()
        for token in range(20):
            mask, seed = given[token % len(given)], {"seed": token}
            samplers = [_native.Sampler(VOCAB, **{"temperature": 0.0, **seed, **params}), _native.Sampler(VOCAB)]
            if token % 2:
                samplers[0].set_mask(mask)
            else:
                samplers[0].expect_mask()
                threading.Timer(0.005, samplers[0].set_mask, [mask]).start()
            arrays = Tiny.arrays([token], [token + 1])
            out += [choices[0][0] for choices in native.step(*arrays, samplers, ints([0, 0]))]
            assert mask[out[-2] // 32] >> out[-2] % 32 & 1
        found.append(out)
    assert found[0] == found[1]


def test_a_mask_that_does_not_come_leaves_nothing_chosen() -> None:
    native = runtime(RNG.standard_normal((3, WIDTH)).astype(np.float32))
    samplers = [_native.Sampler(VOCAB, temperature=heat, seed=1) for heat in (0.0, 1.0, 0.0)]
    for sampler in samplers[:2]:
        sampler.expect_mask()
    found = [one[0][0] for one in native.step(*Tiny.arrays([0], [1], [2]), samplers, ints([0, 0, 0]))]
    assert found[:2] == [_native.MASK_LATE] * 2 and found[2] >= 0


def test_only_the_output_matrix_is_screened() -> None:
    """Another one may be as large and of the same form."""
    many, found = 16384, []
    rng = np.random.default_rng(4)
    table = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    wide, narrow = rng.standard_normal((many, WIDTH)), rng.standard_normal((WIDTH, many)) / 128
    for screen in (True, False):
        native = _native.Runtime(vocab=VOCAB, **{**SIZES, **SHAPE, "exact": False, "screen": screen})
        native.add_matrix("table", 0, VOCAB, WIDTH, stored(table))
        native.add_matrix("wide", int(Q8_0), many, WIDTH, q8_0(wide))
        native.add_matrix("narrow", int(Q8_0), WIDTH, many, q8_0(narrow))
        native.add_matrix("output", int(Q8_0), VOCAB, WIDTH, PACKED)
        for name, width in (("x", WIDTH), ("y", many), ("z", WIDTH), ("s", WIDTH), ("logits", VOCAB)):
            native.add_buffer(name, width)
        native.embed("x", "table", 1.0, "")
        for out, x, weight in (("y", "x", "wide"), ("z", "y", "narrow")):
            native.matmul(out, x, [weight], [], "", "", "")
        native.select("s", "z")
        native.matmul("logits", "s", ["output"], [], "", "", "")
        native.finish()
        samplers = [_native.Sampler(VOCAB, temperature=0.5, seed=seed) for seed in range(2)]
        sequences = [[1, 2, 3, 4, 5], [6]]
        found.append([one[0][0] for one in native.step(*Tiny.arrays(*sequences), samplers, ints([0, 0]))])
    assert found[0] == found[1]


def test_an_unusable_row_stays_unusable() -> None:
    native = runtime(np.full((1, WIDTH), np.nan, np.float32))
    for temperature in (0.0, 1.0):
        sampler = _native.Sampler(VOCAB, temperature=temperature)
        assert native.step(*Tiny.arrays([0]), [sampler], ints([0]))[0][0][0] == _native.UNUSABLE


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_model_answers_the_same(
    model_path: Callable[[str], Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for screen in (True, False):
        lm = millis.load(model_path("smollm2"), screen=screen, context=1024)
        texts.append([lm.generate(text, max_tokens=48, temperature=temperature, seed=4).text for text in TEXTS])
    assert texts[0] == texts[1]
