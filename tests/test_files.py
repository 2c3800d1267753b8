"""Files that are whole or not there: links stay links, modes are the user's, and what is no file is refused."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from millis.files import whole
from millis.types import RequestError


def write(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write(text.encode())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_link_stays_one_and_the_file_behind_it_is_replaced(here: Path) -> None:
    (here / "far").mkdir()
    target, link, dangling = here / "far" / "file", here / "link", here / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to("far/other")
    write(link, "new")
    write(dangling, "first")
    assert link.is_symlink() and target.read_text() == "new"
    assert dangling.is_symlink() and (here / "far" / "other").read_text() == "first"
    assert sorted(os.listdir(here / "far")) == ["file", "other"]


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(here: Path) -> None:
    old = here / "old"
    old.write_text("")
    old.chmod(0o600)
    before = os.umask(0o027)
    try:
        write(here / "new", "x")
        write(old, "x")
    finally:
        os.umask(before)
    assert (mode(here / "new"), mode(old)) == (0o640, 0o600)


def test_what_is_no_file_is_refused_and_stays(here: Path) -> None:
    os.mkfifo("pipe")
    (here / "folder").mkdir()
    (here / "link").symlink_to("pipe")
    for name, kind in (("pipe", "a device or pipe"), ("link", "a device or pipe"), ("folder", "a folder")):
        with pytest.raises(RequestError, match=f"cannot write {name}: it is {kind}"):
            write(Path(name), "x")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert sorted(os.listdir(here)) == ["folder", "link", "pipe"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_body_that_fails_leaves_the_old_file_and_nothing_else(here: Path, error: type[BaseException]) -> None:
    (here / "file").write_text("old")
    with pytest.raises(error), whole(Path("file")) as file:
        file.write(b"half")
        raise error
    assert (here / "file").read_text() == "old" and os.listdir(here) == ["file"]


def test_what_cannot_be_written_is_told_by_its_own_name(here: Path) -> None:
    with pytest.raises(OSError, match="No space") as full, whole(here / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write: without a name
    with pytest.raises(OSError, match="No such") as missing:
        write(here / "none" / "file", "x")
    with pytest.raises(OSError, match="No such") as other, whole(here / "file"):
        (here / "source").read_bytes()
    names = [Path(one.value.filename) for one in (full, missing, other)]
    assert names == [here / "file", here / "none" / "file", here / "source"]


def test_a_long_name_is_no_obstacle(here: Path) -> None:
    name = "名" * 85  # 255 bytes, as long as a name may be
    write(here / name, "x")
    assert os.listdir(here) == [name]
