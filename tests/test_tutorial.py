"""docs/tutorial.md: its blocks run as they stand, in order, in an empty folder.

MILLIS_TUTORIAL=long runs the last one, too: minutes of training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from millis.data.named import FORMAT
from millis.hub import store
from serving import until

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
WORDS = {  # for a stand-in where banking77 is not on this machine
    "card_arrival": "ordered card still not here delivery waiting mail weeks arrived",
    "lost_or_stolen_card": "stole wallet lost card missing thief robbed find",
    "exchange_rate": "rate exchange dollars euros currency use conversion",
    "pin_blocked": "pin blocked wrong too often unlock code tries",
    "transfer_timing": "transfer long take bank account days time until",
    "top_up_failed": "top up failed declined rejected money added attempt",
}


def blocks() -> list[tuple[str, str, str]]:
    """(mark, language, text) of each block that is to be run."""
    return [(mark, language, text) for mark, language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def stand_in(folder: Path) -> None:
    """A set of banking77's form, for a machine that has no copy of it."""
    folder.mkdir(parents=True)
    for part, begin in (("train", 0), ("test", 40)):
        with open(folder / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for label, text in WORDS.items():
                words = text.split()
                for i in range(begin, begin + (40 if part == "train" else 5)):
                    chosen = [words[(i * k) % len(words)] for k in (1, 2, 3)] + [f"please {i}"]
                    file.write(json.dumps({"text": " ".join(chosen), "label": label}) + "\n")
    (folder / "set.json").write_text(json.dumps({"format": FORMAT, "parts": {}}), encoding="utf-8")


def world(home: Path, minilm: Path) -> dict[str, str]:
    """The environment of somebody who begins: a home of its own, with the model and the data as they are here."""
    (home / "models").mkdir(parents=True)
    (home / "models" / "minilm").symlink_to(minilm)
    (home / "data").mkdir()
    known, given = store.home() / "data" / "banking77", os.environ.get("MILLIS_DATA")
    shared = PAGE.parent.parent.parent / "shared" / "data"
    own = next((str(f) for f in (Path(given or "."), shared) if (f / "banking77_train.csv").is_file()), None)
    if own is None and known.is_dir():
        (home / "data" / "banking77").symlink_to(known)
    elif own is None:
        print("\nbanking77 is not on this machine: the tutorial runs on a stand-in", file=sys.__stderr__)
        stand_in(home / "data" / "banking77")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    passive = {"OMP_WAIT_POLICY": "passive"}  # threads of training that wait for others do not spin
    return os.environ | {"MILLIS_HOME": str(home), "PATH": path, "PORT": port, "MILLIS_DATA": own or ""} | passive


def start(program: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A server in the background, once it answers."""
    running = subprocess.Popen(program, cwd=folder, env=environment, start_new_session=True)

    def ready() -> bool:
        assert running.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{environment['PORT']}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        until(ready)
    except BaseException:
        stop(running)
        raise
    return running


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
    server.wait(60)


def wanted(mark: str, text: str, not_run: Callable[[str], None]) -> bool:
    """Whether a block is run: what is installed is what runs this test, and the long way is taken on request."""
    if "curl " in text and shutil.which("curl") is None:
        not_run("a block of the tutorial that needs curl")
        return False
    return mark != "install" and (mark != "long" or os.environ.get("MILLIS_TUTORIAL") == "long")


def test_the_tutorial_runs_as_it_stands(
    model_path: Callable[[str], Path], tmp_path: Path, not_run: Callable[[str], None]
) -> None:
    environment, folder = world(tmp_path / "home", model_path("minilm")), tmp_path / "work"
    folder.mkdir()
    server = None
    said: list[str] = []
    try:
        for mark, language, text in blocks():
            program = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
            if mark == "server":
                server = start(program, folder, environment)
            elif wanted(mark, text, not_run):
                done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
                said.append(done.stdout)
    finally:
        if server is not None:
            stop(server)
    accuracy = re.search(r"macro_f1[^\n]*\n[^\n]*\n│\s+(\d\.\d+) │", said[1])
    assert accuracy is not None and float(accuracy[1]) > 0.7
    for text in said[2:]:
        if text.startswith("{"):
            (found,) = json.loads(text)["data"]
            assert found["label"] == "card_arrival" and found["num_classes"] == 6
        elif "numbers a text" in text:
            labels = [line.split()[0] for line in text.splitlines()]
            assert labels == ["lost_or_stolen_card", "exchange_rate", "384"]
    assert any("numbers a text" in text for text in said)


def test_its_blocks_are_the_ones_that_are_meant() -> None:
    marks = [mark for mark, _, _ in blocks()]
    assert marks.count("server") == marks.count("install") == marks.count("long") == 1 and marks.count("") == 4
    assert set(marks) == {"", "server", "install", "long"}
