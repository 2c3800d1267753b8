"""millis index: documents into one file that questions are answered from."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from millis.commands import common
from millis.files import place
from millis.types import FormatError, RequestError

if TYPE_CHECKING:
    from millis.tasks.index import Change

_T = TypeVar("_T")
EXAMPLE = "millis index handbook/ faq.jsonl --index bank.idx"
File = Annotated[Path, typer.Option("--index", metavar="FILE", dir_okay=False, help="The index file.")]
Embedder = Annotated[
    str | None,
    typer.Option(help="Model that compares meanings, minilm unless said; none: words alone."),
]


def command(
    index: File,
    documents: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders: .txt, .md, .json, .jsonl, also with .gz.")
    ] = None,
    delete: Annotated[
        list[str] | None, typer.Option(help="Delete the document of this id; may be given again.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete all documents that are not given.")] = False,
    embedder: Embedder = None,
    json: common.Json = False,
) -> None:
    """Adds documents to an index, made if need be; those of known ids are replaced where they changed."""
    from millis.documents.reader import read
    from millis.tasks.index import Index

    if not documents and not delete:
        raise typer.BadParameter("give documents to add, or --delete and an id")
    with common.usage():
        path = place(index)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} for the index")
    read_in = list(read(documents or []))

    def fill(file: Path) -> tuple[Change, int, int]:
        with Index.open(file, embedder=named(embedder, index), create=bool(documents)) as opened:
            gone = set(opened.ids()) - {document.id for document in read_in} if prune else set()
            with common.progress("passages") as progress:
                removed = list(dict.fromkeys([*(delete or []), *sorted(gone)]))
                change = opened.add(read_in, delete=removed, progress=progress)
            return change, len(opened), len(opened.ids())

    change, passages, total = _made(path, fill) if documents and not path.exists() else fill(index)
    record = {
        "index": str(index),
        "added": change.added,
        "updated": change.updated,
        "unchanged": change.unchanged,
        "deleted": change.deleted,
        "documents": total,
        "passages": passages,
    }
    if json:
        common.print_json(record)
    else:
        print(
            f"{index}: {change.added} added, {change.updated} updated, {change.unchanged} unchanged, "
            f"{change.deleted} deleted; {common.count(total, 'document')}, {common.count(passages, 'passage')}"
        )


def _made(path: Path, fill: Callable[[Path], _T]) -> _T:
    """Fills a new index under another name, so that what is interrupted leaves none that answers nothing."""
    part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        found = fill(part)
        if path.exists():  # another process was quicker
            return fill(path)
        os.replace(part, path)
        return found
    except (FormatError, RequestError) as error:  # the name beside is not the user's
        raise type(error)(str(error).replace(str(part), str(path))) from None
    finally:
        for left in (part, part.with_name(part.name + "-journal")):
            left.unlink(missing_ok=True)


def named(embedder: str | None, index: Path) -> str | None:
    """The option's value as `Index.open` takes it. RequestError: a model for an index that was made without one."""
    from millis.tasks.index import embedder_of

    if embedder not in (None, "none") and index.is_file() and embedder_of(index) is None:
        raise RequestError(f"{index} was made with --embedder none; leave --embedder out, or make another index")
    return None if embedder == "none" else embedder or "minilm"
