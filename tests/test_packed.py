"""The cache of packed weights: hit, miss, and everything that may be wrong with it. Answers never depend on it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import ARCHITECTURES, VOCAB, write_tiny
from millis import _native, hub
from millis.config import EngineConfig
from millis.engine import packed
from millis.engine.native_runner import NativeRunner
from millis.engine.packed import packed_weights
from millis.engine.runner import Batch
from millis.models.fingerprint import fingerprint
from millis.models.load import Model, load_model
from millis.types import FormatError
from shell import LIMIT_S, millis
from test_failures import file_system

CONFIG = EngineConfig(threads=2)
ANSWER = ("Hi", "--max-tokens", "3", "--threads", "2")


@pytest.fixture(autouse=True)
def small_models_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    write_tiny(tmp_path / "tiny.gguf")
    return load_model(tmp_path / "tiny.gguf")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the packed weights go."""
    return tmp_path / "packed" / "tiny.packed"


@pytest.fixture(scope="module")
def smollm2(model_path: Callable[[str], Path]) -> Path:
    return model_path("smollm2")


def kept_weights(model: Model, *arguments: Any) -> _native.PackedFile | None:
    """For a model whose files did not change while it was loaded."""
    return packed_weights(model, fingerprint(model.checkpoint.path), *arguments)


def logits(model: Model, from_file: _native.PackedFile | None) -> np.ndarray:
    """[1, vocab] after twelve tokens."""
    tokens = np.arange(12, dtype=np.int32) * 4 % VOCAB
    zero = np.zeros(1, np.int32)
    return NativeRunner(model, CONFIG, from_file).logits(Batch(tokens, zero, zero + 12, zero[None]))


def written(file: Path) -> tuple[int, int]:
    """Changes whenever the file is written anew."""
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_out_of_the_file_give_the_very_same_logits(architecture: str, tmp_path: Path, file: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", architecture)
    model = load_model(tmp_path / "tiny.gguf")
    want = logits(model, None)
    for _ in range(2):  # as it is written, and as it is found
        found = kept_weights(model, CONFIG, file)
        assert found is not None
        np.testing.assert_array_equal(logits(model, found), want)
    names = [name for name in model.plan.weights() if len(model.checkpoint.tensors[name].shape) == 2]
    names = [name for name in names if not name.endswith("conv.weight")]  # a convolution's, which is not packed
    data = file.read_bytes()
    assert [data.count(name.encode() + b"\0" * (-len(name) % 8)) for name in names] == [1] * len(names)
    assert "output.weight" not in names  # tied: the embedding, kept once


def test_the_second_load_finds_the_file_and_does_not_read_the_model(model: Model, file: Path) -> None:
    kept_weights(model, CONFIG, file)
    before = written(file)
    tensors = model.checkpoint.tensors
    for tensor in tensors.values():
        if len(tensor.shape) == 2:  # a view of the file, mapped for reading only
            object.__setattr__(tensor, "data", tensor.data[:0])
    found = kept_weights(load_model(model.checkpoint.path), CONFIG, file)
    assert found is not None and written(file) == before
    assert np.isfinite(logits(model, found)).all()


def damage(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:50],
        lambda data: data[:5000],
        lambda data: data[:-1],
        lambda data: data[:90] + bytes(16) + data[106:],
        lambda data: b"Once upon a time" * 1000,
        lambda data: data[:8] + (_native.PACK_VERSION + 1).to_bytes(4, "little") + data[12:],
        lambda data: data[:8] + (_native.PACK_VERSION - 1).to_bytes(4, "little") + data[12:],
    ],
    ids=["empty", "in the header", "cut", "one byte short", "damaged", "foreign", "newer", "older"],
)
def test_a_file_that_is_not_whole_is_written_anew(change: Callable[[bytes], bytes], model: Model, file: Path) -> None:
    want = logits(model, None)
    kept_weights(model, CONFIG, file)
    whole = file.read_bytes()
    damage(file, change)
    np.testing.assert_array_equal(logits(model, kept_weights(model, CONFIG, file)), want)
    assert file.read_bytes() == whole


def test_a_model_that_changed_is_packed_anew(model: Model, file: Path) -> None:
    path = model.checkpoint.path
    kept_weights(model, CONFIG, file)
    before = written(file)
    status = path.stat()
    data = bytearray(path.read_bytes())
    at = len(data) - 1000  # within the last matrix
    data[at : at + 64] = bytes(64)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the smallest difference there is
    changed = load_model(path)
    np.testing.assert_array_equal(logits(changed, kept_weights(changed, CONFIG, file)), logits(changed, None))
    assert written(file) != before


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"])
def test_a_model_with_a_value_that_is_none_is_refused_at_every_load(name: str, tmp_path: Path, file: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    data = bytearray(path.read_bytes())
    at = data.index(load_model(path).checkpoint.tensors[name].data.tobytes())
    data[at : at + 4] = b"\xff\xff\xff\xff"  # NaN as float16 and as float32
    path.write_bytes(data)
    for _ in range(2):
        model = load_model(path)
        with pytest.raises(FormatError, match=rf"tiny\.gguf: {re.escape(name)} holds NaN"):
            NativeRunner(model, CONFIG, kept_weights(model, CONFIG, file))
    assert file.exists() == (len(model.checkpoint.tensors[name].shape) == 1)  # the norms are not in it


def test_a_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    content = bytes(range(256)) * 4000
    seen = set()
    for change in (content, content[:-1], content + b"x", b"x" + content[1:], content[:-1] + b"x"):
        path.write_bytes(change)
        os.utime(path, ns=(0, 0))  # neither the time nor, in three cases, the size differs
        assert fingerprint(path) == fingerprint(path)
        seen.add(fingerprint(path))
    assert len(seen) == 5 and all(len(key) == 32 for key in seen)
    os.utime(path, ns=(0, 1))
    assert fingerprint(path) not in seen
    os.rename(path, other)
    with pytest.raises(FileNotFoundError):
        fingerprint(path)


def test_a_folder_has_the_fingerprint_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen = {fingerprint(tmp_path)}
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
        seen.add(fingerprint(tmp_path))
    (tmp_path / "README.md").write_text("not a weight")
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 3


def test_exact_weights_and_small_models_are_not_kept(model: Model, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_weights(model, EngineConfig(precision="exact"), file) is None
    monkeypatch.setattr(packed, "LEAST_BYTES", 1 << 20)
    assert kept_weights(model, CONFIG, file) is None
    assert not file.parent.exists()


def test_an_exact_runtime_takes_nothing_from_a_file(model: Model, file: Path) -> None:
    found = kept_weights(model, CONFIG, file)
    exact = EngineConfig(threads=2, precision="exact")
    tokens, zero = np.arange(3, dtype=np.int32), np.zeros(1, np.int32)
    batch = Batch(tokens, zero, zero + 3, zero[None])
    want = NativeRunner(model, exact).logits(batch)
    np.testing.assert_array_equal(NativeRunner(model, exact, found).logits(batch), want)


def test_a_write_that_fails_leaves_nothing_and_is_said_once(
    model: Model, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert kept_weights(model, CONFIG, file, said.append) is None
    assert len(said) == 1 and said[0].startswith(f"cannot keep packed weights at {file}: No space left on device;")
    assert [path.suffix for path in file.parent.iterdir()] in ([], [".lock"])
    assert kept_weights(model, CONFIG, file, said.append) is not None and len(said) == 1


def test_a_folder_that_cannot_be(model: Model, tmp_path: Path) -> None:
    said: list[str] = []
    assert kept_weights(model, CONFIG, tmp_path / "tiny.gguf" / "x.packed", said.append) is None
    assert len(said) == 1 and re.search("Not a directory|File exists", said[0])


@pytest.mark.parametrize("kept", [False, True])
def test_a_model_that_is_replaced_while_it_is_loaded_leaves_nothing_of_itself(
    kept: bool, tmp_path: Path, file: Path
) -> None:
    """Its name then stands for other weights, under which those that were mapped must not be found."""
    path, other = tmp_path / "tiny.gguf", tmp_path / "other.gguf"
    write_tiny(path)
    write_tiny(other, seed=1)
    if kept:
        kept_weights(load_model(path), CONFIG, file)
    state = fingerprint(path)
    old = load_model(path)
    os.replace(other, path)
    assert packed_weights(old, state, CONFIG, file) is None
    new = load_model(path)
    np.testing.assert_array_equal(logits(new, kept_weights(new, CONFIG, file)), logits(new, None))
    assert not np.array_equal(logits(new, None), logits(old, None))


def test_two_writers_without_a_common_lock_do_not_touch_each_others_file(model: Model, file: Path) -> None:
    """Each has a file of its own until it is whole; one whose file was taken for a dead writer's keeps none."""
    want = logits(model, None)
    chunks = packed._chunks

    def interrupted(pieces: Any) -> Any:
        for number, chunk in enumerate(chunks(pieces)):
            yield chunk[:1000]
            if number == 0 and nested:
                nested.pop()
                file.with_suffix(".lock").unlink()  # as another program might
                assert kept_weights(model, CONFIG, file) is not None
            yield chunk[1000:]

    nested = [True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_chunks", interrupted)
        np.testing.assert_array_equal(logits(model, kept_weights(model, CONFIG, file)), want)
    assert kept_weights(model, CONFIG, file) is not None
    assert not list(file.parent.glob("*.part"))


def test_what_is_of_no_use_is_pruned(model: Model, tmp_path: Path, file: Path) -> None:
    gone, stays, part, fresh = (file.parent / name for name in ("gone.packed", "stays.packed", "a.part", "b.part"))
    write_tiny(tmp_path / "gone.gguf")
    kept_weights(load_model(tmp_path / "gone.gguf"), CONFIG, gone)
    kept_weights(model, CONFIG, stays)
    (tmp_path / "gone.gguf").unlink()
    (file.parent / "damaged.packed").write_text("?")
    part.write_text("?")
    os.utime(part, (0, 0))
    fresh.write_text("?")  # another process may be writing it
    (file.parent / "notes.txt").write_text("not ours")
    assert kept_weights(model, CONFIG, file) is not None
    assert {path.name for path in file.parent.iterdir() if path.suffix != ".lock"} == {
        "tiny.packed", "stays.packed", "b.part", "notes.txt",
    }  # fmt: skip


# The real command

LIMITED = """
import resource
from millis import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 20,) * 2)
cli.main()
"""


def answer(path: Path, home: Path, **environment: str) -> tuple[str, list[str]]:
    """What `millis run` wrote: the text, and the lines beside it but for the last, which is the status."""
    done = millis("run", "-m", path, *ANSWER, MILLIS_HOME=str(home), **environment)
    assert done.returncode == 0, done
    return done.stdout, done.stderr.splitlines()[:-1]


def kept(home: Path) -> list[str]:
    """Suffixes of what lies in the cache."""
    folder = home / "packed"
    return sorted(path.suffix for path in folder.iterdir()) if folder.is_dir() else []


def test_a_second_start_answers_the_same(smollm2: Path, tmp_path: Path) -> None:
    first = answer(smollm2, tmp_path)
    assert first[1] == [] and kept(tmp_path) == [".lock", ".packed"]
    assert answer(smollm2, tmp_path) == first
    file = next((tmp_path / "packed").glob("*.packed"))
    assert 0.9 < file.stat().st_size / smollm2.stat().st_size < 1.1
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models" / "smollm2" / smollm2.name).symlink_to(smollm2)  # the catalogue's name, the same file
    facts = json.loads(millis("doctor", "--json", MILLIS_HOME=str(tmp_path)).stdout)
    assert facts["models"]["smollm2"]["packed_bytes"] == file.stat().st_size
    shown = f"{file.stat().st_size / 1e6:.0f} MB"
    assert millis("models", MILLIS_HOME=str(tmp_path)).stdout.splitlines()[-1].endswith(f"beside them: {shown}")
    assert "packed weights kept" in millis("doctor", MILLIS_HOME=str(tmp_path)).stdout
    file.unlink()
    facts = json.loads(millis("doctor", "--json", MILLIS_HOME=str(tmp_path)).stdout)
    assert facts["models"]["smollm2"]["packed_bytes"] == 0


def test_two_first_starts_at_once(smollm2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "millis", "run", "-m", str(smollm2), *ANSWER]
    environment = os.environ | {"MILLIS_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, stdout=-1, stderr=-1, env=environment, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=LIMIT_S) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert texts[0][0] == texts[1][0] and all(len(error.splitlines()) == 1 for _, error in texts)
    assert kept(tmp_path) == [".lock", ".packed"]


def test_a_full_disk(smollm2: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with file_system(home, "size=40m") as mounted:
        command = [sys.executable, "-c", LIMITED, "run", "-m", str(smollm2), *ANSWER]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"MILLIS_HOME": str(home)}, timeout=LIMIT_S
        )
        notice, status = done.stderr.splitlines()
        assert notice.startswith(f"cannot keep packed weights at {home}/packed/")
        assert re.search("No space left on device|File too large", notice)
        assert kept(home) in ([], [".lock"])
    assert done.returncode == 0 and (done.stdout, []) == answer(smollm2, tmp_path)
    print("on a file system of 40 MB" if mounted else "under a limit of 40 MB a file; no file system could be mounted")


def test_a_cache_that_cannot_be_written(smollm2: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is needed")
    text, notices = answer(smollm2, blocked)
    assert len(notices) == 1 and "cannot keep packed weights at" in notices[0] and "MILLIS_HOME" in notices[0]
    with file_system(tmp_path / "readonly", "ro,size=1m") as mounted:
        if mounted:
            again, notices = answer(smollm2, tmp_path / "readonly")
            assert again == text and len(notices) == 1 and "Read-only file system" in notices[0]


def test_a_start_that_was_killed_leaves_nothing_that_is_trusted(smollm2: Path, tmp_path: Path) -> None:
    """Killed at growing sizes of the file under way; the start after it is whole."""
    for least in (1 << 20, 60 << 20):
        command = [sys.executable, "-m", "millis", "run", "-m", str(smollm2), *ANSWER]
        with subprocess.Popen(
            command, stdout=-3, stderr=-3, env=os.environ | {"MILLIS_HOME": str(tmp_path)}
        ) as process:
            while process.poll() is None:
                sizes = [path.stat().st_size for path in (tmp_path / "packed").glob("*.part") if path.exists()]
                if any(size >= least for size in sizes):
                    process.kill()
        if ".packed" not in kept(tmp_path):
            assert kept(tmp_path) == [".lock", ".part"]
    assert answer(smollm2, tmp_path)[1] == []
    assert kept(tmp_path) == [".lock", ".packed"]


LOADED = """
import resource, sys, millis, millis.tasks.model
from millis.types import SamplingParams
import numpy as np
from millis.engine.runner import Batch

def field(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

before = field("VmRSS")
lm = millis.load(sys.argv[1], threads=2)
print(lm.runner.packed_bytes, field("VmHWM") - before)
resident, inside = 0, False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        inside = line.rstrip().endswith(sys.argv[1])
    elif inside and line.startswith("Rss:"):
        resident += int(line.split()[1]) << 10
print(resident)
sampler = lm.runner.sampler(SamplingParams(), [1])
for tokens, start in ((31, 0), (1, 31), (1, 32), (300, 33), (1, 333)):
    pages = np.arange(-(-(start + tokens) // 32), dtype=np.int32)
    one = np.ones(1, np.int32)
    batch = Batch(np.arange(tokens, dtype=np.int32), one * start, one * tokens, pages[None])
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    lm.runner.step(batch, [sampler])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def test_a_mapped_model_takes_its_memory_once_and_no_fault_in_a_step(smollm2: Path, tmp_path: Path) -> None:
    answer(smollm2, tmp_path)
    command = [sys.executable, "-c", LOADED, os.path.realpath(smollm2)]
    environment = os.environ | {"MILLIS_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    packed_bytes, peak, resident, *faults = map(int, done.stdout.split())
    size = smollm2.stat().st_size
    touched = 33 << 20  # of the KV cache
    assert packed_bytes > 0.9 * size
    assert peak < 1.3 * size + touched + (40 << 20)  # buffers of a step, and the tokenizer
    assert resident < size / 50
    assert faults[0] < 20 and max(faults[1:]) < 5


def test_the_cache_has_a_place_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLIS_HOME", str(tmp_path))
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "model.gguf")
    place = hub.packed_path(tmp_path / "model.gguf")
    assert place.parent == tmp_path / "packed" and place.name.startswith("model.gguf-") and place.suffix == ".packed"
    assert hub.packed_path(tmp_path / "link.gguf") == place != hub.packed_path(tmp_path / "other.gguf")
    assert hub.packed_path(tmp_path / ("x" * 250)).name.startswith("x" * 100 + "-")
