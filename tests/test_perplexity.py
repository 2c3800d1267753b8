"""Perplexity: its closed form on made-up likelihoods, its windows, and the command against transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millis.models.gguf import read_gguf
from millis.tasks.perplexity import perplexity, spread, windows
from millis.tokenizer import load_tokenizer
from millis.types import RequestError
from reference import next_logits, real_reference
from shell import error_line, millis
from training import command


@given(st.integers(1, 100_000), st.lists(st.integers(2, 50), min_size=1, max_size=9))
def test_a_uniform_likelihood_has_the_vocabularys_size(vocab: int, lengths: list[int]) -> None:
    cut = [[0] * length for length in lengths]
    assert perplexity(lambda w: (len(w) - 1) * -math.log(vocab), cut) == pytest.approx(vocab)


def test_windows_count_by_their_tokens() -> None:
    """Two windows of one and of three predicted tokens, likelihoods 1/2 and 1/8 each: 2^((1 + 3·3) / 4)."""
    likelihood = {2: math.log(1 / 2), 4: 3 * math.log(1 / 8)}
    seen: list[None] = []
    got = perplexity(lambda w: likelihood[len(w)], [[7, 7], [7, 7, 7, 7]], lambda: seen.append(None))
    assert got == pytest.approx(2**2.5)
    assert len(seen) == 2


def test_what_is_impossible_is_infinitely_surprising() -> None:
    assert perplexity(lambda w: -math.inf, [[1, 2]]) == math.inf
    assert perplexity(lambda w: -1e6, [[1, 2]]) == math.inf


@given(st.lists(st.integers(0, 99), min_size=2, max_size=60), st.integers(2, 20), st.none() | st.just(100))
def test_windows_hold_the_text_in_order(ids: list[int], context: int, bos: int | None) -> None:
    cut = windows(ids, context, bos)
    bodies = [window if bos is None else window[1:] for window in cut]
    joined = [token for body in bodies for token in body]
    assert joined in (ids, ids[:-1])  # a last window that would predict nothing is left out
    assert len(ids) - len(joined) <= (bos is None)
    assert all(1 < len(window) <= context for window in cut)
    assert all(len(window) == context for window in cut[:-1])
    assert bos is None or all(window[0] == bos for window in cut)


@pytest.mark.parametrize(("ids", "bos"), [([], None), ([1], None), ([], 5)])
def test_a_text_without_a_prediction_is_refused(ids: list[int], bos: int | None) -> None:
    with pytest.raises(RequestError, match="too short"):
        windows(ids, 8, bos)


def test_a_window_must_predict_something() -> None:
    with pytest.raises(RequestError, match="at least 2"):
        windows([1, 2, 3], 1, None)


def test_spread_takes_windows_at_even_distances() -> None:
    cut = [[i] for i in range(10)]
    assert spread(cut, 5) == [[0], [2], [4], [6], [8]]
    assert spread(cut, 1) == [[0]]
    assert spread(cut, 10) == spread(cut, 99) == cut


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    shutil.copy(Path(__file__).parent.parent / "LICENSE", path)
    return path


def test_the_command_agrees_with_transformers(
    text_file: Path, model_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """On three windows: the reference that the command runs is transformers', and Millis is within 0.5 % of it."""
    path = model_path("smollm2")
    arguments = (
        "evaluate",
        "-m",
        path,
        "--perplexity",
        text_file,
        "--window",
        "128",
        "--windows",
        "3",
        "--threads",
        "1",
        "--json",
    )
    assert command(*arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    result = json.loads(shown.out)
    assert (result["windows"], result["tokens"], result["precision"]) == (3, 381, "fast")
    expected = _independent(path, text_file.read_text(encoding="utf-8"))
    assert result["reference"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert result["millis"]["perplexity"] == pytest.approx(expected, rel=5e-3)
    for side in ("millis", "reference"):
        assert 0 < result[side]["p50_ms"] <= result[side]["p99_ms"] < 1000 * result[side]["seconds"]
    assert result["ratio"] == pytest.approx(result["millis"]["perplexity"] / result["reference"]["perplexity"])


def _independent(path: Path, text: str) -> float:
    """Three of the text's windows of 128 tokens, by the packages alone but for the ids."""
    ids = load_tokenizer(read_gguf(path)).encode(text)
    every = [ids[at : at + 128] for at in range(0, len(ids), 128)]
    chosen = [every[i * len(every) // 3] for i in range(3)]
    reference, losses = real_reference(path), []
    for window in chosen:
        logits = torch.from_numpy(next_logits(reference, window)[:-1])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none").double())
    return float(torch.cat(losses).mean().exp())


def test_usage_and_unreadable_texts(tmp_path: Path, model_path: Callable[[str], Path]) -> None:
    assert "give a task and a file, or --perplexity FILE" in error_line(millis("evaluate"), 2)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    model = model_path("smollm2")
    (tmp_path / "text.txt").write_text("word " * 200)
    small = millis("evaluate", "-m", model, "--perplexity", tmp_path / "text.txt", "--context", "64", "--threads", "1")
    assert "--window 512 is longer than the model's context of 64 tokens" in error_line(small)
    for name, expected in {"latin.txt": "not UTF-8", "none.txt": "No such file", "empty.txt": "too short"}.items():
        assert expected in error_line(millis("evaluate", "-m", model, "--perplexity", tmp_path / name))
