"""files → documents: a .txt or .md is one, .json and .jsonl hold objects with id, title and text; also .gz"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from millis.documents.store import Document
from millis.types import RequestError, brief

TEXTS, LISTS = (".txt", ".md"), (".json", ".jsonl")
LARGEST_BYTES = 1 << 30  # of one file, unpacked
_TEXT_FIELDS = ("text", "content", "body")
_FIELDS = {"id", "title", *_TEXT_FIELDS}


def read(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents of files and folders, in order. Raises RequestError that names the file, and what of it, is wrong.

    A text file's id is its path as given, and its title its first heading or its name. Folders are searched for files
    of the endings above; hidden ones are left out.
    """
    for path in paths:
        for file in _files(path):
            yield from _documents(file)


def from_values(values: Iterable[Document | Mapping[str, Any] | str], first: int = 1) -> list[Document]:
    """Documents as Python programs have them: objects, mappings of id, title and text, or plain texts, whose ids are
    their numbers from `first` on.

    RequestError: one that is wrong; a single text, which may be meant as the path of a file.
    """
    if isinstance(values, Mapping | Document):
        values = [values]
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise RequestError(
            f"documents must be a list of documents, not {brief(values)}; give [text] for a single text, or what "
            "millis.Index.open makes of an index file"
        )
    found = []
    for i, value in enumerate(values):
        if isinstance(value, str):
            value = {"id": str(first + i), "text": value}
        if isinstance(value, Document):
            found.append(_checked(value.id, value.title, value.text, f"document {i}"))
        else:
            found.append(_document(value, f"document {i}"))
    return found


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise RequestError(f"there is no file or folder {path}")
    if not path.is_dir():
        if not _kind(path):
            raise RequestError(
                f"{path} is of no kind that is read; there are {', '.join(TEXTS + LISTS)}, also with .gz"
            )
        yield path
        return
    inside = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
    visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not visible:
        raise RequestError(f"the folder {path} holds no {', '.join(TEXTS + LISTS)}")
    yield from visible


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return next((ending for ending in TEXTS + LISTS if name.endswith(ending)), "")


def _documents(path: Path) -> Iterator[Document]:
    text, kind = _text(path), _kind(path)
    if kind in TEXTS:
        yield _checked(str(path), _title(text, path), text, str(path))
    elif kind == ".jsonl":
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _document(_json(line, f"{path}, line {i}"), f"{path}, line {i}")
    else:
        values = _json(text, str(path))
        for i, value in enumerate(values if isinstance(values, list) else [values]):
            yield _document(value, f"{path}, document {i}")


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise RequestError(f"{path} holds more than {LARGEST_BYTES >> 20} MiB; split it")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"cannot read {path}: {error}") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None


def _document(value: Any, where: str) -> Document:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is no object with id and text, but {type(value).__name__}")
    unknown = sorted(set(map(str, value)) - _FIELDS)
    if unknown:
        raise RequestError(f"{where} has unknown fields {', '.join(unknown)}; there are id, title, and text or content")
    texts = [value[name] for name in _TEXT_FIELDS if name in value]
    if len(texts) != 1:
        raise RequestError(f"{where} must have exactly one of {', '.join(_TEXT_FIELDS)}")
    if isinstance(id := value.get("id"), int) and not isinstance(id, bool):
        id = str(id)
    return _checked(id, value.get("title", ""), texts[0], where)


def _checked(id: Any, title: Any, text: Any, where: str) -> Document:
    for name, part in (("id", id), ("title", title), ("text", text)):
        if not isinstance(part, str):
            raise RequestError(f"{where} has no {name} that is a text")
        if any("\ud800" <= c <= "\udfff" or c == "\0" for c in part):
            raise RequestError(f"{where} has a {name} with characters that no text has")
    if not id:
        raise RequestError(f"{where} has an empty id")
    return Document(id, " ".join(title.split()), text)


def _title(text: str, path: Path) -> str:
    first = text.lstrip().partition("\n")[0].strip()
    return first.lstrip("#").strip() if first.startswith("#") else path.name.removesuffix(".gz").rpartition(".")[0]
