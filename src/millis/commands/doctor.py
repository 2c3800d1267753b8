"""millis doctor: what this machine has, what will be used, and why."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from millis import _native, hub
from millis.commands import common
from millis.config import EngineConfig, available_memory_bytes
from millis.models.load import is_encoder
from millis.types import ModelError

EXAMPLE = "millis doctor --json"
BANDWIDTH_MIB = 256  # larger than any cache that models fit into
WHY = {
    "amx": "AMX tiles for prompts, AVX-512 with VNNI for single tokens: the widest products there are",
    "avx512bf16": "AVX-512 with VNNI for single tokens, and with BF16 for prompts: no AMX here",
    "avx512": "AVX-512 with VNNI: no AVX512-BF16 here",
    "avxvnni": "AVX2 with AVX-VNNI: no AVX-512 with VNNI here",
    "avx2": "AVX2 and FMA: no VNNI here",
    "neon-bf16": "NEON with matrix products, of bytes for single tokens and of BF16 for prompts: the widest there are",
    "neon-i8mm": "NEON with 8-bit matrix products: no FEAT_BF16 here",
    "neon-dot": "NEON with dot products: no FEAT_I8MM here",
    "neon": "NEON: no dot products (FEAT_DotProd) here",
    "scalar": "plain C++: no vector unit used; expect slow answers",
}


def command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also predict this model's steps, and time them.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Shows processor, memory, bandwidth and models on disk."""
    config = EngineConfig()
    threads, available = config.threads, available_memory_bytes()
    isas = _native.supported_isas()
    chosen = isas[-1] if config.isa == "auto" else config.isa
    bandwidth = _native.read_bandwidth(BANDWIDTH_MIB, threads)
    on_disk = [(row, size) for row in hub.entries() if row.state == "complete" and (size := _size_bytes(row))]
    facts: dict[str, Any] = {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpus": os.cpu_count(),
        "threads": threads,
        "isas": isas,
        "isa": chosen,
        "isa_known": chosen in isas,
        "isa_from": "MILLIS_ISA" if os.environ.get("MILLIS_ISA") else "detected",
        "read_gb_per_s": round(bandwidth, 1),
        "memory_gib": _memory_gib(),
        "memory_available_gib": None if available is None else round(available / 2**30, 1),
        "home": str(hub.home()),
        "barrier_ns": round(_native.barrier_ns(threads)),
        "models": {
            row.name: {
                "bytes": size,
                "packed_bytes": _packed_bytes(row.path),
                "limit_tokens_per_s": None if is_encoder(row.path) else round(1e9 * bandwidth / size),
            }
            for row, size in on_disk
        },
    }
    if model is not None:
        facts["predictions"] = _predictions(model)
    if json:
        common.print_json(facts)
    else:
        _print(facts, model)
    if chosen not in isas:
        raise ModelError(f"MILLIS_ISA asks for {chosen}, which this machine lacks; unset it, or take {isas[-1]}")


def _print(facts: dict[str, Any], model: str | None) -> None:
    chosen, isas, threads, bandwidth = facts["isa"], facts["isas"], facts["threads"], facts["read_gb_per_s"]
    why = WHY.get(chosen, "") if chosen in isas else "this machine lacks it: unset MILLIS_ISA"
    print(f"processor     {facts['processor']}")
    print(f"system        {facts['system']}")
    print(f"threads       {threads} of {facts['cpus']} CPUs: the physical cores this process may use")
    print(f"kernels       {chosen} ({facts['isa_from']}) of {', '.join(isas)} – {why}")
    print(f"read          {bandwidth:.1f} GB/s with {threads} threads from {BANDWIDTH_MIB} MiB: the limit of decoding")
    print(f"barrier       {facts['barrier_ns']} ns among {threads} threads")
    memory = f"{facts['memory_available_gib']} of {facts['memory_gib']} GiB available"
    print(f"memory        {memory if facts['memory_gib'] else 'unknown: /proc/meminfo cannot be read'}")
    print(f"models        {facts['home']}")
    for name, row in facts["models"].items():
        packed = "packed weights kept" if row["packed_bytes"] else "the first load will pack it"
        limit = f"at most about {row['limit_tokens_per_s']} tokens/s here; {packed}"
        print(f"  {name:<14}{row['bytes'] / 1e6:.0f} MB, {limit if row['limit_tokens_per_s'] else 'reads texts only'}")
    if not facts["models"]:
        print("  none yet; fetch one with: millis pull smollm2")
    if model is not None:
        found = facts["predictions"]
        print(f"steps         of {model}, in ms; median error {100 * found['median_error']:.0f} %")
        print(f"  {'tokens':>8}{'steps':>8}{'predicted':>11}{'actual':>9}{'error':>8}")
        for row in found["steps"]:
            times = f"{row['predicted_ms']:>11.2f}{row['actual_ms']:>9.2f}{100 * row['error']:>6.0f} %"
            print(f"  {row['rows']:>8}{row['steps']:>8}{times}")


def _predictions(model: str) -> dict[str, Any]:
    from dataclasses import asdict

    from millis.bench.steps import median_error, predictions

    rows = predictions(common.load(model, context=1024, speculation="off"))
    return {"median_error": median_error(rows), "steps": [asdict(row) for row in rows]}


def _size_bytes(row: hub.Stored) -> int:
    """A catalogue model's file may be a link, which counts nothing on disk."""
    return row.entry.size_bytes if row.entry else row.size_bytes


def _packed_bytes(model: Path) -> int:
    """Size of the packed file that the next load maps, unless the model has changed since; 0: it will pack."""
    file = hub.packed_path(model)
    try:
        _native.packed_source(os.fsencode(file))
        return file.stat().st_size
    except (ValueError, OSError):
        return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(round(int(line.split()[1]) / 2**20, 1) for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration):
        return None
