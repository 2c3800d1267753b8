"""millis index: documents into one file that questions are answered from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from millis.commands import common

EXAMPLE = "millis index handbook/ faq.jsonl --index bank.idx"
File = Annotated[Path, typer.Option("--index", metavar="FILE", dir_okay=False, help="The index file.")]
Embedder = Annotated[str, typer.Option(help="Model that compares meanings; none: words alone.")]


def command(
    index: File,
    documents: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders: .txt, .md, .json, .jsonl, also with .gz.")
    ] = None,
    delete: Annotated[
        list[str] | None, typer.Option(help="Delete the document of this id; may be given again.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete all documents that are not given.")] = False,
    embedder: Embedder = "minilm",
    json: common.Json = False,
) -> None:
    """Adds documents to an index, made if need be; those of known ids are replaced where they changed."""
    from millis.documents.reader import read
    from millis.tasks.index import Index

    if not documents and not delete:
        raise typer.BadParameter("give documents to add, or --delete and an id")
    read_in = list(read(documents or []))
    with Index.open(index, embedder=named(embedder), create=bool(documents)) as opened:
        gone = set(opened.ids()) - {document.id for document in read_in} if prune else set()
        with _progress() as progress:
            change = opened.add(read_in, delete=[*dict.fromkeys([*(delete or []), *sorted(gone)])], progress=progress)
        passages, total = len(opened), len(opened.ids())
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
            f"{change.deleted} deleted; {total} documents, {passages} passages"
        )


def named(embedder: str) -> str | None:
    """The option's value as `Index.open` takes it."""
    return None if embedder == "none" else embedder


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("passages")
        yield lambda done, total: progress.update(task, completed=done, total=total)
