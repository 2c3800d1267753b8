"""ISAs as the processor's own words have them, and tiny quantised models through each against the NumPy oracle."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest

from gguf_files import ARCHITECTURES, VOCAB, write_tiny
from millis import _native
from millis.commands.doctor import WHY
from millis.config import EngineConfig
from millis.engine.native_runner import NativeRunner
from millis.engine.runner import Batch
from millis.models.load import load_model
from millis.models.oracle import Oracle

ISAS = _native.supported_isas()
MACHINE = platform.machine()


def expected_isas() -> list[str]:
    """What the system says this processor has: by name on x86, by bits on ARM."""
    found: dict[str, bool]
    if MACHINE == "x86_64":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(set(line.split()) for line in lines if line.startswith("flags"))
        avx2 = {"avx2", "fma", "f16c"} <= flags
        avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags
        found = {"avx2": avx2, "avxvnni": avx2 and "avx_vnni" in flags, "avx512": avx2 and avx512}
        found["avx512bf16"] = avx2 and avx512 and "avx512_bf16" in flags
        tiles = {"amx_tile", "amx_bf16"} <= flags
        found["amx"] = found["avx512bf16"] and tiles and _native.amx_state() == "used"
    elif MACHINE == "aarch64":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
        asimddp, i8mm, bf16 = getauxval(16) >> 20 & 1, getauxval(26) >> 13 & 1, getauxval(26) >> 14 & 1
        found = {"neon": True, "neon-dot": bool(asimddp), "neon-i8mm": bool(asimddp and i8mm)}
        found["neon-bf16"] = found["neon-i8mm"] and bool(bf16)
    else:
        found = {}
    return ["scalar", *(name for name, here in found.items() if here)]


def test_the_isas_are_those_the_processor_names() -> None:
    assert expected_isas() == ISAS


def test_the_best_isa_is_chosen_and_any_may_be_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    model = load_model(tmp_path / "tiny.gguf")
    monkeypatch.delenv("MILLIS_ISA", raising=False)
    assert NativeRunner(model, EngineConfig()).isa == ISAS[-1]
    for isa in ISAS:
        monkeypatch.setenv("MILLIS_ISA", isa)
        assert NativeRunner(model, EngineConfig()).isa == isa


def test_the_doctor_can_explain_every_isa() -> None:
    assert set(ISAS) <= set(WHY)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["exact", "fast", "int8"])
def test_tiny_models_follow_the_oracle(architecture: str, isa: str, precision: str, tmp_path: Path) -> None:
    """Fast: activations of 16 bits and an f16 cache, so within a thousandth of the largest logit.

    Of a prompt in pairs of bfloat16, which have 8 bits, within a two-hundredth; int8, within a fiftieth.
    """
    write_tiny(tmp_path / "tiny.gguf", architecture)
    model = load_model(tmp_path / "tiny.gguf")
    tokens = np.random.default_rng(1).integers(0, VOCAB, 30).astype(np.int32)
    want = Oracle(model.plan, model.checkpoint.tensors).logits([int(t) for t in tokens])
    runner = NativeRunner(model, EngineConfig(isa=isa, threads=2, precision=precision))
    one = np.asarray([0], np.int32)
    whole = runner.logits(Batch(tokens, one, np.asarray([30], np.int32), one[None]), every=True)
    pairs = isa in ("avx512bf16", "amx", "neon-bf16")
    allowed = {"exact": 1e-5, "fast": 5e-3 if pairs else 1e-3, "int8": 2e-2}[precision] * np.abs(want).max()
    np.testing.assert_allclose(whole, want, atol=allowed)
    for position in range(25, 30):  # one token at a time, over the cache that the whole prompt left
        at = np.asarray([position], np.int32)
        step = runner.logits(Batch(tokens[at], at, np.asarray([1], np.int32), one[None]), every=True)
        np.testing.assert_allclose(step[0], want[position], atol=allowed)
