"""Models on disk: `home()/models/NAME/FILE`, the lock of each name, the terms agreed to, and what is there.

A file under its final name is whole and verified: it is written under another name, hashed, flushed to the disk
and only then renamed. A file ending in `.part` is never taken for a model.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millis.hub.catalogue import CATALOGUE, Beside, Entry
from millis.hub.progress import Progress, folder_bytes
from millis.types import ModelError, PullError

CHUNK_BYTES = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_ERRORS = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR)


def flag(name: str) -> bool:
    """The environment variable `name` as yes or no: 1, or 0, empty or absent. Raises ModelError for anything else."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ModelError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"


def home() -> Path:
    """Where Millis keeps its files: MILLIS_HOME, or `millis` in the platform's cache folder of this user."""
    chosen = os.environ.get("MILLIS_HOME")
    try:
        return Path(chosen).expanduser().absolute() if chosen else _cache_folder() / "millis"
    except RuntimeError as error:
        raise ModelError(f"no home folder for this user ({error}); set MILLIS_HOME to a folder for models") from error


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return folder if folder.is_absolute() else Path.home() / ".cache"  # the XDG specification ignores relative ones


def model_folder(key: str) -> Path:
    """The folder of a catalogue name, or of a hub repository under its key."""
    return home() / "models" / key


def packed_path(model: Path) -> Path:
    """Where the packed weights of the model at `model` are kept; see engine/packed.py."""
    source = os.path.realpath(model)
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    return home() / "packed" / f"{os.path.basename(source)[:100]}-{digest}.packed"


def final_path(entry: Entry) -> Path:
    return model_folder(entry.name) / entry.file


def model_path(entry: Entry) -> Path:
    """What the entry's name stands for: its file, or the folder where it is several."""
    return model_folder(entry.name) if entry.beside else final_path(entry)


def beside_path(entry: Entry, other: Beside) -> Path:
    return model_folder(entry.name) / other.file


def missing_beside(entry: Entry) -> list[Beside]:
    """What lies beside the entry's file when it is complete, and is not there whole."""
    return [other for other in entry.beside if not _is_whole(beside_path(entry, other), other.size_bytes)]


def keep_beside(entry: Entry, other: Beside, data: bytes) -> None:
    """Puts what lies beside an entry's file in its place. ValueError where the bytes are not those of the catalogue."""
    if len(data) != other.size_bytes or hashlib.sha256(data).hexdigest() != other.sha256:
        raise ValueError(f"{other.file} has not the SHA-256 {other.sha256}")
    final = beside_path(entry, other)
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(final.name + ".part")
    part.write_bytes(data)
    commit(part, final)


def part_path(entry: Entry) -> Path:
    return final_path(entry).with_name(entry.file + ".part")


def is_complete(entry: Entry) -> bool:
    """Whether all is there with its whole size; its SHA-256 was checked before it got its name."""
    return _is_whole(final_path(entry), entry.size_bytes) and not missing_beside(entry)


def _is_whole(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turns an error of the disk into one line: the path, the cause and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename is not None else home()
        remedy = (
            "free some space there, or set MILLIS_HOME to a folder on another disk"
            if error.errno in FULL
            else "set MILLIS_HOME to a folder that can be written"
        )
        raise PullError(f"cannot store {what} at {where}: {error.strerror or error}; {remedy}") from error


@contextmanager
def locked(key: str, progress: Progress) -> Iterator[None]:
    """Holds the lock of `key` among all processes that use this home; says so when it must wait.

    The operating system frees the lock of a process that dies.
    """
    from filelock import FileLock, Timeout

    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"another process is pulling {key}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises OSError (ENOSPC) unless the disk of `folder` has `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes are needed and {free:,} are free", str(folder))


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def commit(part: Path, final: Path) -> None:
    """Gives a verified file or folder its final name, atomically, with its bytes on the disk first."""
    for path in (part, *part.rglob("*")) if part.is_dir() else (part,):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    os.replace(part, final)
    if os.name == "posix":  # elsewhere a folder cannot be opened; the rename is still atomic
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def has_agreed(entry: Entry) -> bool:
    """Whether these very terms were agreed to; changed terms are asked again."""
    path = home() / "terms" / entry.name
    return entry.terms is None or (path.is_file() and path.read_text(encoding="utf-8") == entry.terms)


def record_agreement(entry: Entry) -> None:
    path = home() / "terms" / entry.name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(entry.terms or "", encoding="utf-8")
    commit(part, path)


@dataclass(frozen=True, slots=True)
class Stored:
    """A model as it stands on disk."""

    name: str  # catalogue name, or owner/name of a hub repository
    entry: Entry | None  # None for a hub repository
    path: Path  # where the file or folder is, or would be
    size_bytes: int  # on disk now
    state: Literal["complete", "partial", "absent"]


def entries() -> list[Stored]:
    """The whole catalogue in its order, then the hub repositories on disk by name."""
    catalogue = [_stored_entry(entry) for entry in CATALOGUE.values()]
    folder = home() / "models"
    repos = [path for path in folder.glob("*--*") if path.is_dir()] if folder.is_dir() else []
    return catalogue + [_stored_repo(path) for path in sorted(repos)]


def _stored_entry(entry: Entry) -> Stored:
    path, size = model_path(entry), folder_bytes(model_folder(entry.name))
    state: Literal["complete", "partial", "absent"] = (
        "complete" if is_complete(entry) else "partial" if size else "absent"
    )
    return Stored(entry.name, entry, path, size, state)


def _stored_repo(path: Path) -> Stored:
    name = path.name.removesuffix(".part").replace("--", "/", 1).replace("--", ":", 1)
    return Stored(name, None, path, folder_bytes(path), "partial" if path.name.endswith(".part") else "complete")
