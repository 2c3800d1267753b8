"""Coverage-guided fuzzing of the model readers: python tests/fuzz/fuzz_readers.py --seconds 60 [--seed 0] [--out DIR]

An input that runs a line, or a step from one line to another, not seen before joins the corpus; inputs are mutations of
the corpus. They are aimed: at the places where the GGUF reader was seen to read a field, and at the values of JSON.
Each must end in values or in FormatError, within memory and time; the first that does not is saved, with exit code 1.
What is read: GGUF files (parsing and configuration), safetensors files, config.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import millis.models.gguf as gguf_reader  # noqa: E402
import millis.models.huggingface_config as huggingface_config  # noqa: E402
from gguf_files import ARCHITECTURES, write_tiny  # noqa: E402
from millis.models.gguf_config import gguf_config  # noqa: E402
from millis.models.gguf_values import Cursor, StringArray  # noqa: E402
from millis.models.mapped import parse_json  # noqa: E402
from millis.models.safetensors import parse_safetensors  # noqa: E402
from millis.models.tensor import Tensor  # noqa: E402
from millis.types import FormatError  # noqa: E402

MODELS = str(Path(huggingface_config.__file__).parent)
MEMORY_BYTES = 1 << 30  # above what the process holds at the start
SECONDS_PER_INPUT = 10
MAX_INPUT_BYTES = 1 << 17
NUMBERS = [0, 1, 2, 3, 7, 8, 31, 32, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**62, 2**63, 2**64 - 1]
VALUES = [None, True, False, -1, 0, 1, 2, 3, 8, 2**31, 2**63, 10**400, 0.5, -1.0, 1e-320, 1e308, float("nan"), "", "x"]
VALUES += [
    "linear",
    "llama3",
    "gpt2",
    "gemma3_text",
    "qwen3",
    "F16",
    "BF16",
    [],
    {},
    [1],
    [0, 4],
    ["full_attention"],
    {"a": 1},
]
WORDS = [json.dumps(value).encode() for value in VALUES if value != 10**400] + [b"1e999", b"]", b"}", b'{"', b"\xff"]

Trace = Callable[[FrameType, str, Any], Any]


@dataclass(frozen=True)
class Input:
    """`fields`: where the reader read, as far as it came."""

    kind: str
    data: bytes
    fields: tuple[int, ...] = ()


class WatchedCursor(Cursor):
    """Notes where each field of the latest input begins."""

    fields: list[int] = []

    def skip(self, count: int, what: str) -> int:
        self.fields.append(self.at)
        return super().skip(count, what)


def read_a_gguf(data: bytes) -> None:
    metadata, tensors = gguf_reader.parse_gguf(np.frombuffer(data, np.uint8))
    for value in metadata.values():
        if isinstance(value, StringArray):
            list(value)
    gguf_config(metadata, tensors)
    read_values(tensors)


def read_a_safetensors(data: bytes) -> None:
    read_values(parse_safetensors(np.frombuffer(data, np.uint8)))


def read_a_config(data: bytes) -> None:
    huggingface_config.huggingface_config(parse_json(data, "config.json"), "fuzzed")


def read_values(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        assert tensor.numpy().shape == tensor.shape


READERS: dict[str, Callable[[bytes], None]] = {
    "gguf": read_a_gguf,
    "safetensors": read_a_safetensors,
    "config": read_a_config,
}


def seeds() -> list[Input]:
    """Valid inputs of every kind."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            path = Path(folder) / f"{architecture}.gguf"
            write_tiny(path, architecture, {"general.alignment": 32, ".rope.scaling.factor": 1.0})
            found.append(Input("gguf", path.read_bytes()))
            lists = {".attention.sliding_window_pattern": [True, False]} if architecture == "gemma3" else {}
            write_tiny(path, architecture, lists)
            found.append(Input("gguf", path.read_bytes()))
    entries = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    entries["b"] = {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}
    header = json.dumps(entries).encode()
    found.append(Input("safetensors", len(header).to_bytes(8, "little") + header + bytes(14)))
    return found + [Input("config", json.dumps(config).encode()) for config in configs()]


def configs() -> list[dict[str, Any]]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 64}
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 32}
    kinds = ["sliding_attention", "full_attention"]
    gemma3 = {**sizes, "model_type": "gemma3_text", "layer_types": kinds, "sliding_window": 8, "head_dim": 16}
    gemma3 |= {"rope_parameters": {"full_attention": llama3, "sliding_attention": {"rope_theta": 1e4}}}
    return [
        {**sizes, "model_type": "llama", "rope_parameters": llama3},
        {**sizes, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**sizes, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": kinds},
        gemma3,
        {"model_type": "gemma3", "text_config": {**sizes, "sliding_window_pattern": 2}},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32},
    ]


def mutate(parent: Input, others: list[bytes], rng: random.Random) -> bytes:
    """A few changes to the bytes, most of them at fields, or near the start, where headers are."""
    changed = bytearray(parent.data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(changed) or 1
        at = int(size * rng.random() ** rng.choice((1, 3, 6)))
        if parent.fields and rng.random() < 0.7:
            at = rng.choice(parent.fields)
        match rng.randrange(8):
            case 0 if changed:
                changed[min(at, size - 1)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 8] = rng.choice(NUMBERS).to_bytes(8, "little")
            case 2 | 3:
                changed[at : at + 4] = (rng.choice(NUMBERS) & 0xFFFFFFFF).to_bytes(4, "little")
            case 4:
                del changed[at : at + rng.randint(1, 64)]
            case 5:
                changed[at : at + rng.randint(0, 12)] = rng.choice(WORDS)
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) or 1)
                changed[at : at + rng.choice((0, 16))] = other[start : start + rng.randint(1, 64)]
            case 7 if rng.random() < 0.2:
                del changed[at:]
    return bytes(changed[:MAX_INPUT_BYTES])


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """One value, at any depth, taken out or replaced; `text` as it is where it is not JSON."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return text
    at: Any = root
    while isinstance(at, dict | list) and at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not (isinstance(at[key], dict | list) and at[key]) or rng.random() < 0.2:
            at[key] = rng.choice(VALUES)
            if rng.random() < 0.2:
                del at[key]
            break
        at = at[key]
    return json.dumps(root).encode()


def child(corpus: dict[str, list[Input]], rng: random.Random) -> Input:
    """A mutation of one of the corpus."""
    kind = rng.choice(("gguf", "gguf", "safetensors", "config"))
    parent = rng.choice(corpus[kind])
    if kind != "gguf" and rng.random() < 0.6:
        if kind == "config":
            return Input(kind, mutate_json(parent.data, rng))
        size = int.from_bytes(parent.data[:8], "little")
        header = mutate_json(parent.data[8 : 8 + size], rng)
        return Input(kind, len(header).to_bytes(8, "little") + header + parent.data[8 + size :])
    return Input(kind, mutate(parent, [other.data for other in corpus[kind]], rng))


class Coverage:
    """Steps from line to line inside our readers, gathered by the interpreter's trace hook."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self._new = False

    def run(self, call: Callable[[], None]) -> bool:
        """Runs `call`; whether it went where none went before, even if it raised FormatError."""
        self._new = False
        sys.settrace(self._enter)
        try:
            call()
        except FormatError:
            pass
        finally:
            sys.settrace(None)
        return self._new

    def _enter(self, frame: FrameType, event: str, _: Any) -> Trace | None:
        file = frame.f_code.co_filename
        if not file.startswith(MODELS):
            return None
        last = 0

        def line(frame: FrameType, event: str, _: Any) -> Trace:
            nonlocal last
            step = (file, last, frame.f_lineno)
            last = frame.f_lineno
            if step not in self.seen:
                self.seen.add(step)
                self._new = True
            return line

        return line


def too_slow(*_: Any) -> None:
    raise TimeoutError(f"an input took more than {SECONDS_PER_INPUT} seconds")


def bound_process() -> None:
    """Memory by the operating system, time by an alarm."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
    signal.signal(signal.SIGALRM, too_slow)


def save(folder: Path, kind: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"failing-{time.time_ns()}.{kind}"
    path.write_bytes(data)
    return path


def fuzz(seconds: float, seed: int, out: Path) -> int:
    """The process's exit code."""
    rng, coverage, queue = random.Random(seed), Coverage(), seeds()
    corpus: dict[str, list[Input]] = {kind: [] for kind in READERS}
    bound_process()
    gguf_reader.Cursor = WatchedCursor  # type: ignore[misc]
    runs, end = 0, time.monotonic() + seconds
    while queue or time.monotonic() < end:
        seeding = bool(queue)
        tried = queue.pop() if seeding else child(corpus, rng)
        runs += 1
        WatchedCursor.fields.clear()
        signal.alarm(SECONDS_PER_INPUT)
        try:
            new = coverage.run(lambda tried=tried: READERS[tried.kind](tried.data))
        except Exception:  # whatever it is, it is the finding
            traceback.print_exc()
            print(f"run {runs}: saved as {save(out, tried.kind, tried.data)}", file=sys.stderr)
            return 1
        finally:
            signal.alarm(0)
        if new or seeding:
            corpus[tried.kind].append(Input(tried.kind, tried.data, tuple(WatchedCursor.fields)))
    kept = sum(map(len, corpus.values()))
    print(f"{runs} inputs, {kept} kept, {len(coverage.seen)} steps covered, no finding (seed {seed})")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    return fuzz(options.seconds, options.seed, options.out)


if __name__ == "__main__":
    sys.exit(main())
