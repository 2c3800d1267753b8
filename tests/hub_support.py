"""A small world for the hub's tests: wheels built here, a hub on this machine, and a pull in a process of its own.

python hub_support.py NAME    pulls NAME
    HOLD_FILE=F      stops at two thirds until the file F appears
    LIMIT_BYTES=N    may write files of up to N bytes only
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import resource
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

from millis import hub
from millis.hub import progress
from millis.hub.catalogue import Entry, HubFile, Piece, Wheels
from millis.types import PullError

PIECE_BYTES = 100_000
COMMIT = "c0ffee" * 6 + "beef"
MODEL = random.Random(7).randbytes(3 * PIECE_BYTES - 123)  # cannot be compressed, so a wheel is as large as its piece
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheels_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Models go below folder / home, and pip finds the wheels in folder / wheels and no others."""
    monkeypatch.setenv("MILLIS_HOME", str(folder / "home"))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder / "wheels"), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def piece_bytes(index: int) -> bytes:
    return MODEL[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]


def tiny_entry(**changes: object) -> Entry:
    """A catalogue entry of three wheels, tiny-part1..3."""
    pieces = [
        Piece(f"tiny-part{i + 1}==1.0", f"tiny_part{i + 1}/data/{i}.bin", len(piece_bytes(i)), sha256(piece_bytes(i)))
        for i in range(3)
    ]
    entry = Entry(
        name="tiny",
        title="Tiny",
        file="tiny.gguf",
        size_bytes=len(MODEL),
        sha256=sha256(MODEL),
        parameters=1,
        quantisation="F32",
        languages=("en",),
        kind="base",
        licence="MIT",
        sources=(Wheels(tuple(pieces)),),
    )
    return replace(entry, **changes)  # type: ignore[arg-type]


HUB_FILE = HubFile("owner/tiny", "tiny.gguf")


@contextmanager
def catalogue_of(*entries: Entry) -> Iterator[None]:
    """The catalogue holds these entries instead of the real ones."""
    table = {entry.name: entry for entry in entries}
    with mock.patch("millis.hub.names.CATALOGUE", table), mock.patch("millis.hub.store.CATALOGUE", table):
        yield


def build_wheel(folder: Path, name: str, members: Sequence[tuple[str, bytes]]) -> Path:
    """A wheel that pip accepts: the given members, its metadata and its record."""
    stem = name.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    files = [
        *members,
        (f"{stem}/__init__.py", b"raise SystemExit('a data package was imported')\n"),
        (f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()),
        (f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
    ]
    digest = [base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() for _, data in files]
    record = "".join(f"{file},sha256={d},{len(data)}\n" for (file, data), d in zip(files, digest, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in [*files, (f"{info}/RECORD", f"{record}{info}/RECORD,,\n".encode())]:
            archive.writestr(file, data)
    return path


def build_wheels(folder: Path, entry: Entry, data: bytes = MODEL) -> list[Path]:
    """Every wheel of the entry's last source, their pieces cut from `data`."""
    source, paths, start = entry.sources[-1], [], 0
    assert isinstance(source, Wheels)
    for piece in source.pieces:
        name = piece.requirement.partition("==")[0]
        paths.append(build_wheel(folder, name, [(piece.member, data[start : start + piece.size_bytes])]))
        start += piece.size_bytes
    return paths


class Recording:
    """Progress that remembers every call."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, str]] = []
        self.steps: list[int] = []  # since the latest start
        self.said: list[str] = []

    def start(self, total_bytes: int, what: str) -> None:
        self.starts.append((total_bytes, what))
        self.steps = []

    def advance(self, count: int) -> None:
        self.steps.append(count)

    def say(self, text: str) -> None:
        self.said.append(text)


class FakeHub(ThreadingHTTPServer):
    """The part of the hub's protocol that fetching uses, over files in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}  # repository → file → bytes
        self.claims: dict[str, str] = {}  # file → the SHA-256 that the hub claims, where it is not the true one
        self.cut_bytes: int | None = None  # break each transfer off after so many bytes
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def claim(self, name: str, data: bytes) -> str:
        return self.claims.get(name, sha256(data))

    def handle_error(self, *_: object) -> None:
        pass  # a client that goes away is part of the tests


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.files:
            return self._listing("/".join(parts[2:4]))
        files = self.server.files.get("/".join(parts[:2]))
        if files is None:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        name = "/".join(parts[4:])
        if name not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self._file(name, files[name])

    def _listing(self, repo: str) -> None:
        siblings = []
        for name, data in self.server.files[repo].items():
            item: dict[str, object] = {"rfilename": name, "size": len(data)}
            if name.endswith((".safetensors", ".gguf")):
                oid = self.server.claim(name, data)
                item["lfs"] = {"sha256": oid, "size": len(data), "pointerSize": 130}
            siblings.append(item)
        body = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, data: bytes) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.server.claim(name, data)}"', "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if start else 200, data[start:], headers, self.server.cut_bytes)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut_bytes: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_bytes])


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A fake hub in a thread."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Printing(Recording):
    """Progress on standard output; with `hold`, the pull stops once two pieces are counted until the file appears."""

    def __init__(self, hold: Path | None) -> None:
        super().__init__()
        self.hold = hold

    def start(self, total_bytes: int, what: str) -> None:
        super().start(total_bytes, what)
        print("start", flush=True)

    def advance(self, count: int) -> None:
        super().advance(count)
        if self.hold and sum(self.steps) >= 2 * PIECE_BYTES:
            print("holding", flush=True)
            while not self.hold.exists():
                time.sleep(0.02)
            self.hold = None

    def say(self, text: str) -> None:
        print("say", text, flush=True)


def main() -> None:
    hold = Path(os.environ["HOLD_FILE"]) if "HOLD_FILE" in os.environ else None
    if limit := int(os.environ.get("LIMIT_BYTES", "0")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # Counting at the ends of transfers only, in this thread: a watcher that is held could not be joined after Ctrl-C.
    with catalogue_of(tiny_entry()), mock.patch("millis.hub.progress.POLL_S", 3600 if hold else progress.POLL_S):
        try:
            print("path", hub.pull(sys.argv[1], _Printing(hold)), flush=True)
        except PullError as error:
            sys.exit(f"PullError: {error}")


if __name__ == "__main__":
    main()
