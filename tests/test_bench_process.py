"""Workers as real processes: engines that die, hang, lie, print, spin or start others; memory and the page cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from millis.bench import peers, system
from millis.bench.peers import WorkerEngine, interpreter
from millis.bench.process import Worker, WorkerError

ENGINE = """
import os, signal, subprocess, sys, threading, time

class Engine:
    version = "7"

    def __init__(self, spec):
        self.spec = spec
        {load}

    def run(self, prompt, new_tokens, emit):
        {run}
"""
COUNTS = "for i in range(new_tokens): emit(prompt[0] + i)"

Make = Callable[..., WorkerEngine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A worker whose engine is a file with these lines in it."""
    made: list[WorkerEngine] = []

    def worker(
        run: str = COUNTS, load: str = "pass", timeout_s: float = 30.0, kinds: tuple[str, ...] = ("warm",)
    ) -> WorkerEngine:
        path = tmp_path / f"engine_{len(made)}.py"
        path.write_text(ENGINE.format(load=load, run=run))
        weights = tmp_path / "weights.bin"
        weights.write_bytes(bytes(1 << 20))
        command = [sys.executable, "-s", str(peers.HERE / "worker.py"), str(path)]
        spec = {"model": str(weights), "threads": 1, "context": 64}
        made.append(engine := WorkerEngine("fake", command, dict(os.environ), spec, timeout_s))
        engine.load(kinds)
        return engine

    yield worker
    for engine in made:
        engine.close()


def test_tokens_and_their_times_come_back(make: Make) -> None:
    engine = make("for i in range(new_tokens): time.sleep(0.02); emit(prompt[0] + i)")
    answer = engine.run([5, 6], 3)
    assert answer["tokens"] == [5, 6, 7]
    first, second, third = answer["ms"]
    assert 20 <= first <= second - 20 <= third - 40
    assert engine.version == "7"
    assert engine.import_ms > 0


def test_what_an_engine_prints_is_no_reply(make: Make) -> None:
    engine = make("print('hello'); os.write(1, b'from C'); emit(1)", "print('an opening {')")
    assert engine.run([1], 1)["tokens"] == [1]


def test_an_error_is_reported_and_the_worker_goes_on(make: Make) -> None:
    engine = make("emit(1 // prompt[0])")
    with pytest.raises(WorkerError, match="ZeroDivisionError: integer division"):
        engine.run([0], 1)
    assert engine.run([1], 1)["tokens"] == [1]


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "died of SIGILL"),
        ("print('no such file', file=sys.stderr); os._exit(3)", "exit code 3; it said: no such file"),
    ],
)
def test_a_death_has_its_cause(make: Make, run: str, why: str) -> None:
    engine = make(run)
    with pytest.raises(WorkerError, match=why):
        engine.run([1], 1)
    with pytest.raises(WorkerError):
        engine.run([1], 1)


def test_a_load_that_fails_says_why(make: Make) -> None:
    with pytest.raises(WorkerError, match="ModuleNotFoundError: No module named 'no_such_engine'"):
        make(load="import no_such_engine")


def test_a_worker_that_hangs_is_ended_with_what_it_started(make: Make) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    engine = make("time.sleep(600)", f"self.child = {child}", timeout_s=3)
    assert engine.worker is not None
    pids = engine.worker.pids()
    assert len(pids) == 2
    with pytest.raises(WorkerError, match="no answer to 'run' in 3 s"):
        engine.run([1], 1)
    assert ended(pids)


def test_close_ends_an_idle_worker_and_may_be_repeated(make: Make) -> None:
    engine = make()
    assert engine.worker is not None
    pids = engine.worker.pids()
    engine.close()
    engine.close()
    assert ended(pids)
    with pytest.raises(WorkerError, match="not loaded"):
        engine.run([1], 1)


def test_a_worker_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(ENGINE.format(load="pass", run=COUNTS))
    code = (
        "import os, sys, time; from millis.bench.process import Worker\n"
        "worker = Worker([sys.executable, *sys.argv[1:]], os.environ); worker.ask({'do': 'load', 'spec': {}}, 30)\n"
        "print(*worker.pids(), flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(peers.HERE / "worker.py"), str(tmp_path / "engine.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_for(lambda: [state(pid) for pid in pids] == ["T"])
        parent.kill()
    assert ended(pids)


def test_an_idle_engine_takes_no_time(make: Make) -> None:
    """One that spins in a thread for ever stands still between requests."""
    spin = "threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()"
    engine = make(load=spin)
    assert engine.worker is not None
    (pid,) = engine.worker.pids()
    wait_for(lambda: state(pid) == "T")
    before = cpu_ticks(pid)
    time.sleep(0.3)
    assert cpu_ticks(pid) == before
    assert engine.run([1], 1)["tokens"] == [1]
    assert cpu_ticks(pid) >= before


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"ok": 3}', "{}"])
def test_replies_that_are_none(line: str) -> None:
    code = f"import sys; sys.stdin.readline(); print({line!r}, flush=True); sys.stdin.readline()"
    worker = Worker([sys.executable, "-c", code], os.environ)
    with pytest.raises(WorkerError, match="answered"):
        worker.ask({"do": "run"}, 30)
    worker.close()


def test_three_loads_are_three_processes(make: Make) -> None:
    engine = make(
        load="with open(spec['model'] + '.log', 'a') as log: log.write(f'{os.getpid()} ')",
        kinds=peers.LOADS,
    )
    log = Path(engine.spec["model"] + ".log").read_text().split()
    assert len(set(log)) == 3
    assert list(engine.load_ms) == ["first", "cold", "warm"]
    assert engine.worker is not None and engine.worker.pids() == [int(log[-1])]


def test_memory_counts_the_children_too(make: Make) -> None:
    hold = "import time; kept = bytearray(80 << 20); print(1, flush=True); time.sleep(600)"
    start = f"subprocess.Popen([sys.executable, '-c', {hold!r}], stdout=subprocess.PIPE)"
    child = f"self.child = {start}; self.child.stdout.readline()"
    alone, with_child = make().memory_mb(), make(load=child).memory_mb()
    for key in ("peak_rss_mb", "pss_mb"):
        assert alone[key] + 80 < with_child[key] < alone[key] + 200


def test_the_peak_is_remembered(make: Make) -> None:
    memory = make(load="bytearray(120 << 20)").memory_mb()
    assert memory["peak_rss_mb"] > 120 > memory["pss_mb"]


def test_a_file_is_dropped_from_the_page_cache_unless_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(4 << 20))
    if system.drop_from_cache([path]) == 1:
        return  # a file system in memory keeps all, and that is what is said
    path.read_bytes()
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() > 0
    assert system.drop_from_cache([path]) == 1
    del mapped
    assert system.drop_from_cache([path]) == 0


def test_large_mapped_files_are_found(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    for path, size in ((large, 9 << 20), (small, 1 << 20)):
        path.write_bytes(bytes(size))
    before = set(system.mapped_files([os.getpid()]))  # files that other tests keep
    maps = [np.memmap(path, np.uint8, "r") for path in (large, small)]
    assert set(system.mapped_files([os.getpid()])) - before == {large}
    del maps


def test_files_under_a_folder(tmp_path: Path) -> None:
    for name in ("b/c", "a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert system.files_under(tmp_path) == [tmp_path / "a", tmp_path / "b" / "c"]
    assert system.files_under(tmp_path / "a") == [tmp_path / "a"]


def test_a_peer_is_installed_where_its_module_is(tmp_path: Path) -> None:
    assert interpreter("llama.cpp", tmp_path) is None
    package = tmp_path / "llama.cpp" / "lib" / "python3.11" / "site-packages" / "llama_cpp"
    package.mkdir(parents=True)
    assert interpreter("llama.cpp", tmp_path) is None  # its installation was broken off
    (package / "__init__.py").write_text("")
    assert interpreter("llama.cpp", tmp_path) == tmp_path / "llama.cpp" / "bin" / "python"
    assert interpreter("llama.cpp-avx2", tmp_path) is None
    assert interpreter("transformers", tmp_path) == Path(sys.executable)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def ended(pids: list[int]) -> bool:
    def gone(pid: int) -> bool:
        try:
            return state(pid) == "Z"
        except FileNotFoundError:
            return True

    wait_for(lambda: all(map(gone, pids)))
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
