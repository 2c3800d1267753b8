"""Files that are whole or not there: written beside their place, flushed to the disk, renamed over it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from millis.types import RequestError


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read that becomes `path` when the body ends well, and is gone otherwise, Ctrl-C included.

    A symbolic link stays one: the file that it points to is replaced. A new file has the mode that the umask leaves, a
    replaced one keeps its own. RequestError: as `place`. OSError, which names `path`: the file cannot be written.
    """
    target = place(path)
    part = target.with_name(f".{target.name[-50:]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            part.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(part, target)
    except OSError as error:
        if error.filename in (None, str(part)):  # a full disk has no name, and the name beside is not the user's
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            part.unlink()


def place(path: Path) -> Path:
    """Where a file of this name is, or would be, symbolic links followed.

    RequestError: what is there is no file, but a folder, a device or a pipe, which renaming over would take away.
    """
    found = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        mode = found.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            raise RequestError(f"cannot write {path}: it is {kind}, not a file; give another name")
    return found
