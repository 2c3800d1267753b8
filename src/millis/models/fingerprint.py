"""What tells one state of a model's files from another, without reading them whole."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 32, 4096


def fingerprint(path: Path) -> bytes:
    """32 bytes: a digest of each file's name, size, time of change, beginning, end and evenly spread samples.

    A time alone survives copying, a size alone editing; a sample costs a page, where a whole digest would cost as much
    as the load it is to spare. OSError where a file cannot be read.
    """
    digest = blake2b(digest_size=32)
    for file in source_files(path):
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode("utf-8", "surrogateescape"))
            for index in range(_SAMPLES + 1):
                offset = max(0, status.st_size - _SAMPLE_BYTES) * index // _SAMPLES
                digest.update(os.pread(opened.fileno(), _SAMPLE_BYTES, offset))
    return digest.digest()


def fingerprint_of(path: Path) -> bytes | None:
    """The same; None where a file cannot be read."""
    try:
        return fingerprint(path)
    except OSError:
        return None


def source_files(path: Path) -> list[Path]:
    """The files that make up a model: a GGUF file, or a folder's configuration and safetensors."""
    if not path.is_dir():
        return [path]
    return [path / "config.json", *sorted(path.glob("*.safetensors"))]
