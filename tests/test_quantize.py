"""millis quantize on tiny models: targets held as the NumPy oracle measures them, files that others read, refusals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import shapes, write_tiny
from millis import _native, cli
from millis.models.gguf import read_gguf
from millis.models.load import load_model
from millis.models.oracle import Oracle
from millis.models.tensor import GgmlType
from millis.quantize.run import Quantizer, Search, Target
from millis.quantize.text import calibration
from millis.tokenizer import load_tokenizer
from millis.types import RequestError
from shell import millis, started
from tokenizer_tiny import bpe

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
WIDE = {name: (266, 64) for name in ("token_embd.weight", "output.weight")}


def tiny(path: Path, architecture: str = "llama") -> Path:
    """The tiny model with a tokenizer that works, and 512 tokens of context."""
    keys: dict[str, Any] = {key: value for key, value in bpe().items()} | {".context_length": 512}
    keys |= {"tokenizer.ggml.scores": [0.0] * 266}
    tensors: dict[str, Any] = dict(WIDE)
    if architecture == "gpt2":
        tensors |= {"position_embd.weight": (512, 64)}
    write_tiny(path, architecture, keys=keys, tensors=tensors)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("source") / "tiny.gguf")


@pytest.fixture(scope="module")
def calibrated(source: Path) -> Quantizer:
    quantizer = Quantizer(source, 1)
    quantizer.calibrate(TEXT, 2, 3)
    return quantizer


def read_by_others(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_by_type_every_matrix_takes_it_or_its_nearest(architecture: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "a.gguf", architecture)
    report = Quantizer(source, 1).write(tmp_path / "b.gguf", Target(type=GgmlType.Q4_K))
    before, after = read_by_others(source), read_by_others(tmp_path / "b.gguf")
    assert list(before) == list(after) and report.file_bytes == (tmp_path / "b.gguf").stat().st_size
    for name, tensor in after.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = gguf.quants.dequantize(before[name].data, before[name].tensor_type)
        if len(shapes(architecture).get(name, (1, 1))) == 1 or name == "position_embd.weight":
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and np.array_equal(values, wanted)
        else:  # rows of 64 and 96 values are no whole super-blocks
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1, name
            assert 0.01 < np.linalg.norm(values - wanted) / np.linalg.norm(wanted) < 0.09
    ours, theirs = read_gguf(tmp_path / "b.gguf"), read_gguf(source)
    assert ours.config == theirs.config
    load_model(tmp_path / "b.gguf")  # its plan and its tensors agree
    stored = {"general.file_type", "general.quantization_version"}
    assert ours.metadata.keys() - theirs.metadata.keys() == stored
    assert ours.metadata["general.file_type"] == 3  # mostly Q4_1, as llama.cpp counts


def test_the_rise_of_perplexity_is_what_the_oracle_measures(
    calibrated: Quantizer, source: Path, tmp_path: Path
) -> None:
    report = calibrated.write(tmp_path / "out.gguf", Target(max_ppl_loss=0.05))
    said = report.measured
    assert said["perplexity_loss"] <= said["perplexity_loss_at_most"] <= 0.05
    windows = calibration(TEXT, load_tokenizer(read_gguf(source)), 2, 3, 512).measure

    def perplexity(path: Path) -> float:
        model = load_model(path)
        losses = []
        for window in windows:
            logits = Oracle(model.plan, model.checkpoint.tensors).logits(window)[:-1].astype(np.float64)
            chosen = logits[np.arange(len(window) - 1), window[1:]]
            losses.append(float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen)))
        return math.exp(np.mean(losses))

    before, after = perplexity(source), perplexity(tmp_path / "out.gguf")
    assert said["source_perplexity"] == pytest.approx(before, rel=5e-3)
    assert 1 + said["perplexity_loss"] == pytest.approx(after / before, abs=5e-3)
    assert report.file_bytes < source.stat().st_size
    assert sum(row["loss_nats"] for row in report.rows) > 0


@pytest.mark.parametrize("truth", [0.002, 0.01, 0.05, 0.9])
@pytest.mark.parametrize("first", [0.005, 0.05, 0.5])
def test_the_search_comes_near_the_largest_allowance_that_holds(truth: float, first: float) -> None:
    search, held = Search(first), []
    for _ in range(12):
        if search.allowed <= truth:
            held.append(search.allowed)
        if not search.go_on(search.allowed <= truth, truth / search.allowed):
            break
    assert max(held) > truth / 1.4


def test_a_larger_file_promises_a_smaller_loss_and_none_is_too_large(calibrated: Quantizer, tmp_path: Path) -> None:
    losses = []
    for limit in (80_000, 90_000, 100_000):
        report = calibrated.write(tmp_path / "out.gguf", Target(max_bytes=limit))
        assert 0.85 * limit < report.file_bytes <= limit
        losses.append(report.measured["predicted_loss"])
    assert losses[0] > losses[1] > losses[2]
    with pytest.raises(RequestError, match=r"even the smallest types take 0\.06\d MB, more than 0\.06$"):
        calibrated.write(tmp_path / "none.gguf", Target(max_bytes=60_000))
    assert not (tmp_path / "none.gguf").exists()


def test_a_time_limit_is_predicted_from_bytes_and_this_machines_bandwidth(
    calibrated: Quantizer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "read_bandwidth", lambda mib, threads: 1e-3)  # GB/s: 1,000 bytes a millisecond
    monkeypatch.setattr("millis.quantize.measure.Measured.step_ms", lambda self: 200.0)

    def read_kb(path: Path) -> float:
        """What a token reads: rows in whole panels of 16, and of the embedding next to nothing."""
        matrices = [t for name, t in read_by_others(path).items() if t.data.ndim == 2 and name != "token_embd.weight"]
        return (
            sum(-(-len(tensor.data) // 16) * 16 * int(tensor.n_bytes) / len(tensor.data) for tensor in matrices) / 1e3
        )

    report = calibrated.write(tmp_path / "out.gguf", Target(max_ms=160.0))
    assert report.measured["predicted_ms"] <= 160
    expected = read_kb(tmp_path / "out.gguf") + 200 - read_kb(source)
    assert report.measured["predicted_ms"] == pytest.approx(expected, rel=1e-6)
    chosen = {row["name"]: row["type"] for row in report.rows}
    assert chosen["token_embd.weight"] == "Q8_0"  # which costs no time
    with pytest.raises(RequestError, match=r"even the smallest types take \d+\.\d+ ms a token here, more than 1$"):
        calibrated.write(tmp_path / "out.gguf", Target(max_ms=1.0))


def test_an_impossible_loss_says_so_and_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "writing" and done == 5:
            raise KeyboardInterrupt

    quantizer = Quantizer(source, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantizer.write(tmp_path / "out.gguf", Target(type=GgmlType.Q5_0))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="a limit needs a calibration text"):
        quantizer.write(tmp_path / "out.gguf", Target(max_bytes=10**6))


def test_windows_learned_from_and_measured_on_share_no_text(source: Path) -> None:
    tokenizer = load_tokenizer(read_gguf(source))
    ids = tokenizer.encode(TEXT)
    found = calibration(TEXT, tokenizer, 3, 4, 512)
    assert [len(window) for window in found.learn] == [256] * 3 and [len(w) for w in found.measure] == [512] * 4
    places = []
    for window in found.learn + found.measure:
        at = next(i for i in range(len(ids)) if ids[i : i + len(window)] == window)
        places.append(range(at, at + len(window)))
    places.sort(key=lambda place: place.start)
    assert all(a.stop <= b.start for a, b in zip(places, places[1:], strict=False))
    with pytest.raises(RequestError, match="is too short; give 4096 or more"):
        calibration("a few words", tokenizer, 3, 4, 512)


def test_the_command_writes_what_it_says_and_keeps_what_it_learned(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("--max-mb", "0.1", "--calibration", tmp_path / "text.txt", "--importance", tmp_path / "kept.npz")
    options = ("--learn", "2", "--windows", "2", "--threads", "1")
    done = millis("quantize", source, tmp_path / "a.gguf", *arguments, *options, "--json")
    assert done.returncode == 0 and done.stderr == "", done
    said = json.loads(done.stdout)
    assert said["file_bytes"] == (tmp_path / "a.gguf").stat().st_size <= 100_000
    types = {name: tensor.tensor_type.name for name, tensor in read_by_others(tmp_path / "a.gguf").items()}
    assert {row["name"]: row["type"] for row in said["rows"]}.items() <= types.items()
    kept = (tmp_path / "kept.npz").stat().st_mtime_ns
    again = millis("quantize", source, tmp_path / "b.gguf", *arguments, *options)
    assert again.returncode == 0 and "predicted rise of perplexity" in again.stdout
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "kept.npz").stat().st_mtime_ns == kept
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.gguf", "b.gguf", "kept.npz", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "fault"),
    [
        ((), 2, "exactly one of --type, --max-mb, --max-ms and --max-ppl-loss"),
        (("--type", "Q4_K", "--max-mb", "1"), 2, "exactly one"),
        (("--type", "Q4_X"), 2, "'Q4_X' is not one of Q2_K"),
        (("--max-mb", "inf", "--calibration", "x"), 2, "'--max-mb'"),
        (("--max-ms", "inf", "--calibration", "x"), 2, "'--max-ms'"),
        (("--max-mb", "1"), 2, "needs --calibration FILE"),
        (("--max-ppl-loss", "lots", "--calibration", "x"), 2, "as 1% or 0.01, not 'lots'"),
        (("--max-ppl-loss", "1%", "--calibration", "none.txt"), 1, "cannot read none.txt: No such file"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: tuple[str, ...], code: int, fault: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["quantize", str(source), str(tmp_path / "out.gguf"), *arguments], code, fault, capsys)
    assert not list(tmp_path.iterdir())


def test_an_importance_that_is_another_file_is_told_and_stays(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["quantize", str(source), str(out), "--max-mb", "1", "--calibration", str(text), "--importance"]
    refused([*arguments, str(text)], 1, "text.txt is no importance matrix of Millis; give another name for it", capsys)
    refused([*arguments, str(out)], 2, "which is to be the model; give another name", capsys)
    assert text.read_text(encoding="utf-8") == TEXT and not out.exists()


def refused(arguments: list[str], code: int, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: a new one takes a second each."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, error = capsys.readouterr()
    assert ended.value.code == code and out == ""
    assert error.startswith("millis: ") and error.count("\n") == 1 and fault in error


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("out", "fault"),
    [
        (lambda folder: make(folder / "folder.gguf"), "it is a folder, not a file"),
        (lambda folder: folder / "none" / "out.gguf", "there is no folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_first(
    out: Callable[[Path], Path], fault: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["quantize", str(source), str(out(tmp_path)), "--type", "Q8_0"], 2, fault, capsys)


def test_a_command_that_is_terminated_leaves_nothing(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    running = started("quantize", model_path("smollm2"), tmp_path / "a.gguf", "--type", "Q5_K", "--threads", "1")
    while not list(tmp_path.glob("*.part")):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert list(tmp_path.iterdir()) == []
