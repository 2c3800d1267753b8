"""Speed of an encoder, one text at a time, beside other engines: rounds in turns, every call timed, labels compared."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import millis
from millis.bench.process import Worker
from millis.models.load import is_encoder, read_checkpoint
from millis.types import RequestError

HERE = Path(__file__).parent
PEERS = ("transformers", "onnxruntime")
QUESTION = "what is the fee for using my card in another country"
WARM_UP = 20  # calls of each text before the first round


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured and how often."""

    peers: Sequence[str]
    threads: int
    texts: Sequence[str]
    calls: int  # of each text and engine, in a round
    rounds: int
    onnx: Path | None
    installed: Path  # where peers have virtual environments of their own
    timeout_s: float = 120.0


def compare(path: Path, settings: Settings, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """{"engines": {name: {"version", "texts": [{"tokens", "p50_ms", "p99_ms", "mean_ms"}], "same_labels"}}, ...}.

    Engines take turns, a round each; while one works, the others wait. ModelError, RequestError, WorkerError.
    """
    if not is_encoder(path):
        raise RequestError(f"{path.name} is no encoder; give one with -m, or use millis bench engine")
    head = read_checkpoint(path).config.head
    spec = {
        "model": str(path),
        "threads": settings.threads,
        "labels": 0 if head is None else len(head.labels),
        "onnx": str(settings.onnx),
    }
    workers = {name: _worker(name, settings) for name in ("millis", *settings.peers)}
    try:
        told = {name: worker.ask({"do": "load", "spec": spec}, settings.timeout_s) for name, worker in workers.items()}
        times: dict[str, list[list[float]]] = {name: [[] for _ in settings.texts] for name in workers}
        labels: dict[str, list[int]] = {}
        for number in range(settings.rounds + 1):
            for name, worker in workers.items():
                found = [_calls(worker, text, settings, warm=number == 0) for text in settings.texts]
                labels[name] = [label for label, _ in found]
                for kept, (_, ms) in zip(times[name], found, strict=True):
                    kept.extend(ms if number else [])
                advance()
    finally:
        for worker in workers.values():
            worker.close()
    return _report(times, labels, told, settings)


def _worker(name: str, settings: Settings) -> Worker:
    python = interpreter(name, settings.installed)
    env = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    if name == "millis":
        paths = [str(Path(millis.__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        env.pop("PYTHONPATH", None)
    if name == "onnxruntime" and settings.onnx is None:
        raise RequestError("onnxruntime reads an export of the model; give it with --onnx FILE")
    return Worker([str(python), str(HERE / "worker.py"), str(HERE / "engines" / f"encoder_{name}.py")], env)


def interpreter(name: str, installed: Path) -> Path:
    """The Python that has an engine. RequestError where none has."""
    own = installed / name / "bin" / "python"
    if name != "millis" and own.exists():
        return own
    if find_spec(name) is None:
        raise RequestError(
            f"{name} is not installed here; install it, or a virtual environment with it at {own.parent}"
        )
    return Path(sys.executable)


def _calls(worker: Worker, text: str, settings: Settings, warm: bool) -> tuple[int, list[float]]:
    """The label, and the milliseconds of each call."""
    count = WARM_UP if warm else settings.calls
    answer = worker.ask({"do": "run", "prompt": text, "new_tokens": count}, settings.timeout_s)
    return int(answer["tokens"][-1]), np.diff([0.0, *answer["ms"]]).tolist()


def _report(
    times: Mapping[str, list[list[float]]],
    labels: Mapping[str, list[int]],
    told: Mapping[str, Mapping[str, Any]],
    settings: Settings,
) -> dict[str, Any]:
    engines = {
        name: {
            "version": told[name]["version"],
            "facts": told[name]["facts"],
            "same_labels": float(np.mean([a == b for a, b in zip(labels[name], labels["millis"], strict=True)])),
            "texts": [
                {
                    "words": len(text.split()),
                    "p50_ms": float(np.percentile(ms, 50)),
                    "p99_ms": float(np.percentile(ms, 99)),
                    "mean_ms": float(np.mean(ms)),
                }
                for text, ms in zip(settings.texts, kept, strict=True)
            ],
        }
        for name, kept in times.items()
    }
    return {"threads": settings.threads, "rounds": settings.rounds, "calls": settings.calls, "engines": engines}
