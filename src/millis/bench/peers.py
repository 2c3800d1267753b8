"""The engines of a measurement: which there are, whether they are installed here, and each as a worker process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import millis
from millis.bench import system
from millis.bench.forms import Form
from millis.bench.process import Worker, WorkerError
from millis.types import RequestError

HERE = Path(__file__).parent
INSTALL = "install it with: tools/install_peers.sh {name}"
LOADS = ("first", "cold", "warm")  # the first may leave packed weights on disk; the others find them


@dataclass(frozen=True, slots=True)
class Peer:
    """One other engine."""

    module: str  # what its interpreter imports; also the file in engines/
    form: Form


PEERS: Mapping[str, Peer] = {
    "llama.cpp": Peer("llama_cpp", "gguf"),
    "llama.cpp-avx2": Peer("llama_cpp", "gguf"),
    "onnxruntime-genai": Peer("onnxruntime_genai", "onnx"),
    "openvino-genai": Peer("openvino_genai", "gguf"),
    "vllm": Peer("vllm", "folder"),
    "transformers": Peer("transformers", "folder"),
    "ctranslate2": Peer("ctranslate2", "ctranslate2"),
}

PRECISIONS: Mapping[str, str] = {"millis": "fast", "millis-int8": "int8"}  # Millis, always there, and once more


def chosen(text: str) -> list[str]:
    """Names from "a,b" or "all". RequestError for an unknown one."""
    names, known = [name.strip() for name in text.split(",") if name.strip()], [*list(PRECISIONS)[1:], *PEERS]
    if names == ["all"]:
        return known
    for name in names:
        if name not in known:
            raise RequestError(f"no peer named {name!r}; there are {', '.join(known)}, and all")
    return list(dict.fromkeys(names))


def interpreter(name: str, folder: Path) -> Path | None:
    """The Python that has the peer: of its virtual environment in `folder`, or else this one. None: not installed."""
    module = PEERS[name].module
    if any((folder / name).glob(f"lib/python3*/site-packages/{module}/__init__.py")):
        return folder / name / "bin" / "python"
    if name == module and find_spec(module) is not None:
        return Path(sys.executable)
    return None


@dataclass(slots=True)
class WorkerEngine:
    """An engine in its worker, and what its loads told. Meets the bench's Engine."""

    name: str
    command: list[str]
    env: dict[str, str]
    spec: dict[str, Any]  # {"model": path, "threads": n, "context": tokens, "precision": of Millis}
    timeout_s: float = 600.0
    version: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    import_ms: float = 0.0
    load_ms: dict[str, float] = field(default_factory=dict)  # a name of LOADS → milliseconds
    kept_in_cache: float = 0.0  # share of its files that the system would not forget before the cold load
    worker: Worker | None = None

    def load(self, kinds: Iterable[str] = LOADS, tell: Callable[[str], None] = lambda kind: None) -> None:
        """Loads once a kind, each in a new process; the last one stays. WorkerError."""
        for kind in kinds:
            tell(kind)
            self.close()
            if kind == "cold":
                self.kept_in_cache = system.drop_from_cache(self._files())
            self.worker = Worker(self.command, self.env)
            told = self.worker.ask({"do": "load", "spec": self.spec}, self.timeout_s)
            self.version, self.facts = str(told["version"]), dict(told["facts"])
            self.import_ms, self.load_ms[kind] = float(told["import_ms"]), float(told["load_ms"])

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        if self.worker is None:
            raise WorkerError("is not loaded")
        return self.worker.ask({"do": "run", "prompt": prompt, "new_tokens": new_tokens}, self.timeout_s)

    def memory_mb(self) -> dict[str, float]:
        """Of the worker and what it started."""
        return system.memory_mb(self.worker.pids() if self.worker else [])

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def _files(self) -> list[Path]:
        """What a load reads: the model, and whatever else of the size of one the last load has mapped."""
        mapped = system.mapped_files(self.worker.pids()) if self.worker else []
        return [*system.files_under(Path(self.spec["model"])), *mapped]


def worker_engine(name: str, python: Path, spec: Mapping[str, Any], timeout_s: float) -> WorkerEngine:
    """`name` is a peer's or of PRECISIONS. A peer finds no module of ours, and we none of its."""
    module = PEERS[name].module if name in PEERS else "millis"
    env = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    if name in PEERS:
        env.pop("PYTHONPATH", None)
    else:
        paths = [str(Path(millis.__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    command = [str(python), "-s", str(HERE / "worker.py"), str(HERE / "engines" / f"{module}.py")]
    return WorkerEngine(name, command, env, {**spec, "precision": PRECISIONS.get(name)}, timeout_s)
