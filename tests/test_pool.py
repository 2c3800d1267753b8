"""Threads: any number gives the same answer, callers take turns, no failure in a thread ends or hangs the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millis import _native
from millis.config import EngineConfig
from millis.engine.native_runner import NativeRunner
from millis.engine.runner import Batch
from millis.models.load import load_model
from tiny_runtime import NONE, Tiny, ints, stored

TABLE = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def runtime(threads: int) -> Tiny:
    """Attention and a product, so that every kind of barrier is passed."""
    tiny = Tiny(TABLE, 32, threads=threads, pages=64, kv_heads=1)
    tiny.native.add_buffer("attended", 32)
    tiny.native.add_buffer("out", 32)
    tiny.matrix("w", TABLE[:32, :32])
    tiny.native.attention("attended", "x", 0, 2, 0.25, "", False, 0, "", "", 1e-6)
    tiny.native.matmul("out", "attended", ["w"], [], "silu", "", "")
    return tiny.finish("out")


@pytest.mark.parametrize("threads", [2, 3, 7, 64])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    one, many = runtime(1), runtime(threads)
    for sequences in ([[5]], [[1, 2, 3], [4]], [list(range(60)), list(range(50)), [7]]):
        np.testing.assert_allclose(many.run(*sequences), one.run(*sequences), atol=1e-6)


@pytest.mark.parametrize("precision", ["fast", "int8"])
def test_who_computes_which_panel_is_chance_and_changes_nothing(
    precision: Any, model_path: Callable[[str], Path]
) -> None:
    model = load_model(model_path("smollm2"))
    tokens = np.random.default_rng(2).integers(100, 40000, 300).astype(np.int32)
    runners = [NativeRunner(model, EngineConfig(threads=t, precision=precision, cache_tokens=512)) for t in (1, 2, 5)]
    for length in (9, 40, 150):
        run = Batch(tokens[:length], ints([0]), ints([length]), ints([range(10)]))
        want = runners[0].logits(run)
        for runner in runners[1:]:
            for _ in range(2):
                np.testing.assert_array_equal(runner.logits(run), want)


def test_callers_of_one_runtime_take_turns() -> None:
    tiny = runtime(2)
    sequences = [np.random.default_rng(s).integers(0, 64, 40) for s in range(4)]
    want = [tiny.run(tokens) for tokens in sequences]

    def ask(s: int) -> bool:
        got = [tiny.run(sequences[s], pages=[range(2 * s, 2 * s + 2)]) for _ in range(25)]
        return all((one == want[s]).all() for one in got)

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(ask, range(4)))


def test_one_sampler_in_two_threads_takes_turns() -> None:
    sampler = _native.Sampler(64, temperature=1.0, frequency=0.5, logprobs=4)
    tinies = [runtime(2), runtime(2)]

    def ask(tiny: Tiny) -> list[int]:
        arrays = tiny.arrays([1, 2, 3])
        return [tiny.native.step(*arrays, [sampler], NONE[:1])[0][0][0] for _ in range(200)]

    with ThreadPoolExecutor(2) as callers:
        assert all(0 <= token < 64 for tokens in callers.map(ask, tinies) for token in tokens)


def test_weights_may_come_from_several_threads() -> None:
    native = Tiny(TABLE, 64, threads=2).native
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda i: native.add_matrix(f"m{i}", 0, 64, 64, stored(TABLE)), range(64)))
    assert native.weight_bytes == 65 * TABLE.nbytes


def test_a_step_keeps_its_samplers_alive() -> None:
    class Fresh(Sequence):  # makes its items when asked, as a lazy sequence may
        def __len__(self) -> int:
            return 2

        def __getitem__(self, at: int) -> _native.Sampler:
            if at >= 2:
                raise IndexError
            return _native.Sampler(64, logprobs=8, repetition=1.1)

        def __iter__(self) -> Iterator[_native.Sampler]:
            return (self[at] for at in range(2))

    tiny = runtime(3)
    logits = tiny.native.logits(*tiny.arrays([1, 2, 3], [4, 5]))
    got = tiny.native.step(*tiny.arrays([1, 2, 3], [4, 5]), Fresh(), NONE)
    assert [token for ((token, _, _),) in got] == logits.argmax(1).tolist()


SETUP = """
import os, resource, sys, threading, time
import numpy as np
from millis import _native
from test_pool import *
def cap(more):
    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, -1))
"""


def script(text: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process of its own, in which text runs."""
    folders = [str(Path(__file__).parent), str(Path(_native.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {folders!r}{SETUP}{text}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_forked_child_is_told_and_can_end() -> None:
    code, out, error = script("""
tiny, alone = runtime(3), runtime(1)
want = alone.run([1, 2, 3])
if os.fork() == 0:
    for ask in (lambda: tiny.run([1]), lambda: Tiny.matrix(tiny, "late", TABLE), lambda: alone.run([1])):
        try:
            ask()
        except RuntimeError as error:
            print(error)
    del tiny
    print("the child goes on", flush=True)
    os._exit(0)
print("the child ended with", os.wait()[1], flush=True)
assert (tiny.run([1, 2, 3]) == want).all()
""")
    assert (code, error) == (0, "")
    assert out.count("load the model after the fork") == 3
    assert "the child goes on" in out and "the child ended with 0" in out


def test_a_daemon_thread_does_not_spoil_the_end() -> None:
    for _ in range(3):
        ended = script("""
tiny = runtime(3)
def forever():
    while True:
        tiny.run(range(60))
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.1)
print("bye")
""")
        assert ended == (0, "bye\n", "")


def test_too_many_threads_are_said() -> None:
    code, out, error = script("""
cap(256 << 20)
for threads in (1000, 1000, 2):
    try:
        print(runtime(threads).run([1]).shape)
    except ValueError as error:
        print(error)
""")
    assert (code, error) == (0, "")
    first, second, last = out.splitlines()
    assert "of 1000 threads; ask for fewer" in first and "of 1000 threads; ask for fewer" in second
    assert last == "(1, 32)"


def test_no_memory_in_a_thread_is_a_memory_error() -> None:
    """The draw needs 8 bytes a token; it runs in the pool, where an exception that escaped would end the process."""
    code, out, error = script("""
tiny = Tiny(np.zeros((1 << 20, 16), np.float32), 16, threads=2)
tiny.finish("x")
arrays = tiny.arrays([1], [2])
samplers = [_native.Sampler(tiny.vocab, temperature=1.0, top_p=0.9, seed=s) for s in range(2)]
cap(6 << 20)
try:
    tiny.native.step(*arrays, samplers, NONE)
except MemoryError:
    print("no memory")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print([0 <= token < tiny.vocab for ((token, _, _),) in tiny.native.step(*arrays, samplers, NONE)])
""")
    assert (code, error, out) == (0, "", "no memory\n[True, True]\n")


def test_a_runtime_is_let_go_while_its_threads_spin() -> None:
    for _ in range(30):
        tiny = runtime(4)
        assert tiny.run([1, 2]).shape == (2, 32)
        del tiny


@pytest.mark.skipif(sys.platform != "linux", reason="threads are kept apart on Linux only")
def test_threads_that_slept_keep_the_cpus_they_may_use() -> None:
    """A thread that leaves another's CPU is confined for one job; behind it, it may use all that the process may."""
    code, out, error = script("""
def masks():
    names = [f"/proc/self/task/{task}/status" for task in os.listdir("/proc/self/task")]
    return {line for name in names for line in open(name) if line.startswith("Cpus_allowed_list")}
tiny = runtime(3)
want = tiny.run(range(60))
before = masks()
for _ in range(40):
    time.sleep(0.005)  # the pool parks
    assert (tiny.run(range(60)) == want).all() and masks() == before, masks()
cpu = min(os.sched_getaffinity(0))
for task in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(task), {cpu})
time.sleep(0.005)
assert (tiny.run(range(60)) == want).all()
print(masks() == {f"Cpus_allowed_list:\\t{cpu}\\n"})
""")
    assert (code, error, out) == (0, "", "True\n")


@pytest.mark.parametrize("arguments", [(0, 1), (70000, 1), (1, 0), (1, 2000), (-1, -1)])
def test_bandwidth_checks_its_arguments(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"reading: mib|threads must lie in \[1, 1024\]"):
        _native.read_bandwidth(*arguments)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_work_is_shared_among_a_sensible_number(threads: int) -> None:
    panels = (8, 16, 32, np.zeros(16 * 34, np.uint8), threads)
    values = (2, np.zeros((16, 32), np.float32), np.ones(32, np.float32), threads)
    for ask in (
        lambda: _native.barrier_ns(threads),
        lambda: _native.pack("w", *panels),
        lambda: _native.quantize(*values),
    ):
        with pytest.raises(ValueError, match=r"threads must lie in \[1, 1024\]"):
            ask()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_barrier_takes_some_time(threads: int) -> None:
    """More threads than cores among them: those that wait give theirs away."""
    assert 0 < _native.barrier_ns(threads) < 1e9


@pytest.mark.parametrize("threads", [1, 3, 1024])
def test_bandwidth_is_positive(threads: int) -> None:
    assert 0 < _native.read_bandwidth(1, threads) < 1e5
