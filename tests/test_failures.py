"""What goes wrong in the world, met by the real command: each failure is one clear line; nothing half-done is trusted.

The disk is a real file system of its own where this user may mount one; otherwise a limit on the size of files, or a
cache folder below a file, stands for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hub_support import MODEL, NOWHERE, build_wheels, serving, tiny_entry, wheels_alone
from millis import _native
from shell import LIMIT_S, error_line, millis, started

CLI = """
import sys
from hub_support import catalogue_of, tiny_entry
from millis import cli
with catalogue_of(tiny_entry()):
    cli.main()
"""  # the command, with a catalogue of one tiny model

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)
os.execv(sys.argv[1], sys.argv[1:])
"""  # a command that gets no more memory than this; the weights and 8,192 positions of cache take 300 MB


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Callable[[Path], None]) -> Path:
    """A cache of its own, and a pip that finds only what lies in the folder `wheels`."""
    wheels_alone(monkeypatch, tmp_path)
    packed(tmp_path / "home")
    for name in ("MILLIS_ISA", "MILLIS_OFFLINE", "MILLIS_ACCEPT_TERMS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def smollm2(model_path: Callable[[str], Path]) -> Path:
    return model_path("smollm2")


def run(model: object, *arguments: str, stdin: str | bytes = "", **environment: str) -> str:
    """The line that `millis run` fails with."""
    return error_line(millis("run", "-m", str(model), *(arguments or ("Hi",)), stdin=stdin, **environment))


# Models that are none


def test_a_name_with_a_slip_is_guessed() -> None:
    assert run("smolm2").startswith("no model named 'smolm2'; did you mean smollm2?")
    assert "the catalogue has smollm2, " in run("xyzzy")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert run(tmp_path / "absent.gguf") == f"there is no file {tmp_path}/absent.gguf"


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "not a GGUF file"), (3, "not a GGUF file"), (20, "ends"), (50_000, "ends"), (-4096, "ends")],
)
def test_a_file_that_ends_too_early(size: int, expected: str, smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2.open("rb") as whole:
        path.write_bytes(whole.read(size if size >= 0 else smollm2.stat().st_size + size))
    line = run(path)
    assert "cut.gguf" in line and expected in line


def test_a_text_that_is_called_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("Once upon a time, there was a file.\n")
    assert "x.gguf: not a GGUF file" in run(tmp_path / "x.gguf")
    (tmp_path / "x.txt").write_text("Once upon a time")
    assert "neither a .gguf file nor a folder with config.json" in run(tmp_path / "x.txt")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "neither a .gguf file nor a folder with config.json" in run(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in run(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "config.json" in run(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "mamba" in run(folder)


# Requests that cannot run


def test_an_instruction_set_that_is_not_here(smollm2: Path) -> None:
    for name in {"nonsense", "amx", "neon", "avx512"} - set(_native.supported_isas()):
        line = run(smollm2, MILLIS_ISA=name)
        assert line.startswith(f"this machine has no instruction set '{name}'; it has scalar")
        assert "unset MILLIS_ISA" in line


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_an_instruction_set_that_is_here(isa: str, smollm2: Path) -> None:
    done = millis("run", "-m", smollm2, "Hi", "--max-tokens", "2", "--threads", "1", MILLIS_ISA=isa)
    assert done.returncode == 0 and done.stderr.endswith(f", {isa}\n")


def test_prompts_that_cannot_run(smollm2: Path) -> None:
    assert run(smollm2, "word " * 50, "--context", "40").endswith("the context holds 40, the answer included")
    assert run(smollm2, "Hi", "--context", "1000000").startswith("context must lie in [1, 8192]")
    assert run(smollm2, "").startswith("the prompt is empty; give a text")
    assert run(smollm2, "-", stdin=" \n").startswith("the prompt is empty; give a text")
    assert run(smollm2, "-", stdin=b"good, then \xff").startswith("standard input is not UTF-8 text (byte 11)")
    assert run(smollm2, "Hi", "--raw", "--system", "Be brief.").startswith("a system message needs a chat template")


def test_more_cache_than_memory(smollm2: Path) -> None:
    command = [sys.executable, "-m", "millis", "run", "-m", str(smollm2), "Hi", "--threads", "1"]
    variables = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, env=variables)
    assert re.search("not enough memory.*ask for a shorter context|Cannot allocate memory", error_line(done))


# Output that nobody takes


def test_a_reader_that_goes_away(smollm2: Path) -> None:
    """As in `millis run … | head -c 1`: the end, without a word, long before the story's."""
    with started("run", "-m", smollm2, "Hi", "--ignore-eos", "--max-tokens", "8000") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=LIMIT_S) == 1


@pytest.mark.parametrize("verb", ["run", "models", "--help"])
def test_a_full_disk_behind_standard_output(verb: str, smollm2: Path) -> None:
    arguments = ["run", "-m", str(smollm2), "Hi", "--max-tokens", "2"] if verb == "run" else [verb]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "millis", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (1, "millis: cannot write the output: No space left on device\n")


# Pulls


def pull(limit_bytes: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`millis pull tiny`, which may write files of up to `limit_bytes`."""
    code = CLI
    if limit_bytes:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes},) * 2)" + CLI
    variables = os.environ | {"PYTHONPATH": _python_path()} | environment
    command = [sys.executable, "-c", code, "pull", "tiny"]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=LIMIT_S)


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """A pull says what it does; its failure is the last line."""
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, ""), done
    assert [line.startswith("millis: ") for line in lines] == [False] * (len(lines) - 1) + [True], done.stderr
    return lines[-1].removeprefix("millis: ")


@contextmanager
def file_system(folder: Path, options: str) -> Iterator[bool]:
    """A file system in memory at `folder`; False where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    mounted = (
        mount is not None
        and not subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "millis-test", str(folder)], capture_output=True
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_an_index_on_a_full_disk(tmp_path: Path) -> None:
    text, index = tmp_path / "a.txt", tmp_path / "full" / "bank.idx"
    text.write_text("A card that was lost is sent again.\n")
    with file_system(index.parent, "size=8k") as mounted:
        if not mounted:
            pytest.skip("no file system could be mounted")
        line = error_line(millis("index", str(text), "--index", str(index), "--embedder", "none"))
        assert line == f"no space is left for {index}; make room, or give another place"
        assert not list(index.parent.iterdir())


def is_absent(home: Path) -> bool:
    """Whether nothing under the model's final name is there, and `millis models` would say so."""
    return not (home / "models" / "tiny" / "tiny.gguf").exists()


def test_a_pull_that_works(home: Path, tmp_path: Path) -> None:
    build_wheels(tmp_path / "wheels", tiny_entry())
    done = pull()
    assert done.returncode == 0, done
    assert Path(done.stdout.strip()).read_bytes() == MODEL
    assert done.stderr.splitlines()[0].startswith("fetching tiny")
    again = pull()
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


def test_a_disk_without_room(home: Path, tmp_path: Path) -> None:
    build_wheels(tmp_path / "wheels", tiny_entry())
    with file_system(home, "size=256k") as mounted:
        line = last_line(pull(limit_bytes=0 if mounted else 150_000))
        assert line.startswith("cannot store tiny at ")
        assert line.endswith("free some space there, or set MILLIS_HOME to a folder on another disk")
        assert is_absent(home)
    assert pull().returncode == 0


def test_a_disk_that_fills_up_on_the_way(home: Path, tmp_path: Path) -> None:
    build_wheels(tmp_path / "wheels", tiny_entry())
    line = last_line(pull(limit_bytes=250_000))
    assert line.startswith("cannot store tiny at ") and "File too large; free some space there" in line
    assert is_absent(home)
    done = pull()
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_a_cache_that_is_read_only(home: Path, tmp_path: Path) -> None:
    build_wheels(tmp_path / "wheels", tiny_entry())
    with file_system(home, "ro") as mounted:
        blocked = tmp_path / "file"
        blocked.write_text("in the way")
        line = last_line(pull(MILLIS_HOME=str(home if mounted else blocked / "home")))
        assert "Read-only file system" in line if mounted else "Not a directory" in line
        assert line.endswith("set MILLIS_HOME to a folder that can be written")


def test_a_model_in_a_read_only_cache_still_runs(home: Path, smollm2: Path) -> None:
    with file_system(home, "size=200m") as mounted:
        path = home / "models" / "smollm2" / smollm2.name
        path.parent.mkdir(parents=True)
        shutil.copy(smollm2, path)
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        else:
            path.parent.chmod(0o500)
        done = millis("run", "-m", "smollm2", "Hi", "--max-tokens", "2", "--threads", "1")
    assert done.returncode == 0 and done.stdout.strip()


def test_no_network(home: Path) -> None:
    nowhere = {"HF_ENDPOINT": NOWHERE, "PIP_NO_INDEX": "", "PIP_INDEX_URL": NOWHERE, "PIP_FIND_LINKS": ""}
    line = last_line(millis("pull", "smollm2", **nowhere))
    assert line.startswith("cannot fetch smollm2: ")
    assert line.count("no connection") == 2  # neither source
    assert "no connection" in run("owner/repo", **nowhere)
    assert not [path for path in home.rglob("*.gguf")]


def test_offline_by_choice() -> None:
    line = run("smollm2", MILLIS_OFFLINE="1")
    assert line.startswith("smollm2 is not on disk and MILLIS_OFFLINE=1 forbids fetching it")
    assert run("smollm2", MILLIS_OFFLINE="yes") == "MILLIS_OFFLINE must be 0 or 1, not 'yes'"


def test_terms_that_nobody_agreed_to(home: Path) -> None:
    done = millis("pull", "gemma3-270m", HF_ENDPOINT=NOWHERE)
    assert "Gemma Terms of Use" in done.stderr and "millis pull gemma3-270m --accept-terms" in done.stderr
    assert last_line(done) == "the terms of gemma3-270m were not agreed to; nothing was fetched"
    assert not list(home.rglob("*gemma*"))


def test_a_hub_that_sends_other_bytes(smollm2: Path) -> None:
    with serving() as hub:
        hub.files["owner/tiny"] = {"tiny.gguf": MODEL}
        hub.claims["tiny.gguf"] = "0" * 64
        line = last_line(millis("pull", "owner/tiny", HF_ENDPOINT=hub.url))
        assert line.endswith("tiny.gguf is not what the hub lists; it was discarded, try again")
        hub.claims.clear()
        done = millis("run", "-m", "owner/tiny", "Hi", HF_ENDPOINT=hub.url)
    assert "tiny.gguf: not a GGUF file" in last_line(done)
