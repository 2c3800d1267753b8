"""A small world for the data tests: wheels, source packages and .deb files built here, JSON lines written and read."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hub_support import sha256
from millis.data.catalogue import Debian, NamedSet, Package


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tar_bytes(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return held.getvalue()


def build_sdist(folder: Path, name: str, files: Mapping[str, bytes], setup: str = "") -> Path:
    """A source package of the old kind, whose setup.py is `setup`."""
    stem = f"{name}-1.0"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    held = {**files, "setup.py": setup.encode(), "PKG-INFO": metadata}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.tar.gz"
    path.write_bytes(tar_bytes({f"{stem}/{file}": data for file, data in held.items()}))
    return path


def build_deb(path: Path, files: Mapping[str, bytes], form: str = "xz") -> Path:
    """A .deb as deb(5) describes it: an ar archive of debian-binary, control.tar and data.tar."""
    if form == "zst":
        import zstandard

        data = zstandard.ZstdCompressor().compress(tar_bytes({f"./{n}": d for n, d in files.items()}, "w:"))
    else:
        data = tar_bytes({f"./{name}": held for name, held in files.items()}, f"w:{form}")
    members = {"debian-binary": b"2.0\n", "control.tar.gz": tar_bytes({"control": b"odd"}), f"data.tar.{form}": data}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, held in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(held):<10}`\n".encode())
            file.write(held + b"\n" * (len(held) % 2))
    return path


def small_set(source: Package | Debian, **changes: Any) -> NamedSet:
    """A set read by the spam reader, out of one source."""
    facts: dict[str, Any] = {
        "name": "small",
        "title": "Small",
        "task": "classification",
        "languages": ("en",),
        "licence": "MIT",
        "sources": (source,),
        "reader": "labelled:spam",
        "fields": ("text", "label"),
    }
    return NamedSet(**{**facts, **changes})


def package(archive: Path, members: Sequence[str], name: str = "small-data") -> Package:
    return Package(f"{name}==1.0", archive.name, archive.stat().st_size, sha256(archive.read_bytes()), tuple(members))
