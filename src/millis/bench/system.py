"""What the operating system tells of processes and files: memory of a tree of processes, and the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def memory_mb(pids: Iterable[int]) -> dict[str, float]:
    """Summed over processes, MB: the peak of resident memory, and the proportional share now (shared pages divided)."""
    peak = share = 0
    for pid in pids:
        with suppress(OSError):
            peak += _kib(Path(f"/proc/{pid}/status"), "VmHWM:")
            share += _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
    return {"peak_rss_mb": peak * 1024 / 1e6, "pss_mb": share * 1024 / 1e6}


def _kib(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return 0


def files_under(path: Path) -> list[Path]:
    """The file, or every file in the folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def mapped_files(pids: Iterable[int]) -> list[Path]:
    """Files of weights that the processes have mapped: 8 MiB or more, and no library."""
    found: set[Path] = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/") and "x" not in fields[1] and ".so" not in fields[5]:
                    found.add(Path(fields[5]))
    return sorted(path for path in found if path.is_file() and path.stat().st_size >= 8 << 20)


def drop_from_cache(files: Iterable[Path]) -> float:
    """Asks the system to forget what it holds of the files; returns the share in [0, 1] that it kept all the same.

    It keeps what a process has mapped at the moment.
    """
    kept = total = 0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is written back can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            resident, pages = _resident_pages(file.fileno())
            kept, total = kept + resident, total + pages
    return kept / total if total else 0.0


def _resident_pages(fd: int) -> tuple[int, int]:
    """(pages of the file in memory, pages in all), by mincore(2)."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        start = ctypes.addressof(anchor := ctypes.c_char.from_buffer(view))
        failed = libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found)
        del anchor  # a mapping that something points into cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(byte & 1 for byte in found), pages
