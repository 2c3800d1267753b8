"""millis bench as its users meet it: real engines on a tiny model, what was not run said aloud, pictures, errors."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import DROP, HIDDEN, write_tiny
from millis.bench.picture import apart, engines_picture, jitter_picture
from millis.types import ModelError
from shell import error_line, millis
from tokenizer_tiny import bpe

ENGINE = ("--prompts", "4,9", "--depths", "6", "--new-tokens", "3", "--rounds", "2", "--threads", "1")
PICTURES = find_spec("matplotlib") is not None


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    vocabulary = bpe() | {"tokenizer.ggml.scores": DROP}
    size = len(vocabulary["tokenizer.ggml.tokens"])
    path = tmp_path / "tiny.gguf"
    write_tiny(path, keys=vocabulary, tensors={"token_embd.weight": (size, HIDDEN)})
    return path


def bench(*arguments: str | Path, home: Path) -> dict[str, Any]:
    done = millis("bench", *arguments, "--json", MILLIS_HOME=str(home))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_engines_side_by_side_on_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    peers = ("--peers", "transformers,llama.cpp", "--no-loads", "--installed", tmp_path / "none")
    result = bench("engine", "-m", tiny, *ENGINE, *peers, home=tmp_path)
    assert list(result["failed"]) == ["llama.cpp"]
    assert "tools/install_peers.sh llama.cpp" in result["failed"]["llama.cpp"]
    rows = {(row["engine"], row["tokens"]): row for row in result["rows"]}
    assert set(rows) == {(name, tokens) for name in ("millis", "transformers") for tokens in (4, 6, 9)}
    assert [bool(rows["millis", tokens]["next"]) for tokens in (4, 6, 9)] == [False, True, False]
    assert result["cache_bytes_per_token"] == 2 * 2 * 16 * 2 * 2  # layers, KV heads, head_dim; keys and values of f16
    loads = {row["engine"]: row for row in result["loads"]}
    assert all(list(row["load_ms"]) == ["warm"] and row["load_ms"]["warm"] > 0 for row in loads.values())
    assert loads["transformers"]["peak_rss_mb"] > loads["millis"]["peak_rss_mb"] > 10
    # bfloat16 weights and a float32 reference may part at a near tie, but not every time
    assert max(rows["transformers", tokens]["same_first_token"] for tokens in (4, 6, 9)) > 0


def test_the_table_says_the_limit_first_and_what_was_not_run_last(tiny: Path, tmp_path: Path) -> None:
    done = millis(
        "bench", "engine", "-m", tiny, *ENGINE, "--peers", "vllm", "--installed", tmp_path, MILLIS_HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "1 threads" in lines[0] and "no faster than" in lines[0]
    assert lines[-1].startswith("not run: vllm: not installed")
    assert [line for line in lines if line.startswith("millis ")]


def test_kernels_and_jitter_of_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    kernels = bench("kernels", "-m", tiny, "--counts", "1,3", "--seconds", "0.01", "--threads", "1", home=tmp_path)
    assert {line["activations"] for line in kernels["lines"]} == {1, 3}
    jitter = bench("jitter", "-m", tiny, "--steps", "60", "--depth", "32", "--threads", "1", home=tmp_path)
    assert jitter["steps"] == 60 == sum(jitter["histogram"]["counts"])
    for spread in (jitter, jitter["reads"]):
        assert 0 < spread["p50_ms"] <= spread["p99_ms"] <= spread["p99_9_ms"] <= spread["max_ms"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("engine", "--prompts", "16,x"), "--prompts"),
        (("engine", "--depths", "0"), "--depths"),
        (("engine", "--plot", "figure.pdf"), ".png or .svg"),
        (("engine", "--plot", "no/such/folder/a.png"), "no folder"),
        (("kernels", "--isas", "mmx"), "mmx"),
    ],
)
def test_usage_errors_come_before_any_work(arguments: tuple[str, ...], word: str) -> None:
    assert word in error_line(millis("bench", *arguments), 2)


def test_a_model_too_short_for_the_lengths_is_an_error(tiny: Path, tmp_path: Path) -> None:
    done = millis("bench", "engine", "-m", tiny, "--prompts", "40", "--depths", "8", MILLIS_HOME=str(tmp_path))
    assert "made for 32" in error_line(done)


def test_a_model_that_writes_is_no_encoder(tiny: Path, tmp_path: Path) -> None:
    done = millis("bench", "encoder", "-m", tiny, MILLIS_HOME=str(tmp_path))
    assert error_line(done) == f"{tiny.name} is no encoder; give one with -m, or use millis bench engine"


def test_unknown_peers_are_an_error(tiny: Path, tmp_path: Path) -> None:
    done = millis("bench", "engine", "-m", tiny, *ENGINE, "--peers", "lama", MILLIS_HOME=str(tmp_path))
    assert "'lama'" in error_line(done, 2)


def engines_result() -> dict[str, Any]:
    rows = []
    for name, factor in (("millis", 1.0), ("other", 3.0)):
        for tokens in (16, 128):
            spread = {"median_ms": factor * tokens, "min_ms": factor * tokens * 0.9, "max_ms": factor * tokens * 1.2}
            rows.append({"engine": name, "tokens": tokens, "first": spread, "next": spread, "next_limit_ms": 2.0})
    return {"model": "tiny", "threads": 1, "isa": "scalar", "prompts": [16, 128], "rows": rows}


def test_names_beside_lines_are_moved_apart_and_stay_inside() -> None:
    assert apart([], 0.1) == []
    assert apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert apart([0.2, 0.2, 0.25], 0.1) == pytest.approx([0.2, 0.3, 0.4])
    assert apart([0.5, 0.97, 0.98], 0.1) == pytest.approx([0.5, 0.9, 1.0])


def jitter_result() -> dict[str, Any]:
    histogram = {"edges_ms": np.geomspace(1.0, 20.0, 61).tolist(), "counts": [1.0] * 60}
    marks = {"p50_ms": 2.0, "p99_ms": 4.0, "p99_9_ms": 9.0, "max_ms": 20.0}
    return {"model": "tiny", "threads": 1, "isa": "scalar", "steps": 60, "histogram": histogram} | marks


@pytest.mark.parametrize(("draw", "result"), [(engines_picture, engines_result()), (jitter_picture, jitter_result())])
def test_pictures_are_drawn_or_the_extra_is_named(draw: Any, result: dict[str, Any], tmp_path: Path) -> None:
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    if not PICTURES:
        with pytest.raises(ModelError, match=r"pip install 'millis\[bench\]'"):
            draw(result, png)
        return
    draw(result, png)
    draw(result, svg)
    assert png.read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(svg)
    assert "<!-- milliseconds" in (text := svg.read_text(encoding="utf-8")) and "tiny" in text  # drawn as outlines
    first = svg.read_bytes()
    draw(result, svg)
    assert svg.read_bytes() == first
