"""Models on disk: where they are, what counts as there, locks, agreements and full or read-only disks."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hub_support import MODEL, Recording, catalogue_of, sha256, tiny_entry
from millis.hub import CATALOGUE, entries, home, store
from millis.hub.progress import counted, folder_bytes
from millis.types import ModelError, PullError


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILLIS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_home_is_millis_home_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLIS_HOME", "here")
    assert home() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("MILLIS_HOME", "~/models")
    assert home() == tmp_path / "me" / "models"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "me/.cache/millis"),
        ("linux", {"XDG_CACHE_HOME": "{root}/xdg"}, "xdg/millis"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "me/.cache/millis"),
        ("darwin", {"XDG_CACHE_HOME": "{root}/xdg"}, "me/Library/Caches/millis"),
        ("win32", {"LOCALAPPDATA": "{root}/local"}, "local/millis"),
        ("win32", {}, "me/AppData/Local/millis"),
    ],
)
def test_home_follows_the_platform(
    platform: str, variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MILLIS_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(root=tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert home() == tmp_path / expected


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLIS_HOME", "~no-such-user-here/models")
    with pytest.raises(ModelError, match="set MILLIS_HOME"):
        home()


def test_flags_are_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in {"1": True, "0": False, "": False}.items():
        monkeypatch.setenv("MILLIS_OFFLINE", value)
        assert store.flag("MILLIS_OFFLINE") is expected
    monkeypatch.setenv("MILLIS_OFFLINE", "yes")
    with pytest.raises(ModelError, match="MILLIS_OFFLINE must be 0 or 1, not 'yes'"):
        store.flag("MILLIS_OFFLINE")


def test_states_of_the_catalogue(own_home: Path) -> None:
    first, second, third = (tiny_entry(name=name) for name in ("first", "second", "third"))
    write(own_home / "models" / "first" / "tiny.gguf", MODEL)
    write(own_home / "models" / "second" / "tiny.gguf.part", MODEL[:1000])
    with catalogue_of(first, second, third):
        found = [(stored.name, stored.entry, stored.state, stored.size_bytes) for stored in entries()]
    assert found == [
        ("first", first, "complete", len(MODEL)),
        ("second", second, "partial", 1000),
        ("third", third, "absent", 0),
    ]


def test_a_file_of_the_wrong_size_is_not_complete(own_home: Path) -> None:
    entry = tiny_entry()
    path = write(own_home / "models" / "tiny" / "tiny.gguf", MODEL[:-1])
    assert not store.is_complete(entry)
    path.write_bytes(MODEL)
    assert store.is_complete(entry)
    path.unlink()
    path.mkdir()
    assert not store.is_complete(replace(entry, size_bytes=path.stat().st_size))


def test_hub_repositories_are_listed_after_the_catalogue(own_home: Path) -> None:
    models = own_home / "models"
    write(models / "owner--small" / "config.json", b"{}")
    write(models / "owner--many--a.gguf" / "a.gguf", b"12345")
    write(models / "owner--begun.part" / "model.safetensors", b"123")
    write(models / "stray.txt", b"1")
    found = [(stored.name, stored.state, stored.size_bytes) for stored in entries()]
    assert found[: len(CATALOGUE)] == [(name, "absent", 0) for name in CATALOGUE]
    assert found[len(CATALOGUE) :] == [
        ("owner/begun", "partial", 3),
        ("owner/many:a.gguf", "complete", 5),
        ("owner/small", "complete", 2),
    ]


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    path = write(tmp_path / "file", MODEL * 5)  # more than one chunk
    expected = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert store.hash_file(path) == expected == sha256(MODEL * 5)


def test_commit_renames_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "final", b"old")
    store.commit(write(tmp_path / "a.part", b"new"), tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"new" and not (tmp_path / "a.part").exists()
    write(tmp_path / "b.part" / "deep" / "file", b"x")
    store.commit(tmp_path / "b.part", tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "file").read_bytes() == b"x" and not (tmp_path / "b.part").exists()


def test_nothing_gets_its_final_name_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.commit(write(tmp_path / "a.part", b"new"), tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_too_little_space_names_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.check_space(tmp_path, 0)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(PullError) as caught, store.storing("tiny"):
        store.check_space(tmp_path, free * 1000)
    text = str(caught.value)
    assert f"{free * 1000:,} bytes are needed" in text and str(tmp_path) in text
    assert re.search(r"[\d,]+ are free; free some space there, or set MILLIS_HOME", text)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "a folder that can be written"),
        (errno.EACCES, "a folder that can be written"),
    ],
)
def test_disk_errors_become_one_line(code: int, remedy: str) -> None:
    with pytest.raises(PullError) as caught, store.storing("tiny"):
        raise OSError(code, os.strerror(code), "/some/path")
    text = str(caught.value)
    assert text.startswith(f"cannot store tiny at /some/path: {os.strerror(code)}; ") and remedy in text
    assert isinstance(caught.value.__cause__, OSError)


def test_disk_errors_without_a_path_name_the_home(own_home: Path) -> None:
    with pytest.raises(PullError, match=re.escape(str(own_home))), store.storing("tiny"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_agreement_is_to_the_text_as_it_was() -> None:
    entry = tiny_entry(terms="Terms, version 1")
    assert store.has_agreed(tiny_entry()) and not store.has_agreed(entry)
    store.record_agreement(entry)
    assert store.has_agreed(entry)
    assert not store.has_agreed(replace(entry, terms="Terms, version 2"))


def test_the_lock_lets_one_in_and_tells_the_other() -> None:
    inside, order, second = threading.Event(), [], Recording()

    def hold() -> None:
        with store.locked("tiny", Recording()):
            inside.set()
            while not second.said:
                time.sleep(0.01)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with store.locked("tiny", second):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert second.said == ["another process is pulling tiny; waiting for it"]


def test_locks_of_different_models_are_independent() -> None:
    said = Recording()
    with store.locked("first", said), store.locked("second", said):
        pass
    assert said.said == []


def test_folder_bytes_counts_files_not_links(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", b"123")
    write(tmp_path / "c", b"45")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path / "missing") == 0


def test_counted_follows_a_growing_folder_to_exactly_the_limit(tmp_path: Path) -> None:
    progress = Recording()
    write(tmp_path / "before", b"x" * 500)
    with counted(progress, tmp_path, 1000):
        write(tmp_path / "now", b"x" * 300)
        while not progress.steps:
            time.sleep(0.01)
        write(tmp_path / "too much", b"x" * 5000)
        while sum(progress.steps) < 1000:
            time.sleep(0.01)
    assert progress.steps[0] == 300 and sum(progress.steps) == 1000


def test_counted_tops_up_after_success_only(tmp_path: Path) -> None:
    progress = Recording()
    with counted(progress, tmp_path, 1000):
        pass
    assert progress.steps == [1000]
    failed = Recording()
    with pytest.raises(PullError), counted(failed, tmp_path, 1000):
        raise PullError("no")
    assert failed.steps == []
