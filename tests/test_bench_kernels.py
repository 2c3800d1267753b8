"""Kernel timings: the roofline in closed form, which matrices are measured, and what the binding refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import FFN, HIDDEN, write_tiny
from millis import _native
from millis.bench import attention
from millis.bench.kernels import line, matrices, measure
from millis.models.load import read_checkpoint
from millis.models.tensor import GgmlType, Tensor

Q8_BYTES = 34 * 64 * 2  # of a matrix [64, 64]


def tensor(rows: int, cols: int) -> Tensor:
    return Tensor("w", GgmlType.Q4_1, (rows, cols), np.zeros(rows * cols // 32 * 20, np.uint8))


def timed(**changes: Any) -> tuple[list[float], int]:
    data = np.zeros(Q8_BYTES, np.uint8)
    given = {"type": int(GgmlType.Q8_0), "rows": 64, "cols": 64, "data": data, "count": 4, "isa": "auto", "threads": 2}
    return _native.time_matmul(**(given | {"repeats": 5} | changes))


def test_one_row_is_bound_by_reading() -> None:
    found = line(tensor(1000, 320), 1, "avx2", 1e-3, packed=200_000, bandwidth=0.4, peak=100.0)
    assert found["gb_per_s"] == pytest.approx(0.2)
    assert found["gflop_per_s"] == pytest.approx(0.64)
    assert found["share_of_roofline"] == pytest.approx(0.5)  # 200 kB at 0.4 GB/s are half a millisecond


def test_many_rows_are_bound_by_arithmetic() -> None:
    found = line(tensor(1000, 320), 100, "avx2", 1e-3, packed=200_000, bandwidth=40.0, peak=128.0)
    assert found["share_of_roofline"] == pytest.approx(0.5)  # 64 million operations of 128 thousand million a second
    assert (found["rows"], found["cols"], found["activations"], found["format"]) == (1000, 320, 100, "Q4_1")


def test_without_a_peak_there_is_no_roofline() -> None:
    assert line(tensor(16, 32), 1, "sve", 1e-3, 1, 1.0, 0.0)["share_of_roofline"] is None


def test_attention_reads_keys_and_values_of_all_that_came_before(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    config = read_checkpoint(tmp_path / "tiny.gguf").config
    values = 2 * config.kv_heads * config.head_dim
    found = attention.line(config, 99, 1, "avx2", 1e-6, bandwidth=0.4)
    assert found["gb_per_s"] == pytest.approx(100 * values * 2 / 1e3)
    assert found["gflop_per_s"] == pytest.approx(4 * 100 * config.heads * config.head_dim / 1e3)
    assert found["share_of_roofline"] == pytest.approx(found["gb_per_s"] / 0.4)
    assert attention.line(config, 99, 2, "avx2", 1e-6, bandwidth=0.4)["share_of_roofline"] is None


def test_every_type_and_shape_is_measured_once(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", "qwen3")
    found = [(m.type.name, m.shape) for m in matrices(read_checkpoint(tmp_path / "tiny.gguf"))]
    assert len(found) == len(set(found))
    assert ("Q8_0", (FFN, HIDDEN)) in found and ("Q8_0", (HIDDEN, FFN)) in found


def test_lines_of_a_tiny_model(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf")
    for int8, isas in ((False, _native.supported_isas()[-2:]), (True, _native.supported_isas()[-1:])):
        lines = list(measure(tmp_path / "tiny.gguf", counts=[1, 5], isas=isas, threads=1, seconds=0.01, int8=int8))
        assert len(lines) == 2 * len(isas) * (len(list(matrices(checkpoint))) + len(attention.DEPTHS))
        assert all(line["us"] > 0 and line["gb_per_s"] > 0 for line in lines)
        assert {line["isa"] for line in lines} == set(isas)


def test_the_binding_times_each_product() -> None:
    times, packed = timed()
    assert len(times) == 5 and all(time > 0 for time in times)
    assert Q8_BYTES * 0.9 < packed < Q8_BYTES * 1.2


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_every_isa_of_this_machine_has_a_peak(isa: str) -> None:
    assert _native.dot_peak(isa, 1) > 0.1


@pytest.mark.parametrize(
    "changes",
    [{"count": 0}, {"threads": 0}, {"repeats": 0}, {"copies": 0}, {"rows": 65}, {"isa": "sse9"}, {"type": 99}],
)
def test_the_binding_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        timed(**changes)
    with pytest.raises(ValueError):
        _native.dot_peak("auto", 0)
