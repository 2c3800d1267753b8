"""Names: what is accepted, what is found, what is refused and how, terms, offline, and homes that cannot be written."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_support import MODEL, NOWHERE, Recording, build_wheels, catalogue_of, tiny_entry, wheels_alone
from millis import hub
from millis.hub.catalogue import Entry
from millis.types import ModelError, PullError

TERMS = "Tiny is provided under the Tiny Terms"


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its own home, wheels of the tiny model, and no network."""
    wheels_alone(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    build_wheels(tmp_path / "wheels", tiny_entry())
    return tmp_path


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_resolve_pulls_once_and_find_never(world: Path) -> None:
    with catalogue_of(tiny_entry()):
        assert hub.find("tiny") is None
        path = hub.resolve("tiny")
        assert path.read_bytes() == MODEL
        assert hub.find("tiny") == hub.resolve("tiny") == hub.pull("tiny") == path


def test_a_file_of_the_wrong_size_is_fetched_again(world: Path) -> None:
    with catalogue_of(tiny_entry()):
        path = hub.pull("tiny")
        path.write_bytes(MODEL[:100])
        assert hub.find("tiny") is None
        assert hub.resolve("tiny").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm", "no model named 'smollm'; did you mean smollm2? "),
        ("SmolLM2", "did you mean smollm2?"),
        ("qwen-0.5b", "did you mean qwen2.5-0.5b or qwen2.5-1.5b?"),
        ("zzz", "the catalogue has smollm2, qwen2.5-0.5b, "),
        ("zzz", " gemma3-270m, minilm, e5-small-zh, roformer-small-zh. "),
        ("", "no model named ''"),
        ("a/b/c", "no model named 'a/b/c'"),
        ("../etc", "there is no file or folder ../etc"),
        ("/no/such", "there is no file or folder /no/such"),
        ("owner/..", "no model named"),
        ("owner--name/x", "no model named"),
        ("nul\0byte", "no model named"),
        ("x" * 5000, "no model named"),
        ("~nobody-of-this-name/x/y", "there is no file or folder"),
        ("missing.gguf", "there is no file missing.gguf"),
        ("owner/missing.gguf", "there is no file owner/missing.gguf"),
    ],
)
def test_an_unknown_name_is_told_what_is_accepted(name: str, expected: str) -> None:
    assert hub.find(name) is None
    for function in (hub.pull, hub.resolve):
        with pytest.raises(ModelError) as caught:
            function(name)
        text = one_line(caught)
        assert expected in text and not isinstance(caught.value, PullError)
        assert "there is no file" in text or text.endswith(
            "Also accepted: a .gguf file, a folder with config.json, "
            "or a hub repository as owner/name or owner/name:file.gguf"
        )


def test_files_and_folders_of_the_user(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "my.gguf").write_bytes(b"GGUF")
    (world / "mine").mkdir()
    (world / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", str(world))
    for name in ("my.gguf", "./my.gguf", str(world / "my.gguf"), "mine", "./mine", str(world / "mine")):
        assert hub.resolve(name) == hub.find(name) == Path(name)
    assert hub.resolve("~/my.gguf") == world / "my.gguf"


def test_a_local_folder_owner_slash_name_comes_before_the_hub(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "owner" / "name").mkdir(parents=True)
    (world / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(world)
    assert hub.resolve("owner/name") == Path("owner/name")


def test_a_catalogue_name_comes_before_a_local_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "tiny").mkdir()
    (world / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(world)
    with catalogue_of(tiny_entry()):
        assert hub.resolve("tiny") == world / "home" / "models" / "tiny" / "tiny.gguf"
        assert hub.resolve("./tiny") == Path("tiny")


def test_a_path_that_is_no_model_is_refused(world: Path) -> None:
    (world / "notes.txt").write_text("x")
    (world / "folder.gguf").mkdir()
    for path in (world / "notes.txt", world, world / "folder.gguf"):
        with pytest.raises(ModelError, match="is neither a .gguf file nor a folder with config.json"):
            hub.resolve(str(path))


def test_offline_finds_and_does_not_fetch(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setenv("MILLIS_OFFLINE", "1")
    monkeypatch.setattr("socket.socket.connect", never)
    monkeypatch.setattr("subprocess.run", never)
    with catalogue_of(tiny_entry()):
        path = world / "home" / "models" / "tiny" / "tiny.gguf"
        with pytest.raises(PullError) as caught:
            hub.resolve("tiny")
        expected = f"tiny is not on disk and MILLIS_OFFLINE=1 forbids fetching it; unset it; or put the file at {path}"
        assert one_line(caught) == expected
        with pytest.raises(PullError, match="owner/name is not on disk and MILLIS_OFFLINE=1 forbids"):
            hub.resolve("owner/name")
        assert not (world / "home").exists()
        path.parent.mkdir(parents=True)
        path.write_bytes(MODEL)
        assert hub.resolve("tiny") == path


def test_offline_must_be_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLIS_OFFLINE", "true")
    with pytest.raises(ModelError, match="MILLIS_OFFLINE must be 0 or 1, not 'true'"):
        hub.pull("smollm2")


def test_terms_nobody_agreed_to_stop_the_pull(world: Path) -> None:
    with catalogue_of(tiny_entry(terms=TERMS)):
        with pytest.raises(PullError) as caught:
            hub.resolve("tiny")
        assert one_line(caught) == f"{TERMS}; to agree, run: millis pull tiny --accept-terms"
        with pytest.raises(PullError, match="the terms of tiny were not agreed to; nothing was fetched"):
            hub.pull("tiny", agree=lambda entry: False)
        assert hub.find("tiny") is None and not (world / "home" / "models").exists()


def test_terms_are_shown_once(world: Path) -> None:
    shown: list[Entry] = []

    def agree(entry: Entry) -> bool:
        shown.append(entry)
        return True

    entry = tiny_entry(terms=TERMS)
    with catalogue_of(entry):
        path = hub.resolve("tiny", agree=agree)
        path.unlink()
        assert hub.resolve("tiny", agree=agree).read_bytes() == MODEL
        assert hub.pull("tiny").read_bytes() == MODEL
    assert shown == [entry]
    with catalogue_of(tiny_entry(terms=TERMS + ", version 2")):
        path.unlink()
        with pytest.raises(PullError, match="version 2; to agree"):
            hub.pull("tiny")


def test_the_environment_may_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLIS_ACCEPT_TERMS", "1")
    with catalogue_of(tiny_entry(terms=TERMS)):
        assert hub.pull("tiny", agree=lambda entry: False).read_bytes() == MODEL


def test_gemma_asks_before_anything_else() -> None:
    with pytest.raises(PullError, match="Gemma Terms of Use .*millis pull gemma3-270m --accept-terms"):
        hub.resolve("gemma3-270m")


@pytest.mark.parametrize("name", ["tiny", "owner/name"])
@pytest.mark.parametrize("below", ["file", "file/deeper/home"])
def test_a_home_that_cannot_be_made(name: str, below: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "file").write_text("in the way")
    monkeypatch.setenv("MILLIS_HOME", str(world / below))
    with catalogue_of(tiny_entry()):
        with pytest.raises(PullError) as caught:
            hub.pull(name)
        text = one_line(caught)
        assert text.startswith(f"cannot store {name} at {world / 'file'}")
        assert text.endswith("set MILLIS_HOME to a folder that can be written")
        assert [stored.state for stored in hub.entries()] == ["absent"]


def test_a_read_only_home(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Any, mode: int = 0o777) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    with catalogue_of(tiny_entry()), pytest.raises(PullError) as caught:
        hub.pull("tiny")
    assert re.search("Read-only file system; set MILLIS_HOME to a folder that can be written$", one_line(caught))


def test_a_folder_in_the_place_of_a_repository(world: Path) -> None:
    folder = world / "home" / "models" / "owner--name"
    folder.mkdir(parents=True)
    with pytest.raises(PullError, match=f"{folder} is there but holds no model; remove it"):
        hub.pull("owner/name")


def test_progress_is_optional_and_told_everything() -> None:
    progress = Recording()
    with catalogue_of(tiny_entry()):
        hub.pull("tiny", progress)
    assert progress.starts == [(len(MODEL), "tiny")]
    assert sum(progress.steps) == len(MODEL) and all(step >= 0 for step in progress.steps)


def test_importing_the_hub_imports_no_client() -> None:
    heavy = ["huggingface_hub", "filelock", "subprocess", "zipfile", "tempfile", "numpy"]
    code = f"import sys, millis.hub; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_names() -> None:
    names = ["CATALOGUE", "Entry", "Progress", "Silent", "Stored", "entries", "find", "home", "packed_path"]
    names += ["pull", "resolve"]
    assert sorted(hub.__all__) == names and all(hasattr(hub, name) for name in names)
