"""Packages as carriers of data: fetched by pip or apt, opened as archives; none is installed, built or imported."""

from __future__ import annotations

import fnmatch
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from millis.types import PullError

DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60

# A source package is built by running its code, even where pip only has to download it. This backend stands where pip
# looks for setuptools and answers the one question pip asks, so that nothing of the package runs.
BACKEND = """\
import os
from pathlib import Path


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(folder, settings=None):
        name, _, version = os.environ["MILLIS_REQUIREMENT"].partition("==")
        info = Path(folder) / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
        return info.name
"""


def pip_download(requirement: str, scratch: Path, sha256: str | None = None, platform: str | None = None) -> Path:
    """The archive of `requirement` (name==version), fetched below `scratch` by pip with the user's own pip settings.

    Without `sha256` only a wheel is taken. With it, a wheel or a source package is, and pip opens no other archive than
    the one of that SHA-256. `platform`: of the wheel, this machine's unless given. Raises PullError.
    """
    if importlib.util.find_spec("pip") is None:
        raise PullError(f"pip is missing from {sys.executable}; run: {sys.executable} -m ensurepip")
    found, temporary = scratch / "wheels", scratch / "temporary"
    found.mkdir()
    temporary.mkdir()
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
    options = ["--no-deps", "--no-cache-dir", "--no-input", "--quiet", "--retries=1"]
    if sha256 is None:
        options += ["--only-binary=:all:", *([f"--platform={platform}"] if platform else []), requirement]
    else:
        options += _pinned(requirement, sha256, scratch, environment)
    # Run inside scratch: `-m` looks for pip in the folder it runs in.
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(found)]
    result = subprocess.run(command, cwd=found, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    files = [path for path in found.iterdir() if path.is_file() and not path.is_symlink()]
    if result.returncode != 0 or len(files) != 1:
        raise PullError(f"pip could not download {requirement}: {_reason(result.stderr)}")
    return files[0]


def _pinned(requirement: str, sha256: str, scratch: Path, environment: dict[str, str]) -> list[str]:
    """Options that make pip refuse any other archive, and run nothing of a source package."""
    backend, listed = scratch / "backend" / "setuptools", scratch / "requirements.txt"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND, encoding="utf-8")
    listed.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    environment.update(PYTHONPATH=str(backend.parent), MILLIS_REQUIREMENT=requirement)
    return ["--require-hashes", "--no-build-isolation", "--use-pep517", "--requirement", str(listed)]


def _reason(output: bytes) -> str:
    """pip's last error as one short line; pip calls a broken connection a missing package, so that is told apart."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    if any("connection broken by" in line for line in lines):
        return "no connection to its package index"
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "it has not the pinned SHA-256; it was discarded"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason"])[-1][:300]


def apt_download(package: str, scratch: Path) -> Path:
    """The .deb of `package`, fetched into `scratch` by apt-get, which checks its signature. Raises PullError."""
    if shutil.which("apt-get") is None:
        raise PullError(
            f"apt-get is missing, and {package} is a Debian package; fetch its .deb elsewhere and put it into the "
            "folder that MILLIS_DATA names"
        )
    command = ["apt-get", "download", "-q", package]
    environment = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    files = [path for path in scratch.glob("*.deb") if path.is_file() and not path.is_symlink()]
    if result.returncode != 0 or len(files) != 1:
        lines = [line[3:] for line in result.stderr.decode("utf-8", "replace").splitlines() if line.startswith("E: ")]
        raise PullError(f"apt-get could not download {package}: {(lines or ['it gave no reason'])[-1][:300]}")
    return files[0]


def members(archive: Path, patterns: Sequence[str], limit_bytes: int = 1 << 28) -> dict[str, bytes]:
    """The regular files of a wheel, .tar.gz or .deb whose path matches one of `patterns`, by path, in order of path.

    Nothing is extracted to the disk, no link is followed. Raises PullError for an archive that is damaged, holds a path
    twice, or unpacks to more than `limit_bytes`.
    """
    taken: dict[str, bytes] = {}
    try:
        for path, data in _walk(archive, patterns, limit_bytes):
            if path in taken:
                raise PullError(f"{archive.name} holds {path} twice; it was not used")
            taken[path] = data
    except DAMAGED as error:
        raise PullError(f"{archive.name} is damaged ({error}); it was not used") from error
    return dict(sorted(taken.items()))


def _walk(archive: Path, patterns: Sequence[str], limit_bytes: int) -> Iterator[tuple[str, bytes]]:
    left = limit_bytes

    def wanted(path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    def count(size_bytes: int) -> None:
        nonlocal left
        left -= size_bytes
        if left < 0:
            raise PullError(f"{archive.name} unpacks to more than {limit_bytes:,} bytes; it was not used")

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir() and wanted(info.filename):
                    count(info.file_size)
                    yield info.filename, wheel.read(info)
        return
    with archive.open("rb") as file, _tar(file, archive.name) as tar:
        for item in tar:
            count(item.size)  # also of what is not wanted: a stream is unpacked to get past it
            path = item.name.removeprefix("./")
            if item.isreg() and wanted(path) and (reader := tar.extractfile(item)) is not None:
                yield path, reader.read()


def _tar(file: IO[bytes], name: str) -> tarfile.TarFile:
    """The archive as a stream of tar members: a .tar.gz itself, or the data member of a .deb (deb(5))."""
    if not name.endswith(".deb"):
        return tarfile.open(fileobj=file, mode="r|gz")
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise PullError(f"{name} is not a Debian package; it was not used")
    while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES:
        member, size_bytes = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if member == "data.tar.xz":
            return tarfile.open(fileobj=file, mode="r|xz")
        if member == "data.tar.gz":
            return tarfile.open(fileobj=file, mode="r|gz")
        if member == "data.tar.zst":
            return tarfile.open(fileobj=_unzstd(file, name), mode="r|")
        file.seek(size_bytes + size_bytes % 2, os.SEEK_CUR)
    raise PullError(f"{name} holds no data.tar; it was not used")


def _unzstd(file: IO[bytes], name: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise PullError(f"{name} is packed with Zstandard; to read it: pip install 'millis[data]'") from None
    return zstandard.ZstdDecompressor().stream_reader(file)
